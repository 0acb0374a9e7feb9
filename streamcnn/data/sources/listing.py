"""Listing of all images in a file and their resolutions, for formats that may hold several."""

from __future__ import annotations

from pathlib import Path

import zarr

from streamcnn.data.sources.base import ImageSource
from streamcnn.data.sources.files import opening
from streamcnn.data.sources.ome import ome_series
from streamcnn.data.sources.places import place
from streamcnn.data.sources.series import SeriesFacts
from streamcnn.data.sources.slide import SlideSource, slide_levels
from streamcnn.data.sources.tiff import TiffSource
from streamcnn.data.sources.tiff_series import tiff_series
from streamcnn.data.sources.zarr import ZarrSource, open_node


def series_of(path: str | Path, source: ImageSource) -> list[SeriesFacts]:
    """All images at ``path``; empty if its format has one image of one resolution.

    Parameters
    ----------
    path
        The image.
    source
        Its source, from `open_image`.

    Raises
    ------
    CorruptImage
        If the metadata of one is damaged.
    """
    where = place(path)
    if isinstance(source, TiffSource):
        return tiff_series(str(where))
    if isinstance(source, SlideSource):
        return [SeriesFacts(0, "", slide_levels(str(where)), is_default=True)]
    if isinstance(source, ZarrSource):
        node = open_node(where)
        if isinstance(node, zarr.Group):
            with opening(str(path), "OME-Zarr image"):
                return ome_series(str(path), node)
    return []
