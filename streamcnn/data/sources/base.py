"""The base classes of image sources, and the conversion of faults in files to errors.

An `ImageSource` knows an image's shape and dtype without reading pixels, and reads any region of it. It
neither converts nor normalises pixels; that is the model's ``preprocess``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcnn.data.sources.files import ProcessLock, reason
from streamcnn.data.sources.layout import to_tensor
from streamcnn.data.sources.placement import Placement
from streamcnn.data.sources.remote import trouble
from streamcnn.errors import CorruptImage, DatasetMismatch, StreamError
from streamcnn.geometry.regions import Region
from streamcnn.plan.reading import ReadingBytes, ReadingCost
from streamcnn.support.extras import MissingExtra


class ImageSource(ABC):
    """One image ``(C, H, W)`` that is read lazily.

    Subclasses implement `_read`. A source may be read by several threads at once, in a process that
    was forked from the one that made it, and can be pickled; a copy made by pickling opens its file
    again and starts counting at zero.

    Attributes
    ----------
    shape : tuple of three int
        Channels, height and width in pixels.
    dtype : torch.dtype
        Dtype of the pixels as stored.
    name : str
        Name of the image in messages, such as its path.
    largest : int or None
        Largest possible value of a pixel, which is below that of `dtype` if the file uses fewer bits;
        None for floats.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    name: str
    largest: int | None

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        name: str | None = None,
        *,
        largest: int | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.largest = largest_of(dtype) if largest is None else largest
        self.name = name if name is not None else f"an image of shape {shape}"
        self._bytes_read = 0
        self._count_lock = ProcessLock()

    @property
    def bytes_read(self) -> int:
        """Bytes of pixels handed out so far, decoded; a pixel read twice counts twice."""
        return self._bytes_read

    @property
    def placement(self) -> Placement:
        """Size and place of the pixels in the world, as far as the file has them."""
        return Placement(self.shape[1:])

    @property
    def shared_tensor(self) -> Tensor | None:
        """The caller's own tensor from which pixels are read, which the caller may change; else None."""
        return None

    @property
    def sample(self) -> bytes | None:
        """Some pixels of the caller's own array, which show whether it holds another image; else None.

        A change of a few pixels may go unnoticed, as an array, unlike a tensor, has no version counter.
        """
        return None

    # --- what reading takes --------------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        """Bytes of decoded pixels that the source keeps in memory now, without the caller's own."""
        return 0

    @property
    def pieces(self) -> str:
        """Text on the pieces that are decoded whole, such as "zarr chunks of 3 x 512 x 512"."""
        return f"pixels in a {type(self).__name__}"

    @final
    def reading_bytes(self, region_size: tuple[int, int]) -> ReadingBytes:
        """Host memory in bytes that reading regions of ``region_size`` (h, w) takes.

        ``held`` stays between reads until `release`: pixels that are decoded whole, a cache at its limit.
        ``transient`` comes on top while one region is read: the region itself, the chunks, tiles or strips
        that it touches, encoded and decoded, and the codec's copies.
        """
        return self.reading_cost.of(region_size)

    @property
    def reading_cost(self) -> ReadingCost:
        """`reading_bytes` for regions of any size, and the additional bytes of the first read."""
        channels, height, width = self.shape
        return ReadingCost((height, width), pixel=channels * self.dtype.itemsize)

    def start(self) -> None:
        """Start the threads that read the image, if any, before a limit on memory would count them."""
        return

    def release(self) -> None:
        """Release the pixels that `held_bytes` counts; the next read decodes them again."""
        return

    @final
    def read(self, region: Region) -> Tensor:
        """The pixels of ``region`` for all channels.

        Returns
        -------
        Tensor ``(C, h, w)`` of `dtype` on the CPU
            It may share the source's memory: copy it before writing to it.

        Raises
        ------
        ValueError
            If the region is not inside the image.
        CorruptImage
            If the pixels cannot be read or decoded.
        """
        _, height, width = self.shape
        if not Region.whole((height, width)).contains(region):
            raise ValueError(
                f"region {region} goes beyond the image: allowed is rows 0..{height}, cols 0..{width}"
            )
        pixels = self._read(region)
        assert pixels.shape == (self.shape[0], *region.size)
        assert pixels.dtype == self.dtype
        with self._count_lock:
            self._bytes_read += pixels.nbytes
        return pixels

    @abstractmethod
    def _read(self, region: Region) -> Tensor:
        """The pixels of a region, which lies inside the image."""


class FileSource(ImageSource):
    """An image in a file, a folder or an array; failures to read it become `CorruptImage`.

    Only a lack of memory and a package that is not installed raise errors of their own.

    Subclasses implement `_load`, and need not handle empty regions, byte order or messages.
    """

    @final
    def _read(self, region: Region) -> Tensor:
        if 0 in region.size:
            return torch.empty((self.shape[0], *region.size), dtype=self.dtype)
        try:
            pixels = self._load(region)
        except (MemoryError, MissingExtra):
            raise
        except Exception as error:  # each codec raises errors of its own
            rows, cols = region
            raise CorruptImage(
                f"cannot read rows {rows.start}..{rows.stop}, cols {cols.start}..{cols.stop} of "
                f"{self.name}: {_with_advice(error)}"
            ) from (None if "://" in self.name else error)
        return to_tensor(pixels)

    @abstractmethod
    def _load(self, region: Region) -> NDArray[Any]:
        """The pixels ``(C, h, w)`` of a region that is not empty, in any memory order and byte order."""


_HOW_TO_WRAP = (
    "wrap a tensor in TensorSource, a NumPy array in ArraySource (numpy.asarray of a PIL image, what "
    "rasterio or tifffile has read), a zarr array in ZarrSource, and open a file with open_image, all of "
    "them of streamcnn.data.sources"
)


def as_sources(image: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """The images of a batch as a list; all have to have one shape and dtype.

    Raises
    ------
    DatasetMismatch
        If there is no image, or one differs from the first.
    TypeError
        If ``image`` is neither a source nor a list, or an item is not an `ImageSource`.
    """
    # A list of these would have the keys, the letters or the rows.
    has_parts = isinstance(image, (Mapping, str, bytes)) or hasattr(image, "__array__")
    if not isinstance(image, ImageSource) and (has_parts or not isinstance(image, Iterable)):
        raise TypeError(
            f"the image is a {type(image).__name__}: allowed are a tensor (N, C, H, W), an ImageSource, and "
            f"a list of them; {_HOW_TO_WRAP}"
        )
    sources = [image] if isinstance(image, ImageSource) else list(image)
    if not sources:
        raise DatasetMismatch("a batch of 0 images: allowed are 1 and more")
    for position, source in enumerate(sources):
        if not isinstance(source, ImageSource):
            raise TypeError(
                f"image {position} of the batch is a {type(source).__name__}: allowed is an ImageSource; "
                f"{_HOW_TO_WRAP}"
            )
        if (source.shape, source.dtype) != (sources[0].shape, sources[0].dtype):
            raise DatasetMismatch(
                f"image {position} of the batch is {source.shape} {source.dtype} ({source.name}), image 0 is "
                f"{sources[0].shape} {sources[0].dtype} ({sources[0].name}): allowed is one shape and dtype; "
                "put images that differ into batches of their own; streamcnn train takes one at a time with "
                "--batch 1, and --accumulate 2 makes updates of two"
            )
        if source.largest != sources[0].largest:
            raise DatasetMismatch(
                f"{source.name} holds {source.dtype} up to {source.largest}, {sources[0].name} up to "
                f"{sources[0].largest}: allowed is one range of values in a batch; scale them to one"
            )
    return sources


def largest_of(dtype: torch.dtype) -> int | None:
    """The largest value of a dtype of pixels; None for floats."""
    if dtype == torch.bool:
        return 1
    return None if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max


def _with_advice(error: Exception) -> str:
    if isinstance(error, StreamError):  # our errors say what to do
        return str(error)
    if (why := trouble(error)) is not None:
        return why
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error}; see that the file is there and that you may read it"
    return f"{reason(error)}; the image is damaged there, write it again"
