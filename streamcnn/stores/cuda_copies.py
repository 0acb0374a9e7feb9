"""CUDA's copy engines: a stream each way, and events that order them with the stream that computes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, cuda

from streamcnn.stores.transfers import Copies, GpuTransfers, PlainTransfers, Transfers


class CudaCopies:
    """Two streams for copies, one each way, beside the stream that computes.

    All tensors are allocated on the stream that computes, so the caching allocator holds no memory for other
    streams. Callers that drop a tensor wait for its copies first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._incoming: cuda.Stream = cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._outgoing: cuda.Stream = cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._is_used = False
        """Whether copies were asked for since the host last waited for all: most passes ask for none."""

    def mark(self) -> cuda.Event:
        """An event at the end of the work queued on the stream that computes."""
        return _recorded(cuda.current_stream(self.device))

    def bring(self, copies: Copies, after: cuda.Event) -> cuda.Event:
        """Copy to the GPU."""
        self._is_used = True
        return _copied(self._incoming, copies, after)

    def take(self, copies: Copies, after: cuda.Event) -> cuda.Event:
        """Copy from the GPU."""
        self._is_used = True
        return _copied(self._outgoing, copies, after)

    def hold(self, mark: cuda.Event) -> None:
        """Make the stream that computes wait for a mark."""
        cuda.current_stream(self.device).wait_event(mark)

    def settle(self, mark: cuda.Event) -> None:
        """Make the host wait for a mark."""
        mark.synchronize()

    def settle_all(self) -> None:
        """Make the host wait for both streams."""
        if self._is_used:
            self._incoming.synchronize()
            self._outgoing.synchronize()
            # Last, since an interrupt may come before.
            self._is_used = False

    def ends(self) -> tuple[cuda.Event, ...]:
        """Events at the ends of both streams."""
        return (_recorded(self._incoming), _recorded(self._outgoing)) if self._is_used else ()

    def buffer(self, shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """A tensor from PyTorch's allocator of pinned memory, which tracks the copies that use it."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True, memory_format=memory_format)

    def pin(self, block: Tensor) -> Callable[[], None] | None:
        """Register host memory with CUDA; return what undoes that, or None with a warning if it fails."""
        device, place, process = self.device, block.data_ptr(), os.getpid()
        try:
            error = _error_of("cudaHostRegister", device, place, block.nbytes, 0)
        except BaseException:
            # Pinning takes long, and an interrupt comes when it is done.
            _error_of("cudaHostUnregister", device, place)
            raise
        if error:
            warnings.warn(
                f"{block.nbytes} bytes of host memory cannot be pinned (CUDA error {error}): maps there "
                "are copied more slowly. Raise the limit of locked memory (ulimit -l), or free host memory",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

        def undo() -> None:
            # A forked child has no CUDA.
            if os.getpid() == process and (error := _error_of("cudaHostUnregister", device, place)):
                raise RuntimeError(f"host memory cannot be given back (CUDA error {error})")

        return undo


def _error_of(function: str, device: torch.device, *args: int) -> int:
    """Call a function of CUDA's runtime, and return its error number, or 0 for none."""
    runtime: Any = cuda.cudart()  # type: ignore[no-untyped-call]
    # Otherwise the call would make a context on whichever device is current.
    with cuda.device(device):
        error = int(getattr(runtime, function)(*args))
    if error:
        # CUDA reports the error once more at the next kernel: let that be this one.
        with suppress(RuntimeError):
            torch.ones(1, device=device)
    return error


def _recorded(stream: cuda.Stream) -> cuda.Event:
    event: cuda.Event = cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _copied(stream: cuda.Stream, copies: Copies, after: cuda.Event) -> cuda.Event:
    stream.wait_event(after)
    # Two blocks: an interrupt may keep the inner one from making the stream that computes current again.
    with cuda.stream(cuda.current_stream(stream.device)), cuda.stream(stream):
        for target, source in copies:
            target.copy_(source, non_blocking=True)
    return _recorded(stream)


def transfers_of(device: torch.device) -> Transfers:
    """The transfers of tiles between host memory and a compute device."""
    return GpuTransfers(CudaCopies(device)) if device.type == "cuda" else PlainTransfers(device)
