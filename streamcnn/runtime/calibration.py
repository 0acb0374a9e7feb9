"""The hardware profile of this machine: measured once in a few seconds, kept in the user's cache folder.

What is measured is what plans are made of: a dense and a depthwise convolution, a pointwise operator, new
memory from the operating system, small operators, and the stores, through the store classes themselves. The
file is keyed by device, element type, number of threads, whether blocks are kept, and PyTorch's version;
plans made with equal profiles are equal.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from streamcnn.ceiling.device import ceiling_for
from streamcnn.ceiling.kept_blocks import KeptBlocks, give_back, kept_blocks_available
from streamcnn.errors import RatesUnusable, StreamError
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
from streamcnn.support.atomic import replace_file
from streamcnn.support.cache import cache_folder
from streamcnn.support.documents import conform, parse_json, read_regular

VARIABLE = "STREAMCNN_CALIBRATION"
"""Environment variable: a file to keep profiles in, or "off" for the nominal one."""
_LEAST = 1e-18
"""Of all rates and seconds; one over it is the most."""
_METHOD = 5
"""Counts up when what is timed changes: profiles that an earlier version kept are then measured again."""
_REPEATS = 4
_INTERPRETED = 20
"""What an operator on a tile costs over a small operator alone: it is looked up, its operands are cut."""
_TILE = (1, 64, 256, 256)
"""The map that is timed: 16 MiB of float32, a tile of usual size."""
_LARGE = 2**24
"""Elements of a map that no cache holds."""
_SMALL = Region(Interval(8, 12), Interval(8, 12))
"""A region that is hardly anything to move."""
_FLUSHED_BYTES = 2**27
"""Bytes that are written through to the disk, to see how fast it is."""


def hardware_profile(device: torch.device, dtype: torch.dtype = torch.float32) -> HardwareProfile:
    """The hardware profile of ``device`` for convolutions in ``dtype``: that kept for it, or measured now and
    kept.

    With the environment variable ``STREAMCNN_CALIBRATION`` set to ``off`` it is the nominal one. Rates in
    the file that are none, such as those of a file that was cut off, are measured again.

    Raises
    ------
    RatesUnusable
        If the file cannot be read or written, or is no regular file.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice == "off":
        return NOMINAL["cuda" if device.type == "cuda" else "cpu"]
    path = Path(choice) if choice else cache_folder() / "rates.json"
    key = hardware_key(device, dtype)
    known = _read(path)
    rates = _rates(known.get(key), path)
    if rates is None:
        rates = calibrate(device, dtype)
        # Plans do not know of memory that was kept after it.
        ceiling_for(device).empty_cache()
        _write(path, {**known, key: asdict(rates)})
    return rates


def calibrate(device: torch.device, dtype: torch.dtype = torch.float32) -> HardwareProfile:
    """Measure the rates of ``device`` in ``dtype`` and of its stores; takes a few seconds and some 300 MB.

    Random numbers that the caller draws later are as if nothing had been measured.
    """
    fresh = _fresh(device)
    # Rates are kept: that the first pass casts is no matter to the next one.
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        _kept_blocks(device),
    ):
        # Where kernels for channels_last are the fast ones, whoever minds the time has his model so.
        order = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        channels = _TILE[1]
        x, dense, depthwise = (
            torch.rand(shape, device=device, dtype=dtype).contiguous(memory_format=order)
            for shape in (_TILE, (channels, channels, 3, 3), (channels, 1, 3, 3))
        )
        tiny = torch.rand(1, 8, 4, 4, device=device, dtype=dtype)
        window = 2 * 9 * x.numel()
        dense_seconds = _seconds(device, lambda: torch.conv2d(x, dense, padding=1))
        grouped_seconds = _seconds(device, lambda: torch.conv2d(x, depthwise, padding=1, groups=channels))
        large, out = torch.zeros(2, _LARGE, device=device, dtype=dtype)
        pointwise = _seconds(device, lambda: torch.add(large, 1.0, out=out))
        small = _seconds(device, lambda: [torch.add(tiny, 1.0) for _ in range(100)]) / 100
        memory = 2 * large.nbytes / pointwise
        read, written, transfers = _stores(device, memory, fresh)
    return HardwareProfile(
        source=hardware_key(device, dtype),
        dense_flops=window * channels / dense_seconds,
        grouped_flops=window / grouped_seconds,
        memory_bytes=memory,
        fresh_bytes=fresh,
        operator_seconds=_INTERPRETED * small,
        read_bytes=read,
        write_bytes=written,
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


def _stores(device: torch.device, memory: float, fresh: float) -> tuple[_Rates, _Rates, _Rates]:
    """Bytes per second read from and written to a store at every place, and seconds of a small transfer.

    A store in the device's memory hands out views, which operators make contiguous, and takes new memory.
    """
    spec = StoreSpec(_TILE, torch.float32, (2, 3))
    moved, pinned = transfers_of(device), SparePinned()
    read, written, transfers = _Rates(), _Rates(), _Rates()
    with SpillFolder() as folder:
        tiers: dict[Tier, Callable[[], Store]] = {
            Tier.MEMORY: lambda: MemoryStore(spec, device),
            Tier.HOST: lambda: _host_store(spec, moved, pinned),
            Tier.DISK: lambda: ZarrStore(spec, folder.new_folder(), _TILE[2:], moved),
        }
        for tier, new in tiers.items():
            read[tier], written[tier], transfers[tier] = _store(device, new())
        # Maps soon outgrow what the kernel buffers.
        written[Tier.DISK] = min(written[Tier.DISK], _flushed(folder.path / "flushed"))
    read[Tier.MEMORY], written[Tier.MEMORY] = memory, 1 / (1 / memory + 1 / fresh)
    return read, written, transfers


def _host_store(spec: StoreSpec, transfers: Transfers, pinned: SparePinned) -> Store:
    """A map in host RAM, which is the device's own memory where the host computes."""
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


def _store(device: torch.device, store: Store) -> tuple[float, float, float]:
    """Bytes per second read from and written to one store, and seconds of a small transfer; it is closed."""
    tile, whole = torch.rand(_TILE, device=device), Region.whole(store.spec.size)
    small = torch.rand(store.spec.tile_shape(_SMALL), device=device)
    writing = _seconds(device, lambda: store.write(whole, tile))
    reading = _seconds(device, lambda: store.read(whole).clone())
    adding = _seconds(device, lambda: store.add(_SMALL, small))
    fetching = _seconds(device, lambda: store.read(_SMALL).clone())
    store.close()
    return tile.nbytes / reading, tile.nbytes / writing, (adding + fetching) / 2


def _fresh(device: torch.device) -> float:
    """Bytes per second of memory that is new to the process, beyond what writing them costs."""
    if device.type == "cuda":
        # Blocks are cached by PyTorch: after the first tiles none is new.
        return NOMINAL["cuda"].fresh_bytes
    known = torch.zeros(_LARGE)
    new_seconds = _seconds(device, lambda: torch.empty(_LARGE).fill_(1.0))
    known_seconds = _seconds(device, lambda: known.fill_(1.0))
    return known.nbytes / max(new_seconds - known_seconds, 0.1 * known_seconds)


def _seconds(device: torch.device, action: Callable[[], object]) -> float:
    """Seconds of an action at its fastest: whatever else the machine does only adds to them."""
    seconds = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def hardware_key(device: torch.device, dtype: torch.dtype) -> str:
    """What the rates depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    blocks = ", blocks kept" if keeps_blocks(device) else ""
    threads = torch.get_num_threads()
    element = str(dtype).removeprefix("torch.")
    return f"{name}, {element}, {threads} threads{blocks}, method {_METHOD}, torch {torch.__version__}"


@functools.cache
def processor() -> str:
    """The processor's name; asked for by every pass."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _read(path: Path) -> dict[str, Any]:
    with _usable(path):
        try:
            state = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return _parsed(path, state.st_mtime_ns, state.st_size, state.st_ino)


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, *version: int) -> dict[str, Any]:
    """What a version of the file says: passes ask one after the other, and it hardly ever changes."""
    try:
        content = read_regular(path, error=RatesUnusable)
        known = parse_json(content, path, error=_NoRates)
    except (FileNotFoundError, _NoRates):
        # A cache that was cut off is measured again.
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, Any]) -> None:
    with _usable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(known, indent=2), concurrent=True)


def _rates(values: Any, path: Path) -> HardwareProfile | None:
    """Rates as the file has them; None where they are none."""
    try:
        known = conform(_Measured, values, path, error=_NoRates)
    except _NoRates:
        return None
    return HardwareProfile(**asdict(known))


class _NoRates(StreamError):
    """What the file holds are no rates; they are measured then."""


@dataclass(frozen=True, slots=True)
class _Measured(HardwareProfile):
    """A profile in the file: of rates that there may be, for every tier."""

    def __post_init__(self) -> None:
        numbers = [self.dense_flops, self.grouped_flops, self.memory_bytes, self.fresh_bytes]
        numbers += [self.operator_seconds, *self.transfer_seconds.values()]
        numbers += [*self.read_bytes.values(), *self.write_bytes.values()]
        if not all(_LEAST <= number <= 1 / _LEAST for number in numbers):
            raise ValueError(f"allowed are rates and seconds of {_LEAST} to {1 / _LEAST}")
        if not set(self.read_bytes) == set(self.write_bytes) == set(self.transfer_seconds) == set(Tier):
            raise ValueError(f"allowed are rates of {', '.join(Tier)}")


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Turn what the system says of the file into one error."""
    try:
        yield
    except RatesUnusable:
        raise
    except OSError as error:
        raise RatesUnusable(
            f"cannot keep this machine's rates in {path}: {error.strerror}; name another file in the "
            f"environment variable {VARIABLE}, or set it to off"
        ) from error
