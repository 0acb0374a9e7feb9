"""Layouts: the meaning of a stored array's axes, and its conversion to a tensor ``(C, h, w)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcnn.data.sources.axes import Axes
from streamcnn.errors import DatasetMismatch
from streamcnn.geometry.regions import Region

_DROPPED = "."
_COLOURS = 4
"""Largest number of channels of a colour picture."""
_SHORTER = 8
"""Least ratio of rows and columns to an axis for that to be channels beyond doubt."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The axes of an array in its own order, a letter each.

    ``C``, ``Y`` and ``X`` are channels, rows and columns; of any other axis one plane is taken.
    """

    axes: str
    planes: tuple[int, ...] = ()
    """The plane to take of each axis; empty for the first planes."""

    def image_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Channels, height and width in pixels of an array of ``shape``."""
        extents = dict(zip(self.axes, shape, strict=True))
        return extents.get("C", 1), extents["Y"], extents["X"]

    def window(self, region: Region) -> tuple[slice | int, ...]:
        """The index of ``region`` in the array."""
        rows, cols = (slice(axis.start, axis.stop) for axis in region)
        parts: dict[str, slice] = {"C": slice(None), "Y": rows, "X": cols}
        planes = self.planes or (0,) * len(self.axes)
        return tuple(parts.get(axis, plane) for axis, plane in zip(self.axes, planes, strict=True))

    def channels_first(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """A view ``(C, h, w)`` of pixels that were indexed by `window`."""
        axes = [axis for axis in self.axes if axis in "CYX"]
        if "C" not in axes:
            pixels, axes = pixels[None], ["C", *axes]
        return pixels.transpose([axes.index(axis) for axis in "CYX"])


def layout_by_shape(name: str, shape: tuple[int, ...], channels_last: bool | None) -> Layout:
    """The layout of an array without named axes.

    Two axes are one channel. Of three, ``channels_last`` tells which are the channels. If that is None, they
    are the first or the last axis, if only this one is short enough: 4 or fewer where the other two have
    more, or at most an eighth of both others.

    Raises
    ------
    DatasetMismatch
        If there are fewer or more axes, the channels are uncertain, or ``channels_last`` is given without an
        axis of channels.
    """
    if len(shape) not in (2, 3):
        raise DatasetMismatch(
            f"{name} has {len(shape)} axes {shape}: allowed are (H, W), (C, H, W) and (H, W, C); "
            "store one image per array"
        )
    if len(shape) == 2:
        if channels_last is not None:
            raise no_channels(name, channels_last)
        return Layout("YX")
    if channels_last is None:
        channels_last = _are_channels_last(name, shape)
    return Layout("YXC" if channels_last else "CYX")


def _are_channels_last(name: str, shape: tuple[int, ...]) -> bool:
    first = _can_only_be_channels(shape[0], shape[1:])
    last = _can_only_be_channels(shape[2], shape[:2])
    if first == last:
        raise DatasetMismatch(
            f"{name} has 3 axes {shape} without names, which may be (C, H, W) or (H, W, C): give "
            "channels_last=False for the former, channels_last=True for the latter (--channels-first or "
            "--channels-last)"
        )
    return last


def _can_only_be_channels(extent: int, others: tuple[int, ...]) -> bool:
    return extent <= _COLOURS < min(others) or extent * _SHORTER <= min(others)


def layout_by_names(
    name: str,
    axes: Axes,
    shape: tuple[int, ...],
    *,
    channels_last: bool | None = None,
    index: Mapping[str, int] | None = None,
) -> Layout:
    """The layout of an array whose metadata names its axes.

    Parameters
    ----------
    name : name of the image in messages
    axes : one for each axis; rows and columns are required
        Others may be there with extent 1, such as time or depth.
    shape : extents of the array
    channels_last : whether the last or the first axis is the channels, if its name is unknown
        If a name means channels, this may only agree.
    index : plane to take of axes longer than 1, by name; None if no plane may be chosen

    Raises
    ------
    DatasetMismatch
        If rows or columns are missing, more than one other axis is longer than 1, there is no such axis or
        plane, or ``channels_last`` contradicts the names.
    """
    letters = [letter.upper() for letter in axes.letters]
    if len(letters) != len(shape) or letters.count("Y") != 1 or letters.count("X") != 1:
        raise DatasetMismatch(
            f"{name} has axes {', '.join(axes.names)} of extents {shape}: allowed are one y, one x and at "
            "most one of channels; store one image per array"
        )
    planes = _planes(name, axes, shape, index or {})
    kept = [
        letter if letter in "YX" or (extent != 1 and position not in planes) else _DROPPED
        for position, (letter, extent) in enumerate(zip(letters, shape, strict=True))
    ]
    others = [position for position, letter in enumerate(kept) if letter not in ("Y", "X", _DROPPED)]
    if len(others) == 1 and not _is_known(kept[others[0]]) and channels_last is not None:
        is_where_it_should_be = others[0] == (len(shape) - 1 if channels_last else 0)
        if is_where_it_should_be and not axes.is_never_channels(others[0]):
            kept[others[0]] = "C"
    if len(others) > 1 or not all(_is_known(kept[position]) for position in others):
        raise _several_planes(name, axes, shape, others, can_index=index is not None)
    if channels_last is not None:
        _check_told(name, axes.names, [*map(_or_known, kept, letters)], channels_last)
    return Layout(
        "".join("C" if letter == "S" else letter for letter in kept),
        tuple(planes.get(position, 0) for position in range(len(shape))) if planes else (),
    )


def _is_known(letter: str) -> bool:
    return letter in ("C", "S")


def _or_known(kept: str, letter: str) -> str:
    """The letter of an axis, also for a single channel, which the layout leaves out."""
    return letter if kept == _DROPPED and _is_known(letter) else kept


def _check_told(name: str, names: tuple[str, ...], letters: list[str], channels_last: bool) -> None:
    """Make sure that ``channels_last`` agrees with the axes.

    Raises
    ------
    DatasetMismatch
        If there are no channels, or the names of the axes contradict it.
    """
    channels = [position for position, letter in enumerate(letters) if _is_known(letter)]
    if not channels:
        raise no_channels(name, channels_last)
    places = letters.index("Y"), letters.index("X")
    is_first = all(position < min(places) for position in channels)
    is_last = all(position > max(places) for position in channels)
    if (channels_last and is_first) or (not channels_last and is_last):
        raise DatasetMismatch(
            f"{name} says that its axes are {', '.join(names)}, with the channels "
            f"{'first' if is_first else 'last'}: leave {told(channels_last)} out"
        )


def no_channels(name: str, channels_last: bool) -> DatasetMismatch:
    """The error for ``channels_last`` on an image without an axis of channels."""
    return DatasetMismatch(
        f"{name} has rows and columns and no axis of channels: leave {told(channels_last)} out"
    )


def told(channels_last: bool) -> str:
    """The option that was given, as in Python and on the command line."""
    return f"channels_last={channels_last} ({'--channels-last' if channels_last else '--channels-first'})"


def _planes(name: str, axes: Axes, shape: tuple[int, ...], index: Mapping[str, int]) -> dict[int, int]:
    """The planes to take, by position of the axes that ``index`` names."""
    names = [axis.lower() for axis in axes.names]
    planes = {}
    for axis, plane in index.items():
        if axis.lower() not in names:
            raise DatasetMismatch(
                f"{name} has no axis {axis!r} to take a plane of: allowed in index= are "
                f"{', '.join(axes.names)}"
            )
        position = names.index(axis.lower())
        if axes.letters[position].upper() in ("Y", "X"):
            raise DatasetMismatch(f"{name} needs all of its axis {axis!r}: leave it out of index=")
        if not 0 <= plane < shape[position]:
            raise DatasetMismatch(
                f"{name} has no plane {plane} along {axis!r}: allowed are 0..{shape[position] - 1}"
            )
        planes[position] = plane
    return planes


def _several_planes(
    name: str, axes: Axes, shape: tuple[int, ...], others: list[int], *, can_index: bool
) -> DatasetMismatch:
    long = " and ".join(f"{shape[position]} planes along {axes.names[position]!r}" for position in others)
    unknown = [position for position in others if not _is_known(axes.letters[position].upper())]
    advice = "store each plane as an image"
    if can_index:
        example = ", ".join(f"{axes.names[position]!r}: 0" for position in unknown or others[1:])
        advice = f"give index={{{example}}} to take one plane, or {advice}"
        if len(others) == 1 and not axes.is_never_channels(others[0]):
            is_last = others[0] == len(shape) - 1
            advice = f"give channels_last={is_last} if {axes.names[others[0]]!r} is the channels, {advice}"
    return DatasetMismatch(
        f"{name} has {long}: allowed is one axis of channels ('c' or 's'), every other of extent 1; {advice}"
    )


def torch_dtype(name: str, dtype: np.dtype[Any]) -> torch.dtype:
    """PyTorch's dtype for pixels of ``dtype`` in any byte order.

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
    """The pixels as a tensor of the same shape, copied if PyTorch cannot share their memory.

    PyTorch supports no foreign byte order, no negative strides and no read-only memory.
    """
    ready = np.require(pixels, dtype=pixels.dtype.newbyteorder("="), requirements=["C", "W"])
    # NumPy counts an axis of one pixel as contiguous for any stride, PyTorch not for a negative one.
    return torch.from_numpy(ready.copy() if any(stride < 0 for stride in ready.strides) else ready)
