"""Images in memory, or mapped into it: tensors, NumPy arrays and ``.npy`` files."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from streamcnn.data.sources.base import FileSource, ImageSource
from streamcnn.data.sources.files import FileStamp, check_shape, opening, regular
from streamcnn.data.sources.layout import layout_by_shape, torch_dtype
from streamcnn.data.sources.mapped import copied, lets_go, mapped_bytes
from streamcnn.data.sources.places import local_path
from streamcnn.errors import DatasetMismatch
from streamcnn.geometry.regions import Region
from streamcnn.plan.reading import ReadingCost

_SAMPLED = 32
"""Number of positions along each axis of an array that are sampled to detect changes."""


@final
class TensorSource(ImageSource):
    """An image in memory; regions are views of it.

    Parameters
    ----------
    tensor : Tensor ``(C, H, W)`` on the CPU
    """

    def __init__(self, tensor: Tensor) -> None:
        if tensor.ndim != 3:
            raise DatasetMismatch(
                f"image tensor has shape {tuple(tensor.shape)}: allowed is (C, H, W); "
                "wrap each image of a batch in a source of its own"
            )
        channels, height, width = tensor.shape
        shape = (channels, height, width)
        super().__init__(shape, tensor.dtype, f"a tensor of shape {shape}")
        self._tensor = tensor.detach()

    def __reduce__(self) -> tuple[type[TensorSource], tuple[Tensor]]:
        return TensorSource, (self._tensor,)

    @property
    def shared_tensor(self) -> Tensor:
        """The image."""
        return self._tensor

    @property
    def reading_cost(self) -> ReadingCost:
        """No cost, as regions are views."""
        return ReadingCost(self.shape[1:])

    def _read(self, region: Region) -> Tensor:
        rows, cols = region
        return self._tensor[:, rows.start : rows.stop, cols.start : cols.stop]


@final
class ArraySource(FileSource):
    """An image in a NumPy array, a memory map or a ``.npy`` file, which is mapped into memory.

    A copy made by pickling maps a file again; the pixels of an array without a file, or of a view of a memory
    map, are pickled with it.

    Parameters
    ----------
    array_or_path : array, or path of a ``.npy`` file
        Two axes ``(H, W)`` are one channel; three are ``(C, H, W)`` or ``(H, W, C)``.
    channels_last : bool, optional
        Which of the two a three-axis array is. By default the shape decides, if it leaves no doubt: there are
        4 channels or fewer and more of all else, or at most an eighth of rows and columns.

    Raises
    ------
    CorruptImage
        If there is no ``.npy`` file at the path, or it is damaged or cut short.
    DatasetMismatch
        If the array has another number of axes or its channels are uncertain, or PyTorch lacks its dtype.
    """

    def __init__(
        self, array_or_path: NDArray[Any] | str | Path, *, channels_last: bool | None = None
    ) -> None:
        self._origin = array_or_path
        self._requested_layout = channels_last
        if isinstance(array_or_path, np.ndarray):
            self._array = array_or_path
            name = f"an array of shape {array_or_path.shape}"
        else:
            name = str(array_or_path)
            with opening(name, ".npy file"):
                regular(where := local_path(name))
                self._array = np.lib.format.open_memmap(where, mode="r")
        self._stamp = _stamp(self._array)
        self._layout = layout_by_shape(name, self._array.shape, channels_last)
        shape = self._layout.image_shape(self._array.shape)
        check_shape(name, shape)
        super().__init__(shape, torch_dtype(name, self._array.dtype), name)

    def __reduce__(self) -> tuple[object, ...]:
        origin = self._origin
        return _remade, (_mapping(origin) if _is_whole_map(origin) else origin, self._requested_layout)

    @property
    def sample(self) -> bytes | None:
        """Some pixels of an array in memory; None for a file, which has a stamp."""
        if self._stamp is not None:
            return None
        steps = (-(-extent // _SAMPLED) for extent in self._array.shape)
        return self._array[tuple(slice(None, None, step) for step in steps)].tobytes()

    @property
    def pieces(self) -> str:
        """Text that there are no pieces."""
        return "an array in one piece, of which the pages under a region are read"

    @property
    def reading_cost(self) -> ReadingCost:
        """The copy of the region, and a band of a mapped file's pages."""
        channels, height, width = self.shape
        fixed = mapped_bytes(self._array, self._layout) if lets_go(self._array) else 0
        return ReadingCost((height, width), pixel=channels * self.dtype.itemsize, fixed=fixed)

    def _load(self, region: Region) -> NDArray[Any]:
        if self._stamp is not None:  # touching a page beyond the end of a file kills the process
            self._stamp.check()
        if lets_go(self._array):
            return copied(self._array, self._layout, region)
        return self._layout.channels_first(self._array[self._layout.window(region)])


class _Mapping(NamedTuple):
    """Data with which a file is mapped again."""

    filename: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    order: str


def _stamp(array: NDArray[Any]) -> FileStamp | None:
    filename = getattr(array, "filename", None)
    return FileStamp.of(filename) if isinstance(array, np.memmap) and filename is not None else None


def _is_whole_map(origin: object) -> bool:
    """Whether an array is a whole memory map; a view has the file's name and offset, but not its place."""
    return (
        isinstance(origin, np.memmap) and origin.filename is not None and isinstance(origin.base, mmap.mmap)
    )


def _mapping(array: Any) -> _Mapping:
    order = "C" if array.flags["C_CONTIGUOUS"] else "F"
    return _Mapping(str(array.filename), array.dtype, array.offset, array.shape, order)


def _remade(origin: NDArray[Any] | str | Path | _Mapping, channels_last: bool | None) -> ArraySource:
    if isinstance(origin, _Mapping):
        name, dtype, offset, shape, order = origin
        with opening(name, "memory-mapped array"):
            origin = np.memmap(name, dtype, "r", offset, shape, "C" if order == "C" else "F")
    return ArraySource(origin, channels_last=channels_last)
