"""Maps that are further inputs of a model, such as masks, read region by region from sources."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamcnn.data.source_batch import SourceBatch
from streamcnn.data.sources import ImageSource, as_sources
from streamcnn.data.wrapping import is_integer
from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import Axes


class MapReader(SourceBatch):
    """A batch of maps of one shape, as a model takes them.

    Sources with one channel give (N, H, W), as losses expect for classes and weights of pixels; with several,
    (N, C, H, W). Integers become int64; other dtypes stay as stored.

    Attributes
    ----------
    shape, dtype
        Shape and dtype of the whole batch.
    axes
        The axes H and W of the batch.

    Raises
    ------
    DatasetMismatch
        If the sources differ in shape or dtype.
    """

    def __init__(self, source: ImageSource | Sequence[ImageSource], device: torch.device) -> None:
        super().__init__(as_sources(source), device)
        channels, *size = self.sources[0].shape
        self._is_flat = channels == 1
        extents = size if self._is_flat else [channels, *size]
        self.shape: tuple[int, ...] = (len(self.sources), *extents)
        self.axes: Axes = (len(self.shape) - 2, len(self.shape) - 1)
        stored = self.sources[0].dtype
        self.dtype = torch.int64 if is_integer(stored) else stored

    def read(self, region: Region) -> Tensor:
        """The values of ``region``, (N, h, w) or (N, C, h, w), on the device; read-only.

        Raises
        ------
        CorruptImage
            If they cannot be read.
        """
        stored = self.delivered(self.read_stored(region))
        return (stored[:, 0] if self._is_flat else stored).to(self.dtype)
