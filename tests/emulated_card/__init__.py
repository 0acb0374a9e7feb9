"""A GPU that is host memory, so that the tests marked ``gpu`` run where there is none.

``card.cpp`` gives PyTorch a device "cuda:0" with memory, streams and a thread of its own for backward passes;
this module gives ``torch.cuda`` and ``pynvml`` what they ask of a driver. Copies take place as late as their
order allows, and what is freed is overwritten. What it cannot show is what only kernels of a GPU do: their
speed, their rounding, and races among computations.

``install`` has to come before anything imports PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, cast

from fake_nvml import Device, FakeNvml, Process
from filelock import FileLock

SOURCE = Path(__file__).parent / "card.cpp"
VARIABLE = "STREAMCNN_EMULATED_CARD"
"""Set in the environment, tests run on the emulated card."""
CONTEXT = 500 * 2**20
"""Bytes that the context takes, beside what the allocator holds."""
TOTAL = 16 * 2**30
UUID = "emulated"


def is_wanted() -> bool:
    return bool(os.environ.get(VARIABLE))


def interprets_kernels() -> bool:
    """Whether Triton's kernels run, under its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _built() -> Path:
    """The library, built unless it is there."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch_folder = Path(found.origin).parent
    version = (torch_folder / "version.py").read_bytes()
    key = hashlib.sha256(SOURCE.read_bytes() + version + str(torch_folder).encode()).hexdigest()[:16]
    library = Path(__file__).parents[2] / "build" / f"card-{key}.so"
    library.parent.mkdir(exist_ok=True)
    include, lib = torch_folder / "include", torch_folder / "lib"
    # Of several processes one builds it, which takes 20 seconds.
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            fresh = library.with_suffix(".fresh")
            subprocess.run(
                [
                    *("g++", "-O1", "-std=c++20", "-fPIC", "-shared", f"-I{include}"),
                    *(f"-I{include}/torch/csrc/api/include", str(SOURCE), f"-L{lib}", "-ltorch_cpu", "-lc10"),
                    *(f"-Wl,-rpath,{lib}", "-o", str(fresh)),
                ],
                check=True,
            )
            fresh.replace(library)
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded."""
    assert "torch" not in sys.modules, "PyTorch has been imported, and looks for no other device any more"
    loaded = ctypes.CDLL(str(_built()), ctypes.RTLD_GLOBAL)
    for name in ("new_stream", "current_stream", "mark"):
        getattr(loaded, f"card_{name}").restype = ctypes.c_int64
    loaded.card_set_fraction.argtypes = [ctypes.c_double]
    for name, count in {
        "set_stream": 1,
        "mark": 1,
        "wait": 3,
        "reach": 2,
        "is_reached": 2,
        "finish": 1,
        "register": 2,
        "unregister": 1,
        "set_total": 1,
        "set_beside": 1,
    }.items():
        getattr(loaded, f"card_{name}").argtypes = [ctypes.c_int64] * count
    loaded.card_set_total(TOTAL)
    loaded.card_set_beside(CONTEXT)
    return loaded


def statistics() -> SimpleNamespace:
    """Bytes and counts as the card has them now."""
    names = (
        *("allocated", "allocated_peak", "reserved", "reserved_peak", "num_retries", "num_refusals"),
        *("pinned", "pinned_peak", "num_waits", "num_operators"),
    )
    found = (ctypes.c_int64 * len(names))()
    library().card_statistics(found)
    return SimpleNamespace(**dict(zip(names, found, strict=True)))


class Stream:
    """As ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0, *, stream_id: int | None = None) -> None:
        import torch

        self.device = torch.device("cuda:0")
        self.priority = priority
        self.stream_id = library().card_new_stream() if stream_id is None else stream_id

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return bool(library().card_is_reached(self.stream_id, library().card_mark(self.stream_id)))

    def synchronize(self) -> None:
        library().card_finish(self.stream_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


class Event:
    """As ``torch.cuda.Event``."""

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        self._place: tuple[int, int] | None = None
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        number = current_stream().stream_id if stream is None else stream.stream_id
        self._place = number, library().card_mark(number)
        self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        if self._place is not None:
            library().card_wait((stream or current_stream()).stream_id, *self._place)

    def query(self) -> bool:
        return self._place is None or bool(library().card_is_reached(*self._place))

    def synchronize(self) -> None:
        if self._place is not None:
            library().card_reach(*self._place)

    def elapsed_time(self, end: Event) -> float:
        return max(1e-6, 1e3 * (end._seconds - self._seconds))


class StreamContext:
    """As ``torch.cuda.stream``."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self._before = 0

    def __enter__(self) -> None:
        self._before = library().card_current_stream()
        if self.stream is not None:
            library().card_set_stream(self.stream.stream_id)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        library().card_set_stream(self._before)


class DeviceContext:
    """As ``torch.cuda.device``, of one device."""

    def __init__(self, device: Any) -> None:
        self.idx = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def current_stream(device: Any = None) -> Stream:
    return Stream(stream_id=library().card_current_stream())


class _Runtime:
    """As what ``torch.cuda.cudart()`` returns."""

    def cudaHostRegister(self, place: int, nbytes: int, flags: int) -> int:
        return int(library().card_register(place, nbytes))

    def cudaHostUnregister(self, place: int) -> int:
        return int(library().card_unregister(place))


_properties = SimpleNamespace(
    name="Emulated card",
    major=9,
    minor=0,
    total_memory=TOTAL,
    multi_processor_count=4,
    uuid=UUID,
    L2_cache_size=2**20,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
)


class _Others:
    nbytes = 0


@contextmanager
def held_by_others(nbytes: int) -> Iterator[None]:
    """Have other processes hold ``nbytes`` of the card."""

    def hold(nbytes: int) -> None:
        _Others.nbytes = nbytes
        library().card_set_beside(CONTEXT + nbytes)

    hold(nbytes)
    try:
        yield
    finally:
        hold(0)


def _memory(device: Any = None) -> tuple[int, int]:
    """Bytes that are free, and all."""
    return TOTAL - CONTEXT - _Others.nbytes - statistics().reserved, TOTAL


class _Fraction:
    value = 1.0


def _set_fraction(fraction: float, device: Any = None) -> None:
    _Fraction.value = fraction
    library().card_set_fraction(fraction)


def _nested(device: Any = None) -> dict[str, Any]:
    found = statistics()
    if not found.reserved_peak:
        return {}
    return {
        "allocated_bytes": {"all": {"current": found.allocated, "peak": found.allocated_peak}},
        "reserved_bytes": {"all": {"current": found.reserved, "peak": found.reserved_peak}},
        "num_alloc_retries": found.num_retries,
        "num_ooms": found.num_refusals,
    }


def _pinned(device: Any = None) -> dict[str, Any]:
    found = statistics()
    return {"active_bytes.current": found.pinned, "active_bytes.peak": found.pinned_peak}


def install() -> None:
    """Give PyTorch the card. It stays until the process ends."""
    card = library()

    import torch

    started = False

    def start() -> None:
        nonlocal started
        started = True

    def stats_of(name: str) -> Any:
        return lambda device=None: getattr(statistics(), name)

    replacements: dict[str, Any] = {
        "_lazy_init": start,
        "init": start,
        "is_available": lambda: True,
        "is_initialized": lambda: started,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_is_in_bad_fork": lambda: False,
        "get_device_properties": lambda device=None: _properties,
        "get_device_name": lambda device=None: _properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": _memory,
        "memory_stats_as_nested_dict": _nested,
        "memory_allocated": stats_of("allocated"),
        "max_memory_allocated": stats_of("allocated_peak"),
        "memory_reserved": stats_of("reserved"),
        "max_memory_reserved": stats_of("reserved_peak"),
        "reset_peak_memory_stats": lambda device=None: card.card_reset_peaks(),
        "get_per_process_memory_fraction": lambda device=None: _Fraction.value,
        "set_per_process_memory_fraction": _set_fraction,
        "empty_cache": lambda: card.card_empty_cache(),
        "host_memory_stats": _pinned,
        "reset_peak_host_memory_stats": lambda device=None: card.card_reset_host_peaks(),
        "synchronize": lambda device=None: card.card_finish_all(),
        "Stream": Stream,
        "Event": Event,
        "stream": StreamContext,
        "StreamContext": StreamContext,
        "current_stream": current_stream,
        "default_stream": lambda device=None: Stream(stream_id=0),
        "device": DeviceContext,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "cudart": _Runtime,
        "check_error": lambda error: None,
    }
    for module in (torch.cuda, torch.cuda.memory, torch.cuda.random):
        for name, value in replacements.items():
            if hasattr(module, name):
                setattr(module, name, value)

    on_host = torch.Tensor.__deepcopy__

    def deep_copy(x: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        """Python's constructors of storages know no card."""
        if not x.is_cuda or id(x) in memo:
            return on_host(x, memo)
        memo[id(x)] = copied = x.detach().clone().requires_grad_(x.requires_grad)
        if x.grad is not None:
            copied.grad = deep_copy(x.grad, memo)
        return copied

    torch.Tensor.__deepcopy__ = deep_copy  # type: ignore[method-assign]

    # It would warn that there is no cuDNN.
    torch.backends.cudnn.is_acceptable = lambda tensor: False

    _add_operators()

    sys.modules["pynvml"] = cast(Any, _Nvml())


_operators: list[Any] = []
"""Libraries of operators, which PyTorch forgets with their objects."""


def _add_operators() -> None:
    """Batch norm's parts, which only a GPU has, in plain operators."""
    import torch

    def channels(value: Any) -> Any:
        return value[:, None, None]

    def update_stats(x: Any, running_mean: Any, running_var: Any, momentum: float) -> Any:
        assert running_mean is None
        assert running_var is None
        accumulated = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(accumulated, (0, 2, 3), correction=0)
        return mean, variance

    def elemt(x: Any, weight: Any, bias: Any, mean: Any, inverse: Any, eps: float) -> Any:
        y = (x - channels(mean)) * channels(inverse)
        y = y if weight is None else y * channels(weight)
        return (y if bias is None else y + channels(bias)).to(x.dtype)

    def reduce(
        gradient: Any,
        x: Any,
        mean: Any,
        inverse: Any,
        weight: Any,
        for_x: bool,
        for_weight: bool,
        for_bias: bool,
    ) -> Any:
        total = gradient.to(mean.dtype).sum((0, 2, 3))
        product = (gradient * (x - channels(mean))).sum((0, 2, 3))
        return (
            total if for_x else None,
            product if for_x else None,
            product * inverse if for_weight else None,
            total.clone() if for_bias else None,
        )

    def backward_elemt(
        gradient: Any, x: Any, mean: Any, inverse: Any, weight: Any, total: Any, product: Any, count: Any
    ) -> Any:
        number = count.sum()
        slope = product * inverse.square() / number
        found = gradient - channels(total / number) - (x - channels(mean)) * channels(slope)
        return (found * channels(inverse if weight is None else inverse * weight)).to(x.dtype)

    library = torch.library.Library("aten", "IMPL", "CUDA")
    library.impl("batch_norm_update_stats", update_stats)
    library.impl("batch_norm_elemt", elemt)
    library.impl("batch_norm_backward_reduce", reduce)
    library.impl("batch_norm_backward_elemt", backward_elemt)
    _operators.append(library)


class _Nvml(FakeNvml):
    """What ``pynvml`` says of the card."""

    def __init__(self) -> None:
        super().__init__(Device(f"GPU-{UUID}", total=TOTAL))

    def _enter(self, name: str) -> None:
        used = CONTEXT + statistics().reserved
        (card,) = self.devices
        card.used, card.processes = used + _Others.nbytes, [Process(os.getpid(), used)]
        super()._enter(name)
