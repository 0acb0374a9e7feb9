"""Reading of regions of a batch of images: read, checked, preprocessed and on the device."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from streamcnn.data.normalisation import Normalise
from streamcnn.data.pointwise import looks_further, some_pixels
from streamcnn.data.source_batch import SourceBatch
from streamcnn.data.sources import ImageSource, as_sources
from streamcnn.data.wrapping import find_wrap, is_integer
from streamcnn.errors import CorruptImage, DatasetMismatch, PlanDoesNotFit
from streamcnn.geometry.regions import Interval, Region
from streamcnn.plan.plan import Plan
from streamcnn.plan.reading import HELD, OPENING, READING
from streamcnn.support.units import format_bytes

_LARGE_SHARE = 8
"""Reading is blamed for a budget that is too small if it takes more than one byte in so many."""

_MOST_TRIED = 8
"""Number of tiles in a pass on which ``preprocess`` is tested for being pointwise."""

Preprocess = Callable[[Tensor], Tensor]
"""A pointwise function of a tile (N, C, h, w) as stored, on the device, to the float tile for the model.

Integers stay integers until it makes floats of them, so results must fit their type until then.
"""
Image = Tensor | ImageSource | Sequence[ImageSource]


class BatchReader(SourceBatch):
    """A batch of images of one shape, read region by region.

    Attributes
    ----------
    shape
        (N, C, H, W) as the model gets it, after ``preprocess``.
    dtype
        Floating-point dtype that the model gets.

    Raises
    ------
    DatasetMismatch
        If the images are not a batch (N, C, H, W), or not floating point after ``preprocess``.
    ValueError
        If ``preprocess`` changes its argument.
    """

    def __init__(self, image: Image, device: torch.device, preprocess: Preprocess | None = None) -> None:
        super().__init__([] if isinstance(image, Tensor) else as_sources(image), device)
        self._tensor = image.detach() if isinstance(image, Tensor) else None
        self._is_own = isinstance(preprocess, Normalise)
        if isinstance(preprocess, Normalise) and self.sources:
            preprocess = preprocess.for_pixels_up_to(self.sources[0].largest)
        self._preprocess = preprocess
        self._seen: tuple[int, int] | None = None
        """The smallest and the largest value of all pixels prepared so far."""
        self._sums: list[tuple[Region, Tensor]] = []
        """Regions that were read, with the sums of their pixels, still to be checked."""
        self._num_tried = 0
        self._further: list[tuple[Region, Tensor]] = []
        """Regions that were read, with whether their pixels depend on others, still to be checked."""
        self._settles_later = device.type == "cuda"
        stored = self._stored_shape()
        with torch.inference_mode(False):
            pixel = torch.ones((*stored[:2], 1, 1), dtype=self._stored_dtype(), device=device)
            probe = self._first_prepared(pixel)
        if preprocess is not None and (pixel._version > 0 or (pixel != 1).any()):
            raise ValueError(
                "preprocess= changed its tile in place, which may be the image's own memory: allowed is a "
                "function that returns a new tensor, such as lambda tile: tile / 255"
            )
        if not probe.is_floating_point():
            raise DatasetMismatch(
                f"the model would get an image of {probe.dtype}: allowed are floating-point images; give "
                "preprocess= a function that turns a tile into floats, such as lambda tile: tile / 255"
            )
        self.shape = (stored[0], probe.shape[1], stored[2], stored[3])
        self.dtype = probe.dtype

    @property
    def shared_tensors(self) -> list[Tensor]:
        """The caller's own tensors from which pixels are read."""
        return super().shared_tensors if self._tensor is None else [self._tensor]

    def _stored_shape(self) -> tuple[int, int, int, int]:
        if self._tensor is None:
            return (len(self.sources), *self.sources[0].shape)
        if self._tensor.dim() != 4 or 0 in self._tensor.shape:
            raise DatasetMismatch(
                f"image tensor has shape {tuple(self._tensor.shape)}: allowed is (N, C, H, W) with no empty "
                "axis; add the batch axis with image[None]"
            )
        n, c, h, w = self._tensor.shape
        return (n, c, h, w)

    def _stored_dtype(self) -> torch.dtype:
        return self.sources[0].dtype if self._tensor is None else self._tensor.dtype

    def _first_prepared(self, pixel: Tensor) -> Tensor:
        try:
            return self._prepared(pixel)
        except DatasetMismatch:
            raise
        except Exception as error:
            error.add_note(
                f"preprocess= was called with a tile of shape {tuple(pixel.shape)}: allowed is a pointwise "
                "function, to which the size of a tile is no matter"
            )
            raise

    def _prepared(self, tile: Tensor) -> Tensor:
        shape = tile.shape
        if self._preprocess is not None:
            tile = self._preprocess(tile)
        if not isinstance(tile, Tensor):
            raise DatasetMismatch(
                f"preprocess= turned a tile of shape {tuple(shape)} into a {type(tile).__name__}: allowed is "
                "a function that returns a tensor"
            )
        if tile.dim() != 4 or tile.shape[0] != shape[0] or tile.shape[2:] != shape[2:]:
            raise DatasetMismatch(
                f"preprocess= turned a tile of shape {tuple(shape)} into {tuple(tile.shape)}: allowed is a "
                "pointwise function, which keeps N, h and w"
            )
        return tile

    def read(self, region: Region) -> Tensor:
        """The pixels of ``region``, (N, C, h, w), on the device; read-only.

        Raises
        ------
        CorruptImage
            If pixels cannot be read, or are NaN or infinite, for which on a GPU `settle` raises.
        DatasetMismatch
            If ``preprocess`` computes with integers, and results overflow their dtype; or if its result for a
            pixel depends on other pixels.
        """
        stored = self.read_stored(region)
        self._check_arithmetic(stored)
        # Stored pixels are the fewest bytes to copy to a GPU, which also converts them faster.
        delivered = self.delivered(stored)
        tile = self._prepared(delivered)
        if self._settles_later:
            # In float32, since sums of large tiles exceed float16's range; a GPU makes no copy for that.
            dtype = torch.float32 if tile.dtype == torch.float16 else tile.dtype
            self._sums.append((region, tile.sum(dtype=dtype)))
        else:
            self._require_finite(tile, region)
        self._check_pointwise(delivered, tile, region)
        return tile

    def settle(self) -> None:
        """Make the deferred checks of everything read to a GPU since the last call.

        It waits for the GPU once, and once more while ``preprocess`` is still being tested.

        Raises
        ------
        CorruptImage
            If pixels are NaN or infinite.
        DatasetMismatch
            If the result of ``preprocess`` for a pixel depends on other pixels.
        """
        sums, self._sums = self._sums, []
        further, self._further = self._further, []
        if sums and not torch.stack([total for _, total in sums]).isfinite().all():
            for region, total in sums:
                if not torch.isfinite(total):
                    self._require_finite(self._prepared(self.delivered(self.read_stored(region))), region)
        if further and torch.stack([looks for _, looks in further]).any():
            self._refuse_further(*further)

    def _require_finite(self, tile: Tensor, region: Region) -> None:
        # The sum shows any NaN or infinity in one pass, without a mask of the tile's size.
        if not torch.isfinite(tile.sum()) and not torch.isfinite(tile).all():
            raise CorruptImage(self._describe_bad_pixel(tile, region))

    def _check_arithmetic(self, tile: Tensor) -> None:
        """Refuse integer arithmetic that wraps around for the tile's range of values, if that has grown."""
        if self._preprocess is None or self._is_own or not is_integer(tile.dtype):
            return
        allowed = torch.iinfo(tile.dtype)
        if self._seen == (allowed.min, allowed.max):
            return
        pixels = tile.detach().cpu().numpy()
        least, largest = int(pixels.min()), int(pixels.max())
        if self._seen is not None:
            least, largest = min(least, self._seen[0]), max(largest, self._seen[1])
        if (least, largest) == self._seen:
            return
        self._seen = (least, largest)
        found = find_wrap(self._preprocess, tile.shape[1], tile.dtype, self._seen)
        if found is not None:
            raise DatasetMismatch(
                f"preprocess= calculates with integers, and {found}, for pixels from {least} to {largest}: "
                "allowed are results that fit the type; turn the tile into floats first, such as "
                "tile.float() * 2 - 255"
            )

    def _check_pointwise(self, delivered: Tensor, tile: Tensor, region: Region) -> None:
        """Refuse a ``preprocess`` that depends on the tiling, tested on tiles that are not of one colour."""
        if self._preprocess is None or self._is_own or self._num_tried == _MOST_TRIED:
            return
        pixels = some_pixels(delivered)
        is_told = self._settles_later or bool((pixels != pixels[..., :1, :1]).any())
        self._num_tried += is_told
        looks = looks_further(self._prepared, pixels, tile)
        if self._settles_later:
            self._further.append((region, looks))
        elif looks:
            self._refuse_further((region, looks))

    def _refuse_further(self, *found: tuple[Region, Tensor]) -> None:
        region = next(region for region, looks in found if looks)
        raise DatasetMismatch(
            "preprocess= makes of a pixel one value among its neighbours and another among others, in rows "
            f"{_span(region.rows)}, columns {_span(region.cols)}: allowed is a pointwise function without "
            "random numbers, as it is called with tiles; take numbers of the whole image, such as its mean, "
            "beforehand, and let the model itself blur, augment and normalise"
        )

    def _describe_bad_pixel(self, tile: Tensor, region: Region) -> str:
        """A text on the first pixel of a tile (N, C, h, w) that is NaN or infinite, with its image."""
        at = next(at for at, image in enumerate(tile) if not torch.isfinite(image).all())
        first = int((~torch.isfinite(tile[at])).flatten().to(torch.uint8).argmax())
        channel, row, column = np.unravel_index(first, tuple(tile.shape[1:]))
        name = f" ({self.sources[at].name})" if self.sources else ""
        value = float(tile[at].flatten()[first])
        row, column = region.rows.start + row, region.cols.start + column
        return (
            f"image {at} of the batch{name} is {value} for the model in channel {channel} at row {row}, "
            f"column {column}: it holds NaN or infinite values in rows {_span(region.rows)}, columns "
            f"{_span(region.cols)}: allowed are finite pixels; clean the image or let preprocess= do it"
        )

    def read_stored(self, region: Region) -> Tensor:
        """The pixels of ``region`` as stored, on the CPU, unless the image is a tensor elsewhere."""
        if self._tensor is None:
            return super().read_stored(region)
        rows, cols = (slice(axis.start, axis.stop) for axis in region)
        return self._tensor[:, :, rows, cols]

    def check(self, plan: Plan) -> None:
        """See that a plan fits, as far as it depends on how the images are stored.

        Raises
        ------
        PlanDoesNotFit
            If it fails because of the bytes that reading takes with any tiles; the text names the file.
        """
        if plan.fits or not self.reading.costs:
            return
        assert plan.budget is not None
        least = self.reading.least
        counted = sum(term.nbytes for term in plan.terms if term.name in (HELD, OPENING, READING))
        is_reason = plan.projected_bytes - counted <= plan.budget and _LARGE_SHARE * least > plan.budget
        if least <= plan.budget and not is_reason:
            return
        source = max(self.sources, key=lambda source: source.reading_cost.least)
        own = source.reading_cost.least
        needed = f"{plan.projected_bytes} bytes ({format_bytes(plan.projected_bytes)})"
        others = f"; with the batch's other images {format_bytes(least)}" if own < least else ""
        raise PlanDoesNotFit(
            f"reading {source.name} takes {format_bytes(own)}{others}, however small the tiles are, and the "
            f"budget for everything is {format_bytes(plan.budget)}: the image is stored as {source.pieces}. "
            f"Write it in small chunks with `streamcnn convert {shlex.quote(source.name)} OUT` and read it "
            f"from there, or raise budget= to at least {needed}."
        )


def _span(interval: Interval) -> str:
    return f"{interval.start}..{interval.stop - 1}"
