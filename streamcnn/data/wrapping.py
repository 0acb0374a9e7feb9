"""Integers that do not fit their type: PyTorch goes on with what is left of them, without a word.

``tile * 2 - 255`` of bytes is such arithmetic. To find it, a function is called with pixels of all values,
and every operation of its own between integers is compared with the same one in float64.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_WATCHED = frozenset(
    "abs add addcmul copy cumprod cumsum mul neg pow prod rsub square sub sum _to_copy".split()
)
"""Operations of arithmetic and conversions, by PyTorch's names; those on bits may cut bits off."""
_MOST_VALUES = 256
"""Different values of a pixel that are tried."""
_MOST_CHANNELS = 64
"""Channels of which each is tried against the others."""
_RELATIVE = 1e-6
"""Error of float64 that counts as none; it has no more than 53 bits."""


class Wraps(Exception):
    """An operation whose result does not fit its type."""

    def __init__(self, operation: str, exact: float, got: float, dtype: torch.dtype) -> None:
        super().__init__(f"{operation} of {dtype} gives {got:.16g} where {exact:.16g} is meant")


def find_wrap(
    function: Callable[[Tensor], Tensor], channels: int, dtype: torch.dtype, values: tuple[int, int]
) -> Wraps | None:
    """What of a function's integer arithmetic does not fit its type, for pixels of ``dtype``.

    It is called with a tile (1, C, 1, K) on the CPU, whatever device it is meant for. Operations of NumPy and
    of compiled code are not seen.

    Parameters
    ----------
    function
        From a tile (N, C, h, w) to another one.
    channels, dtype
        Of the tile: how many there are, and the type of its pixels, integers.
    values
        The least and the largest value that pixels have.
    """
    pixels = torch.tensor(_pixels(*values, channels), dtype=torch.float64 if dtype.itemsize == 8 else None)
    tile = pixels.to(dtype).T.reshape(1, channels, 1, -1).contiguous()
    try:
        with _random_numbers_kept(), torch.no_grad(), _Watch():  # type: ignore[no-untyped-call]
            function(tile)
    except Wraps as found:
        return found
    except Exception:
        # These pixels stand for others: what fails with the image's own fails when it is given those.
        return None
    return None


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Run a block that leaves the generators as they are: a function may draw, and is only tried here."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _pixels(least: int, largest: int, channels: int) -> list[list[int]]:
    """Pixels with all values, or some of many, in all channels; and each channel against the others."""
    step = max(1, (largest - least) // (_MOST_VALUES - 1))
    pixels = [[value] * channels for value in (*range(least, largest, step), largest)]
    for channel in range(min(channels, _MOST_CHANNELS) if channels > 1 else 0):
        for one, others in ((least, largest), (largest, least)):
            pixels.append([one if each == channel else others for each in range(channels)])
    return pixels


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Carries out every operation on the CPU, and raises `Wraps` where an integer does not fit."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map(_on_cpu, (args, dict(kwargs or {})))
        name = func.overloadpacket.__name__.removesuffix("_") if func.namespace == "aten" else ""
        if name not in _WATCHED:
            return func(*args, **kwargs)
        before = tree_map(_wide, (args, {key: each for key, each in kwargs.items() if key != "dtype"}))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and is_integer(result.dtype):
            exact = before[0][1 if name == "copy" else 0] if name in ("_to_copy", "copy") else None
            if exact is None:
                exact = func(*before[0], **before[1])
            _compare(name, exact, result)
        return result


def _compare(name: str, exact: Tensor, result: Tensor) -> None:
    """Raise `Wraps` where a result is not the exact one, but for what conversions cut off on purpose."""
    got = result.to(torch.float64)
    wanted = exact.trunc().expand_as(got)
    differs = (wanted - got).abs() > _RELATIVE * wanted.abs() + 0.5
    if differs.any():
        at = int(differs.flatten().nonzero()[0])
        raise Wraps(name, float(wanted.flatten()[at]), float(got.flatten()[at]), result.dtype)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.cpu() if isinstance(value, Tensor) else value


def _wide(value: Any) -> Any:
    """A copy in float64, as the operation may change its operands."""
    return value.to(torch.float64, copy=True) if isinstance(value, Tensor) else value


def is_integer(dtype: torch.dtype) -> bool:
    """Whether numbers of a type are integers, of which bool is none."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
