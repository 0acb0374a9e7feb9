"""Measure a machine's rates on the kinds of work that networks do.

Convolutions, and a batch norm with its activation, are timed forward and backward, as plans count them. Fresh
memory from the operating system, small operators, and the stores, through the store classes themselves, are
timed too.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from streamcnn.ceiling.kept_blocks import KeptBlocks, give_back, kept_blocks_available
from streamcnn.geometry.regions import Interval, Region
from streamcnn.plan.hardware import NOMINAL, HardwareProfile
from streamcnn.plan.storage import Tier
from streamcnn.stores import (
    GpuTransfers,
    HostStore,
    MemoryStore,
    SparePinned,
    SpillFolder,
    Store,
    StoreSpec,
    Transfers,
    ZarrStore,
    transfers_of,
)

_REPEATS = 4
_ENOUGH = 0.5
"""Seconds after which work is not timed again: work that takes that long is not slow only the first time."""
_INTERPRETED = 20
"""Cost of an operator on a tile, with look-up and cropping of operands, over a small operator's alone."""
_MAP = (1, 64, 512, 512)
"""Shape of the map that is moved: 64 MiB of float32, more than most caches hold."""
_BANDS = tuple(Region(Interval(top, top + 128), Interval(0, _MAP[3])) for top in range(0, _MAP[2], 128))
"""The regions that are moved one at a time: 16 MiB each, a tile of usual size."""
_LARGE = 2**24
"""Elements of a map that fits into no cache."""
_SMALL = Region(Interval(8, 12), Interval(8, 12))
"""A region with next to nothing to move."""
_FLUSHED_BYTES = 2**27
"""Bytes that are written through to the disk to time it."""
_PASSES = 3
"""Arithmetic of a convolution's two passes over its forward pass: one more product for each operand."""


@dataclass(frozen=True, slots=True)
class _Convolution:
    """A layer that is timed, whose output has as many rows and columns as its input."""

    weight: tuple[int, int, int, int]
    groups: int = 1

    @property
    def padding(self) -> tuple[int, int]:
        """Padding on either side of rows and columns."""
        return self.weight[2] // 2, self.weight[3] // 2


_DENSE = (_Convolution((64, 64, 3, 3)), _Convolution((256, 64, 1, 1)), _Convolution((64, 256, 1, 1)))
"""The layers of a ResNet's bottleneck."""
_DEPTHWISE = (_Convolution((64, 1, 3, 3), groups=64), _Convolution((64, 1, 5, 5), groups=64))


@dataclass(frozen=True, slots=True)
class _Work:
    """Amounts of work that are timed at once."""

    normalised: int
    """Bytes of the map that is normalised."""
    convolved: int
    """Bytes of a map of 64 channels that is convolved."""
    times: int
    """How often the work is queued before waiting for the device."""


_GPU_WORK = _Work(2**27, 2**25, 8)
"""Enough work that a GPU computes longer than launching takes, on more data than its cache holds."""
_OTHER_WORK = _Work(2**24, 2**22, 1)


def measured_rates(device: torch.device, dtype: torch.dtype, source: str) -> HardwareProfile:
    """Measure the rates of ``device`` in ``dtype`` and of its stores; takes a few seconds and some 300 MB,
    on a GPU 700.

    The random numbers that the caller draws later do not change.
    """
    fresh = _fresh(device)
    # Without autocast: the rates are kept, and later passes may not cast.
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        _kept_blocks(device),
    ):
        work = _GPU_WORK if device.type == "cuda" else _OTHER_WORK
        memory = _memory_rate(device, dtype, work)
        dense, depthwise = (
            _flops_rate(device, dtype, work, layers, memory) for layers in (_DENSE, _DEPTHWISE)
        )
        tiny = torch.rand(1, 8, 4, 4, device=device, dtype=dtype)
        small = _seconds(device, lambda: [torch.add(tiny, 1.0) for _ in range(100)]) / 100
        read, written, transfers = _stores(device, work, memory, fresh)
    with SpillFolder() as folder:
        flushed = _flushed(folder.path / "flushed")
    return HardwareProfile(
        source=source,
        dense_flops=dense,
        grouped_flops=depthwise,
        memory_bytes=memory,
        fresh_bytes=fresh,
        operator_seconds=_INTERPRETED * small,
        read_bytes=read,
        # Many maps exceed what RAM buffers.
        write_bytes={**written, Tier.DISK: min(written[Tier.DISK], flushed)},
        buffered_write_bytes=written[Tier.DISK],
        transfer_seconds=transfers,
    )


_Rates = dict[Tier, float]


@contextmanager
def _kept_blocks(device: torch.device) -> Iterator[None]:
    """Take tensors from kept blocks, as a pass does where it can."""
    if not keeps_blocks(device):
        yield
        return
    blocks = KeptBlocks()
    blocks.enter()
    try:
        yield
    finally:
        blocks.leave()
        give_back()


def keeps_blocks(device: torch.device) -> bool:
    """Whether passes on ``device`` take their tensors from kept blocks."""
    return device.type == "cpu" and kept_blocks_available()


def _random(device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A map or a weight, channels_last on a GPU, as in a model set up for speed."""
    order = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return torch.rand(shape, device=device, dtype=dtype).contiguous(memory_format=order)


def _map(device: torch.device, dtype: torch.dtype, channels: int, nbytes: int) -> Tensor:
    """A square map of one image; ``nbytes`` are those of 64 of its channels."""
    edge = math.isqrt(nbytes // (64 * dtype.itemsize))
    return _random(device, dtype, (1, channels, edge, edge))


def _memory_rate(device: torch.device, dtype: torch.dtype, work: _Work) -> float:
    """Bytes per second that a batch norm and its activation read and write, forward and backward."""
    x = _map(device, dtype, 64, work.normalised).requires_grad_()
    # Autocast casts maps and not scales.
    scale, shift = (
        torch.ones(64, device=device, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        for _ in range(2)
    )

    def both_passes() -> None:
        with torch.enable_grad():
            y = torch.relu(F.batch_norm(x, None, None, scale, shift, training=True))
        torch.autograd.grad(y, (x, scale, shift), y.detach())

    return 2 * _PASSES * 2 * x.nbytes / _seconds(device, both_passes, times=work.times)


def _flops_rate(
    device: torch.device, dtype: torch.dtype, work: _Work, layers: Sequence[_Convolution], memory: float
) -> float:
    """Operations per second of convolutions, forward and backward, without reading and writing their maps.

    Parameters
    ----------
    memory
        Bytes per second at which maps are read and written.
    """
    flops = total = moved = 0.0
    for layer in layers:
        x = _map(device, dtype, layer.groups * layer.weight[1], work.convolved).requires_grad_()
        weight = _random(device, dtype, layer.weight).requires_grad_()
        y = torch.conv2d(x, weight, padding=layer.padding, groups=layer.groups)
        total += _seconds(device, partial(_both_passes, layer, x, weight, y), times=work.times)
        flops += _PASSES * 2 * weight[0].numel() * y.numel()
        moved += _PASSES * (x.nbytes + y.nbytes) / memory
    # Small maps stay in caches, so the time of moving them may be overestimated.
    return flops / max(total - moved, total / 2)


def _both_passes(layer: _Convolution, x: Tensor, weight: Tensor, gradient: Tensor) -> None:
    with torch.enable_grad():
        y = torch.conv2d(x, weight, padding=layer.padding, groups=layer.groups)
    torch.autograd.grad(y, (x, weight), gradient)


def _stores(device: torch.device, work: _Work, memory: float, fresh: float) -> tuple[_Rates, _Rates, _Rates]:
    """By tier: bytes per second read from a store, bytes per second written, and seconds of a small transfer.

    A store in the device's memory hands out views, which operators make contiguous. It takes fresh memory
    unless blocks are kept.
    """
    spec = StoreSpec(_MAP, torch.float32, (2, 3))
    moved, pinned = transfers_of(device), SparePinned()
    read, written, transfers = _Rates(), _Rates(), _Rates()
    with SpillFolder() as folder:
        tiers: dict[Tier, Callable[[], Store]] = {
            Tier.MEMORY: lambda: MemoryStore(spec, device, zeroed=not keeps_blocks(device)),
            Tier.HOST: lambda: _host_store(spec, moved, pinned),
            Tier.DISK: lambda: ZarrStore(spec, folder.new_folder(), _BANDS[0].size, moved),
        }
        for tier, new in tiers.items():
            # A map beside a GPU is mostly written once; overwriting is slower.
            once = tier is Tier.HOST and isinstance(moved, GpuTransfers)
            read[tier], written[tier], transfers[tier] = _store(device, work, new, once=once)
    read[Tier.MEMORY] = memory
    if not keeps_blocks(device):
        written[Tier.MEMORY] = 1 / (1 / memory + 1 / fresh)
    return read, written, transfers


def _host_store(spec: StoreSpec, transfers: Transfers, pinned: SparePinned) -> Store:
    """A store in host RAM, which is the device's own memory where the host computes."""
    if isinstance(transfers, GpuTransfers):
        return HostStore(spec, transfers, pinned)
    return MemoryStore(spec, transfers.compute_device)


def _flushed(path: Path) -> float:
    """Bytes per second that reach the disk under ``path``."""
    block = bytes(_FLUSHED_BYTES)
    start = time.perf_counter()
    with path.open("wb") as file:
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return len(block) / (time.perf_counter() - start)


def _store(
    device: torch.device, work: _Work, new: Callable[[], Store], *, once: bool
) -> tuple[float, float, float]:
    """Bytes per second read from and written to one store, and seconds of a small transfer.

    With ``once`` each map is written once, to a store of its own.
    """

    def write(store: Store) -> None:
        for band in _BANDS:
            store.write(band, tile)

    def write_new() -> None:
        with closing(new()) as other:
            write(other)

    def read() -> None:
        for band in _BANDS:
            store.read(band).clone()

    with closing(new()) as store:
        nbytes = store.spec.nbytes
        tile, small = (torch.rand(store.spec.tile_shape(part), device=device) for part in (_BANDS[0], _SMALL))
        write(store)
        writing = _seconds(device, write_new if once else partial(write, store))
        reading = _seconds(device, read)
        # Small transfers are queued ahead, like operators.
        adding = _seconds(device, lambda: store.add(_SMALL, small), times=work.times)
        fetching = _seconds(device, lambda: store.read(_SMALL).clone(), times=work.times)
    return nbytes / reading, nbytes / writing, (adding + fetching) / 2


def _fresh(device: torch.device) -> float:
    """Bytes per second at which the process gets new memory, without the cost of writing to it."""
    if device.type == "cuda":
        # PyTorch caches blocks, so none is new after the first tiles.
        return NOMINAL["cuda"].fresh_bytes
    known = torch.zeros(_LARGE)
    new_seconds = _seconds(device, lambda: torch.empty(_LARGE).fill_(1.0))
    known_seconds = _seconds(device, lambda: known.fill_(1.0))
    return known.nbytes / max(new_seconds - known_seconds, 0.1 * known_seconds)


def _seconds(device: torch.device, action: Callable[[], object], *, times: int = 1) -> float:
    """Seconds of an action at its fastest, as other work of the machine can only make it slower.

    The action is queued ``times`` times before waiting for the device.
    """
    if device.type == "cuda":
        # Libraries and kernels are loaded when they first run, which may take seconds.
        action()
        torch.cuda.synchronize(device)
    seconds = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        for _ in range(times):
            action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - start) / times)
        if seconds[-1] > _ENOUGH:
            break
    return min(seconds)
