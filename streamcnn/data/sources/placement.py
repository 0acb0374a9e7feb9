"""Size and place of an image's pixels in the world, as far as its file has them, for maps made from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

from tifffile import TiffFile, TiffPage, TiffPageSeries

PIXEL_SCALE, TIEPOINT, TRANSFORMATION = 33550, 33922, 34264
_GEO_KEYS = 34735
_GEO_TAGS = (PIXEL_SCALE, TIEPOINT, TRANSFORMATION, _GEO_KEYS, 34736, 34737)
"""GeoTIFF's tags; the last three define the coordinate system."""
_RASTER_TYPE, _IS_POINT = 1025, 2
_UNITS = {"nm": "nanometer", "µm": "micrometer", "μm": "micrometer", "mm": "millimeter", "cm": "centimeter"}
"""OME-Zarr's names for OME-XML's."""

Tag = tuple[int, int, int, Any]
"""Code, type, number of values, and values of a TIFF tag."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Size and place of an image's pixels, as in its file."""

    size: tuple[int, int]
    """Height and width in pixels of the image."""
    spacing: tuple[float, float] | None = None
    """Height and width of a pixel in ``unit``."""
    unit: str = ""
    """Unit by OME-Zarr's name, such as ``"micrometer"``; empty if unknown."""
    tags: tuple[Tag, ...] = ()
    """GeoTIFF tags."""

    def of_map(self, size: tuple[int, int]) -> Placement:
        """The placement of a map of ``size`` (H, W) that covers the whole image."""
        strides = self.size[0] / size[0], self.size[1] / size[1]
        spacing = self.spacing and (self.spacing[0] * strides[0], self.spacing[1] * strides[1])
        shift = 0.5 if self._is_point else 0.0
        tags = tuple(_scaled(tag, strides, shift) for tag in self.tags)
        return replace(self, size=size, spacing=spacing, tags=tags)

    @property
    def _is_point(self) -> bool:
        """Whether coordinates are those of pixels' centres, not of their corners."""
        keys: Sequence[int] = next((values for code, *_, values in self.tags if code == _GEO_KEYS), ())
        entries = (keys[place : place + 4] for place in range(4, len(keys), 4))
        return any(entry[0] == _RASTER_TYPE and entry[3] == _IS_POINT for entry in entries)


def _scaled(tag: Tag, strides: tuple[float, float], shift: float) -> Tag:
    """A GeoTIFF tag for pixels that are ``strides`` times as high and wide."""
    code, kind, count, values = tag
    down, across = strides
    if code == PIXEL_SCALE:
        values = (values[0] * across, values[1] * down, *values[2:])
    elif code == TIEPOINT:
        # Pixels (column, row, depth), each followed by its coordinates (x, y, z).
        values = tuple(
            (value + shift) / (across, down)[place % 6] - shift if place % 6 < 2 else value
            for place, value in enumerate(values)
        )
    elif code == TRANSFORMATION:
        rows = [list(values[place : place + 4]) for place in range(0, 16, 4)]
        for row in rows:
            row[3] += shift * (row[0] * (across - 1) + row[1] * (down - 1))
            row[0], row[1] = row[0] * across, row[1] * down
        values = tuple(value for row in rows for value in row)
    return code, kind, count, values


def placement_of_tiff(file: TiffFile, image: TiffPageSeries) -> Placement:
    """The placement of the full resolution of an image in a TIFF file."""
    page = image.keyframe
    size = page.imagelength, page.imagewidth
    spacing, unit = _physical_size(file, image) or (None, "")
    return Placement(size, spacing, unit, _geo_tags(page))


def _geo_tags(page: TiffPage) -> tuple[Tag, ...]:
    """GeoTIFF tags of a page, if all values that have to be numbers are."""
    tags = (page.tags.get(code) for code in _GEO_TAGS)
    found = tuple((tag.code, int(tag.dtype), tag.count, tag.value) for tag in tags if tag is not None)
    lengths = {PIXEL_SCALE: 3, TRANSFORMATION: 16}
    for code, _, _, values in found:
        is_short = isinstance(values, tuple) and len(values) < lengths.get(code, 0)
        if code in (PIXEL_SCALE, TIEPOINT, TRANSFORMATION, _GEO_KEYS) and (
            not isinstance(values, tuple) or is_short
        ):
            return ()
    return found


def _physical_size(file: TiffFile, image: TiffPageSeries) -> tuple[tuple[float, float], str] | None:
    """Height and width of a pixel by OME-XML, and their unit; None if it has none."""
    if not file.is_ome or file.ome_metadata is None:
        return None
    try:
        root = ElementTree.fromstring(file.ome_metadata)
    except ElementTree.ParseError:
        return None
    pixels = [each for each in root.iter() if each.tag.rpartition("}")[2] == "Pixels"]
    number = next((number for number, each in enumerate(file.series) if each is image), len(pixels))
    if number >= len(pixels):
        return None
    said = pixels[number].attrib
    units = {said.get(f"PhysicalSize{axis}Unit", "µm") for axis in "YX"}
    spacing = _positive([said.get(f"PhysicalSize{axis}") for axis in "YX"])
    return None if spacing is None or len(units) > 1 else (spacing, _UNITS.get(units.pop(), ""))


def spacing_of_ome(image: Mapping[str, Any], level: int) -> tuple[tuple[float, float], str] | None:
    """Height and width of a pixel of a level of an OME-Zarr image, and their unit; None if it has none."""
    axes = image.get("axes")
    if not isinstance(axes, list) or not all(isinstance(axis, Mapping) for axis in axes):
        return None
    names = [str(axis.get("name", "")).lower() for axis in axes]
    if "y" not in names or "x" not in names:
        return None
    places = names.index("y"), names.index("x")
    scales = [_scale(image.get("coordinateTransformations"), len(names))]
    scales.append(_scale(image["datasets"][level].get("coordinateTransformations"), len(names)))
    if scales[1] is None:
        return None
    products = [math.prod(scale[place] for scale in scales if scale is not None) for place in places]
    units = {str(axes[place].get("unit", "")) for place in places}
    spacing = _positive(products)
    return None if spacing is None or len(units) > 1 else (spacing, units.pop())


def _scale(transformations: Any, ndim: int) -> list[float] | None:
    """The scale of each axis among transformations of coordinates."""
    for each in transformations if isinstance(transformations, list) else ():
        scale = each.get("scale") if isinstance(each, Mapping) and each.get("type") == "scale" else None
        if isinstance(scale, list) and len(scale) == ndim:
            return scale
    return None


def _positive(values: Sequence[Any]) -> tuple[float, float] | None:
    """Two numbers, if they can be a pixel's height and width; else None."""
    try:
        height, width = map(float, values)
    except (TypeError, ValueError):
        return None
    return (height, width) if 0 < height < math.inf and 0 < width < math.inf else None
