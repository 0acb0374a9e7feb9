"""Detection of integer overflow, which in PyTorch silently wraps around.

An example is ``tile * 2 - 255`` of bytes. To detect it, we call a function with pixels of all values, and
compare each of its integer operations with the same operation in float64.
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
"""Arithmetic operations and conversions, by PyTorch's names; bit operations may drop bits on purpose."""
_MOST_VALUES = 256
"""Largest number of different values of a pixel that are tried."""
_MOST_CHANNELS = 64
"""Largest number of channels that are each tried against the others."""
_RELATIVE = 1e-6
"""Relative error that is attributed to float64, which has only 53 bits."""


class Wraps(Exception):
    """The result of an operation does not fit into its dtype."""

    def __init__(self, operation: str, exact: float, got: float, dtype: torch.dtype) -> None:
        super().__init__(f"{operation} of {dtype} gives {got:.16g} where {exact:.16g} is meant")


def find_wrap(
    function: Callable[[Tensor], Tensor], channels: int, dtype: torch.dtype, values: tuple[int, int]
) -> Wraps | None:
    """The first integer operation of a function that overflows for pixels of ``dtype``; None if none does.

    The function is called with a tile (1, C, 1, K) on the CPU, whatever its device. Operations of NumPy and
    of compiled code are not seen.

    Parameters
    ----------
    function
        Maps a tile (N, C, h, w) to another one.
    channels, dtype
        Number of the tile's channels, and the integer dtype of its pixels.
    values
        The smallest and the largest value of pixels.
    """
    pixels = torch.tensor(_pixels(*values, channels), dtype=torch.float64 if dtype.itemsize == 8 else None)
    tile = pixels.to(dtype).T.reshape(1, channels, 1, -1).contiguous()
    try:
        with _random_numbers_kept(), torch.no_grad(), _Watch():  # type: ignore[no-untyped-call]
            function(tile)
    except Wraps as found:
        return found
    except Exception:
        # These pixels are made up: a function that fails on the image's own pixels fails later, on these.
        return None
    return None


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Restore random generators after the block, as the function, which is only tried here, may draw."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _pixels(least: int, largest: int, channels: int) -> list[list[int]]:
    """Pixels with all values, or a sample of many, in all channels; and each channel against the others."""
    step = max(1, (largest - least) // (_MOST_VALUES - 1))
    pixels = [[value] * channels for value in (*range(least, largest, step), largest)]
    for channel in range(min(channels, _MOST_CHANNELS) if channels > 1 else 0):
        for one, others in ((least, largest), (largest, least)):
            pixels.append([one if each == channel else others for each in range(channels)])
    return pixels


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Carries out every operation on the CPU, and raises `Wraps` if an integer overflows."""

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
    """Raise `Wraps` if a result is not exact, except for what conversions truncate on purpose."""
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
    """Whether a dtype is an integer type, which bool is not."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
