"""The ceiling on a GPU's memory: PyTorch's allocator is capped, and what the process holds is measured.

The budget is what the whole process may hold on the card: CUDA's context, loaded libraries, weights and
optimiser included. What lies outside PyTorch's allocator (the *overhead*) is measured, and the allocator
is capped at the rest, less a margin. The cap refuses before memory is taken; the measurement, which goes on
throughout a pass, finds what the cap cannot see.

The budget is not decided here; ``streamcnn.ceiling.nvml`` says where readings come from.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch

from streamcnn.ceiling.gauge import Gauge, Overhead
from streamcnn.ceiling.nvml import Nvml, Reading
from streamcnn.ceiling.rooms import Room
from streamcnn.ceiling.sampler import INTERVAL, Sampler
from streamcnn.errors import BudgetExceeded
from streamcnn.support.interrupts import cleaning_up, undoing
from streamcnn.support.units import format_bytes

MARGIN_BYTES = 2**27
"""Bytes left free below the budget, for kernels that are loaded only when they first run, after measuring."""
RESERVED_STEP = 2**26
"""Reserved bytes are rounded up to a multiple of this, so that a few bytes more need no new plan."""

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables with the user's settings of PyTorch's allocator."""

_OTHERS = " by other processes or kept back by set_per_process_memory_fraction"
_FREE_CARD = "end other processes on the card or raise that fraction"

idle_bytes: dict[str, int] = {}
"""By a device's UUID in NVML: bytes in use before this process had a CUDA context."""


class CudaLimit:
    """A ``with`` block in which the process may hold ``budget`` bytes on a card, all told.

    An allocation past the cap raises ``torch.OutOfMemoryError``. At the end of the block, and whenever
    ``check`` is called in it, measurements reveal memory that was taken past the cap.

    Parameters
    ----------
    gauge
        Reads and caps the card.
    budget
        Bytes; None measures only.
    interval
        Seconds between samples.

    Raises
    ------
    BudgetExceeded
        At the end, if nothing else was raised and the peak passed the budget.
    """

    def __init__(self, gauge: Gauge, budget: int | None, *, interval: float = INTERVAL) -> None:
        self._gauge = gauge
        self._budget = budget
        self._sampler = Sampler(gauge.read, interval)
        self._overhead: Overhead | None = None
        self._is_measuring = False
        self._is_shared = False
        self._final: Reading | None = None
        self._noted = 0
        """The most that the allocator held before another block reset its peak."""

    @property
    def peak_bytes(self) -> int | None:
        """The most that the process held on the device since entry, in bytes; None before that."""
        peak = self._peak()
        return None if peak is None else peak.nbytes

    @property
    def at_most_bytes(self) -> int | None:
        """The same as ``peak_bytes``: where samples missed a peak, the allocator's own is taken."""
        return self.peak_bytes

    @property
    def reading(self) -> str:
        """Name of the reading behind ``peak_bytes``."""
        peak = self._peak()
        return "unknown" if peak is None else peak.source.value

    @property
    def is_shared(self) -> bool:
        """Whether other blocks of this card were entered at the same time: the peak includes their memory."""
        return self._is_shared

    @property
    def samples(self) -> tuple[tuple[float, int], ...]:
        """NVML's known readings in order: ``time.perf_counter()`` in seconds, bytes."""
        return self._sampler.samples

    @property
    def num_samples(self) -> int:
        """How often NVML was asked, whether it knew an answer or not."""
        return self._sampler.num_asked

    def check(self) -> None:
        """Raise if the process has held more than the budget.

        Raises
        ------
        BudgetExceeded
            Naming the reading, the budget and what lies outside PyTorch's allocator.
        """
        peak = self._peak()
        if self._budget is None or peak is None or peak.nbytes <= self._budget:
            return
        assert self._overhead is not None
        raise BudgetExceeded(
            f"{format_bytes(peak.nbytes)} were held on {self._gauge.device} ({peak.source.value}), and the "
            f"budget is {format_bytes(self._budget)}; outside PyTorch's allocator there were "
            f"{format_bytes(self._overhead.nbytes)} when the pass began"
        )

    def __enter__(self) -> Self:
        return undoing(self._enter, self.close)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        cleaning_up(self.close, self.close)
        if error is None:
            self._sampler.raise_error()
            self.check()

    def close(self) -> None:
        """Lift the cap and end the measurement. Closing again does what an interrupt has left undone."""
        # Called in reverse, and each even if another one fails.
        with ExitStack() as closing:
            closing.callback(self._leave)
            closing.callback(self._measure_last)
            closing.callback(self._gauge.uncap, self)
            closing.callback(self._sampler.close)

    def _measure_last(self) -> None:
        if self._final is None and self._is_measuring:
            self._sampler.sample()
            self._final = self._peak()

    def _leave(self) -> None:
        while self in _active:
            _active.remove(self)

    def _enter(self) -> Self:
        self._overhead = self._gauge.overhead()
        others = [each for each in _active if each._gauge.device == self._gauge.device]
        if self._budget is not None:
            self._gauge.cap(self, self._budget - self._overhead.nbytes - MARGIN_BYTES)
        # After the cap, for which memory cached before the pass may have been given back.
        for other in others:
            other._note_peak()
            other._is_shared = True
        self._gauge.reset_peak()
        self._is_shared = bool(others)
        _active.append(self)
        self._sampler.start()
        self._is_measuring = True
        return self

    def _peak(self) -> Reading | None:
        """The largest sample, or the allocator's peak and the overhead if these are more."""
        if self._final is not None or self._overhead is None:
            return self._final
        overhead, sampled = self._overhead, self._sampler.peak
        reserved = max(self._noted, self._gauge.max_reserved())
        bound = Reading(reserved + overhead.nbytes, overhead.source)
        return bound if sampled is None or bound.nbytes > sampled.nbytes else sampled

    def _note_peak(self) -> None:
        """Bring the allocator's peak up to date, before another block resets it."""
        self._noted = max(self._noted, self._gauge.max_reserved())


_active: list[CudaLimit] = []
"""Entered blocks in order of entry. Those of one card share its peak, which is the process's."""


class CudaCeiling:
    """The limits of passes on one card, and what planning has to know of the card.

    Parameters
    ----------
    gauge
        Reads and caps the card.
    interval
        Seconds between samples.
    """

    def __init__(self, gauge: Gauge, *, interval: float = INTERVAL) -> None:
        self.gauge = gauge
        """Reads and caps the card."""
        self._interval = interval
        self._limit: CudaLimit | None = None
        self._num_seen = 0
        """The number of samples when the limit was checked last."""

    @property
    def baseline_bytes(self) -> int | None:
        """None: on a GPU the budget counts all that the process holds."""
        return None

    @property
    def room(self) -> Room:
        """What the card has for this process at present, with what it holds there already.

        What others take of it later is refused by the driver, as what this process takes past it.
        """
        total, nbytes = self.gauge.total, self.gauge.within_reach()
        name = f"the memory of {self.gauge.device}"
        return Room(nbytes, name, total, total - nbytes, _FREE_CARD, is_enforced=True, users=_OTHERS)

    @property
    def counts_code(self) -> bool:
        """False: compiled code is part of the reserved bytes."""
        return False

    def limit(self, budget: int | None, *, reuse_heap: bool = False, kept: int | None = None) -> CudaLimit:
        """The limit for one direction of a pass; ``reuse_heap`` and ``kept`` only concern host memory."""
        self._limit, self._num_seen = CudaLimit(self.gauge, budget, interval=self._interval), 0
        return self._limit

    def keep_blocks(self, nbytes: int) -> None:
        """Do nothing: PyTorch's allocator decides what it keeps."""

    def check(self, *, compiled: bool = True) -> None:
        """Raise ``BudgetExceeded`` if the limit in force has been passed, by compiled code too.

        It looks once for each sample that was taken. Looking takes as long as some launches, and a pass may
        have hundreds of tiles; whatever is missed meanwhile is still part of the peak at the next look.
        """
        if self._limit is not None and self._limit.num_samples != self._num_seen:
            self._num_seen = self._limit.num_samples
            self._limit.check()

    def empty_cache(self) -> None:
        """Return cached memory to the card, before a pass is begun again."""
        self.gauge.empty_cache()

    def reserved_bytes(self) -> int:
        """Bytes of a budget that a plan cannot have: overhead, live tensors and the margin, rounded up.

        Cached memory is left out, since the plan's own tensors take it.
        """
        held = self.gauge.overhead().nbytes + self.gauge.allocated() + MARGIN_BYTES
        return -(-held // RESERVED_STEP) * RESERVED_STEP


def cuda_ceiling(device: torch.device) -> CudaCeiling:
    """Load CUDA's context and libraries, and return a ceiling for ``device``.

    A device without an index is the current one.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    return CudaCeiling(gauge_of(torch.device(device.type, index)))


def record_idle_memory(*, cuda: Any = torch.cuda) -> None:
    """Remember what is in use on every card, while this process holds nothing there.

    This is how the process's memory is told from others' where NVML cannot see processes. Once PyTorch has a
    CUDA context it is too late, and nothing is done.
    """
    session = nvml_session()
    if session is not None and not cuda.is_initialized():
        idle_bytes.clear()
        idle_bytes.update(session.used_everywhere())


@functools.cache
def nvml_session() -> Nvml | None:
    """NVML, opened once; None where it is not there."""
    return Nvml.open()


@functools.cache
def gauge_of(device: torch.device) -> Gauge:
    """Load a card's context and libraries, and return its gauge."""
    let_segments_grow()
    warm_up(device)
    return Gauge(device, nvml_session(), idle_bytes)


def let_segments_grow(environ: Mapping[str, str] = os.environ, *, api: Any = torch._C) -> None:
    """Have PyTorch's allocator take memory in segments that grow, unless the user has settings for it.

    Otherwise each segment is as large as the tensor that it was taken for, and serves later ones badly: under
    11 GB a pass of ResNet-50 over 4000 x 4000 pixels was refused 246 MiB with 0.1 GB cached and nothing to
    give back, was planned again for 8.2 GB and held 10.9 all the same. With growing segments the same plan
    held 0.3 % more than its live tensors (torch 2.11, H100). The setting is the process's and stays.
    """
    # PyTorch 2.11 does not report settings that were made while the process ran.
    user_settings = getattr(api, "_accelerator_getAllocatorSettings", str)()
    if not user_settings and not any(environ.get(name) for name in ALLOCATOR_SETTINGS):
        api._accelerator_setAllocatorSettings("expandable_segments:True")


def warm_up(device: torch.device) -> None:
    """Load CUDA's context and the libraries of a CNN, by running a tiny one forward and backward.

    Random numbers, autocast and the grad mode are left as they are.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        image = torch.ones(2, 8, 32, 32, device=device, requires_grad=True)
        kernel, scale = torch.ones(8, 8, 3, 3, device=device), torch.ones(8, device=device)
        for x in (image, image.contiguous(memory_format=torch.channels_last)):
            y = torch.conv2d(x, kernel, None, 1, 1)
            y = torch.batch_norm(y, scale, scale, None, None, True, 0.1, 1e-5, torch.backends.cudnn.enabled)
            y = torch.relu(y).mean((2, 3)) @ torch.ones(8, 8, device=device)
            torch.autograd.grad(y.sum(), image)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
