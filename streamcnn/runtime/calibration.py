"""The hardware profile of this machine: measured once in a few seconds, kept in the user's cache folder.

The file's keys name the device, the element type and how it is multiplied, the number of threads, whether
blocks are kept, and PyTorch's version. Plans made with equal profiles are equal.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from streamcnn.ceiling.device import ceiling_for
from streamcnn.errors import RatesUnusable, StreamError
from streamcnn.plan.hardware import NOMINAL, HardwareProfile
from streamcnn.plan.storage import Tier
from streamcnn.runtime.rates import keeps_blocks, measured_rates
from streamcnn.support.atomic import replace_file
from streamcnn.support.cache import cache_folder
from streamcnn.support.documents import conform, parse_json, read_regular

VARIABLE = "STREAMCNN_CALIBRATION"
"""Environment variable: a file to keep profiles in, or "off" for the nominal one."""
_LEAST = 1e-18
"""The least plausible value of rates and seconds; the largest is its inverse."""
_METHOD = 9
"""Version of the measurements: profiles that were kept under an earlier version are measured again."""


def hardware_profile(device: torch.device, dtype: torch.dtype = torch.float32) -> HardwareProfile:
    """The hardware profile of ``device`` for convolutions in ``dtype``, from its file or measured now.

    If the environment variable ``STREAMCNN_CALIBRATION`` is ``off``, it is the nominal profile. Implausible
    rates, and those of a truncated file, are measured again. If nothing can be kept in the user's cache
    folder, this process measures for itself, and a warning says so.

    Raises
    ------
    RatesUnusable
        If the file that the variable names cannot be read or written, or is not a regular file.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice == "off":
        return NOMINAL["cuda" if device.type == "cuda" else "cpu"]
    key = hardware_key(device, dtype)
    if choice:
        return _kept(Path(choice).expanduser(), key, device, dtype)
    if key in _not_kept:
        return _not_kept[key]
    try:
        return _kept(_cache_file(), key, device, dtype)
    except RatesUnusable as error:
        warnings.warn(f"{error}. Until then each process measures them anew, for some seconds", stacklevel=2)
    _not_kept[key] = _measured(key, device, dtype)
    return _not_kept[key]


_not_kept: dict[str, HardwareProfile] = {}
"""Profiles that this process has measured and could not keep, by key."""


def _cache_file() -> Path:
    try:
        return cache_folder() / "rates.json"
    except RuntimeError as error:
        raise RatesUnusable(
            "cannot keep this machine's rates, since there is no home folder; name a file in the environment "
            f"variable {VARIABLE}, or set it to off"
        ) from error


def _kept(path: Path, key: str, device: torch.device, dtype: torch.dtype) -> HardwareProfile:
    """The rates in a file; if it has none, measure them and keep them there."""
    known = _read(path)
    rates = _rates(known.get(key), path)
    if rates is None:
        _check_writable(path)
        rates = _measured(key, device, dtype)
        _write(path, {**known, key: asdict(rates)})
    return rates


def _measured(key: str, device: torch.device, dtype: torch.dtype) -> HardwareProfile:
    rates = measured_rates(device, dtype, key)
    # Plans do not count memory that measuring has left cached.
    ceiling_for(device).empty_cache()
    return rates


def hardware_key(device: torch.device, dtype: torch.dtype) -> str:
    """A key of all that the rates depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    blocks = ", blocks kept" if keeps_blocks(device) else ""
    threads = torch.get_num_threads()
    element = str(dtype).removeprefix("torch.")
    if device.type == "cuda" and dtype == torch.float32:
        # Multiplied as TF32 it is several times as fast.
        cudnn: Any = torch.backends.cudnn
        element = f"{element} multiplied as {cudnn.conv.fp32_precision}"
    return f"{name}, {element}, {threads} threads{blocks}, method {_METHOD}, torch {torch.__version__}"


@functools.cache
def processor() -> str:
    """The processor's name; cached, since every pass asks for it."""
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
    """The content of a version of the file; cached, since every pass asks for it and it rarely changes."""
    try:
        content = read_regular(path, error=RatesUnusable)
        known = parse_json(content, path, error=_NoRates)
    except (FileNotFoundError, _NoRates):
        # Rates in a file that was cut off are measured again.
        return {}
    return known if isinstance(known, dict) else {}


def _check_writable(path: Path) -> None:
    """Check that a file can be written before spending seconds on its content."""
    with _usable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _write(path: Path, known: dict[str, Any]) -> None:
    with _usable(path):
        replace_file(path, json.dumps(known, indent=2), concurrent=True)


def _rates(values: Any, path: Path) -> HardwareProfile | None:
    """The rates of a file's entry; None if they are implausible."""
    try:
        known = conform(_Measured, values, path, error=_NoRates)
    except _NoRates:
        return None
    return HardwareProfile(**asdict(known))


class _NoRates(StreamError):
    """The file does not hold rates, so they are measured."""


@dataclass(frozen=True, slots=True)
class _Measured(HardwareProfile):
    """A profile in the file, with plausible rates for every tier."""

    def __post_init__(self) -> None:
        numbers = [self.dense_flops, self.grouped_flops, self.memory_bytes, self.fresh_bytes]
        numbers += [self.buffered_write_bytes, self.operator_seconds, *self.transfer_seconds.values()]
        numbers += [*self.read_bytes.values(), *self.write_bytes.values()]
        if not all(_LEAST <= number <= 1 / _LEAST for number in numbers):
            raise ValueError(f"allowed are rates and seconds of {_LEAST} to {1 / _LEAST}")
        if not set(self.read_bytes) == set(self.write_bytes) == set(self.transfer_seconds) == set(Tier):
            raise ValueError(f"allowed are rates of {', '.join(Tier)}")


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Turn the system's errors about the file into `RatesUnusable`."""
    try:
        yield
    except RatesUnusable:
        raise
    except OSError as error:
        raise RatesUnusable(
            f"cannot keep this machine's rates in {path}: {error.strerror}; name another file in the "
            f"environment variable {VARIABLE}, or set it to off"
        ) from error
