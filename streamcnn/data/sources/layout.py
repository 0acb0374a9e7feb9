"""Which axis of a stored array is which, and how its pixels become a tensor ``(C, h, w)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcnn.errors import DatasetMismatch
from streamcnn.regions import Region

_DROPPED = "."


@dataclass(frozen=True, slots=True)
class Layout:
    """The axes of an array in its own order, one letter each.

    ``C``, ``Y`` and ``X`` are channels, rows and columns; any other is an axis of extent 1.
    """

    axes: str

    def image_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Channels, height and width in pixels of an array of ``shape``."""
        extents = dict(zip(self.axes, shape, strict=True))
        return extents.get("C", 1), extents["Y"], extents["X"]

    def window(self, region: Region) -> tuple[slice | int, ...]:
        """What to index the array with for ``region``."""
        rows, cols = (slice(axis.start, axis.stop) for axis in region)
        parts: dict[str, slice] = {"C": slice(None), "Y": rows, "X": cols}
        return tuple(parts.get(axis, 0) for axis in self.axes)

    def channels_first(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """A view ``(C, h, w)`` of what `window` cut out."""
        axes = [axis for axis in self.axes if axis in "CYX"]
        if "C" not in axes:
            pixels, axes = pixels[None], ["C", *axes]
        return pixels.transpose([axes.index(axis) for axis in "CYX"])


def layout_by_shape(name: str, shape: tuple[int, ...], channels_last: bool | None) -> Layout:
    """The layout of an array that does not say which axis is which.

    Two axes are one channel. Of three the last is the channels if ``channels_last`` says so or, where
    that is None, if it is shorter than the first.

    Raises
    ------
    DatasetMismatch
        If there are fewer or more axes.
    """
    if len(shape) not in (2, 3):
        raise DatasetMismatch(
            f"{name} has {len(shape)} axes {shape}: allowed are (H, W), (C, H, W) and (H, W, C); "
            "store one image per array"
        )
    if len(shape) == 2:
        return Layout("YX")
    if channels_last is None:
        channels_last = shape[2] < shape[0]
    return Layout("YXC" if channels_last else "CYX")


def layout_by_names(name: str, axes: Sequence[str], shape: tuple[int, ...]) -> Layout:
    """The layout of an array whose metadata names its axes.

    Parameters
    ----------
    name : what messages call the image
    axes : one name per axis; ``y`` and ``x`` are needed, ``c`` or ``s`` (samples) is the channels
        Any other may be there with extent 1, such as time or depth.

    Raises
    ------
    DatasetMismatch
        If rows or columns are missing, or more than one other axis is longer than 1.
    """
    letters = [axis.upper() for axis in axes]
    if len(letters) != len(shape) or letters.count("Y") != 1 or letters.count("X") != 1:
        raise DatasetMismatch(
            f"{name} has axes {', '.join(axes)} of extents {shape}: allowed are one y, one x and at most "
            "one of channels; store one image per array"
        )
    kept = [
        letter if letter in "YX" or extent != 1 else _DROPPED
        for letter, extent in zip(letters, shape, strict=True)
    ]
    others = [letter for letter in kept if letter not in ("Y", "X", _DROPPED)]
    if others not in ([], ["C"], ["S"]):
        long = {axis: n for axis, n in zip(axes, shape, strict=True) if axis.upper() in others}
        raise DatasetMismatch(
            f"{name} has {' and '.join(f'{n} planes along {axis!r}' for axis, n in long.items())}: allowed "
            "is one axis of channels ('c' or 's'), every other of extent 1; store each plane as an image"
        )
    return Layout("".join("C" if letter == "S" else letter for letter in kept))


def torch_dtype(name: str, dtype: np.dtype[Any]) -> torch.dtype:
    """PyTorch's type for pixels of ``dtype`` in any byte order.

    Raises
    ------
    DatasetMismatch
        If PyTorch has none.
    """
    try:
        return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError as error:
        raise DatasetMismatch(
            f"{name} has pixels of type {dtype}: allowed are the integers and floats that PyTorch has; "
            "convert the image"
        ) from error


def to_tensor(pixels: NDArray[Any]) -> Tensor:
    """The pixels as a tensor; PyTorch takes no foreign byte order and no memory that it may not write."""
    return torch.from_numpy(np.require(pixels, dtype=pixels.dtype.newbyteorder("="), requirements=["C", "W"]))
