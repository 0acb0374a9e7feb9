"""An explanation in its folder: numbers for programs, a picture for a paper, a page to browse.

::

    out/
      index.html            image, heat map and tiles, to zoom into; opens without a server
      explanation.json      what was explained and how
      overlay.png           the whole image, small, under the heat map
      heatmap.ome.zarr/     the attribution, float32, in pixels of the image
      image.dzi, image_files/, heatmap.dzi, heatmap_files/    what the page shows
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from streamcnn.attribution.heat_map import HeatMap, colour_table, coloured, heat_map, strongest
from streamcnn.attribution.page import render_page
from streamcnn.attribution.pyramid import write_heat_pyramid, write_image_pyramid
from streamcnn.data.sources import ImageSource, TensorSource
from streamcnn.data.thumbnails import thumbnail
from streamcnn.data.tile_store.arrays import num_levels, write_image
from streamcnn.errors import CannotWrite
from streamcnn.plan.plan import Plan
from streamcnn.support.disk import writing
from streamcnn.support.extras import require

PAGE, FACTS, OVERLAY, ATTRIBUTION = "index.html", "explanation.json", "overlay.png", "heatmap.ome.zarr"
_OVERLAY_EDGE = 1600
"""Longer side of the picture in pixels; a smaller image keeps its size."""
_OVERLAY_OPACITY = 0.65


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts of an explanation: what was explained, and how."""

    image: str
    shape: tuple[int, int, int]
    """(C, H, W) of the image as stored."""
    model: str
    method: str
    layer: str | None
    """The layer of a class activation map; else None."""
    target: int
    target_name: str
    predictions: Sequence[tuple[str, float]]
    """Names of classes and their probabilities, the most likely first."""
    tile_rows: Sequence[int]
    tile_cols: Sequence[int]
    """Columns at which the plan's tiles meet, in pixels of the image."""
    options: dict[str, Any]
    """Options of the method, by name."""
    seconds: float
    """Seconds that the attribution took."""
    budget: int | None
    """Bytes that a pass was allowed to use."""


def require_new(folder: Path) -> None:
    """Make sure that an explanation can be written to ``folder``, which must not exist.

    Raises
    ------
    CannotWrite
        If something is there, or the parent folder does not exist.
    """
    if folder.exists() or folder.is_symlink():
        raise CannotWrite(f"{folder} is there already: give a new folder, nothing is overwritten")
    if not folder.absolute().parent.is_dir():
        raise CannotWrite(f"{folder.parent} is no folder: make it first")
    if not os.access(folder.absolute().parent, os.W_OK):
        raise CannotWrite(f"{folder.parent} may not be written to: give another folder")


def write_explanation(
    folder: Path,
    source: ImageSource,
    attribution: Tensor,
    facts: Facts,
    *,
    is_signed: bool,
    colours: str | None = None,
) -> None:
    """Write an explanation; if that fails, leave nothing behind.

    Parameters
    ----------
    folder
        The folder to create.
    attribution
        (1, C, h, w), which covers the image exactly, at any resolution.
    is_signed
        Whether negative values have a meaning.
    colours
        Name of a colour map of matplotlib; None for one that fits the signs.

    Raises
    ------
    CannotWrite
        If the folder exists, or cannot be written.
    CorruptImage
        If the image cannot be read.
    MissingExtra
        If Pillow or matplotlib is not installed.
    ValueError
        If there is no such colour map.
    """
    table = colour_table(colours, is_signed=is_signed)
    heat = heat_map(attribution, facts.shape[1:], is_signed=is_signed)
    require_new(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    with writing(folder):
        try:
            partial.mkdir()
            _write_attribution(partial / ATTRIBUTION, attribution, heat.pixel)
            _write_overlay(partial / OVERLAY, source, heat, table)
            image = write_image_pyramid(partial, "image", source)
            over = write_heat_pyramid(partial, "heatmap", heat, table)
            page = render_page(facts, image, over, table, is_signed=is_signed)
            (partial / PAGE).write_text(page, encoding="utf-8")
            (partial / FACTS).write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            source.release()


def tile_borders(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rows and the columns of the image, in pixels, at which tiles of the plan's first phase meet."""
    if not plan.phases:
        return (), ()
    found = []
    for steps, extent in zip((plan.phases[0].rows, plan.phases[0].cols), plan.image_shape[2:], strict=True):
        # Borders are in positions of one of the phase's outputs, which covers the image.
        output = next(iter(steps[0].own))
        ends = [step.own[output].stop for step in steps]
        found.append(tuple(round(end * extent / ends[-1]) for end in ends[:-1]))
    return found[0], found[1]


def _write_attribution(folder: Path, attribution: Tensor, pixel: tuple[float, float]) -> None:
    values = TensorSource(attribution[0].detach().float().cpu())
    folder.mkdir()
    write_image(folder, values, name="attribution", levels=num_levels(values.shape[1:]), pixel=pixel)


def _write_overlay(path: Path, source: ImageSource, heat: HeatMap, table: Any) -> None:
    """Write the image, downsampled, with the heat map over it."""
    pillow = require("PIL.Image", extra="plots")
    picture = thumbnail(source, _OVERLAY_EDGE)
    size = picture.height, picture.width
    small = heat.values[None, None]
    # Averaged if it is larger than the picture, interpolated if it is smaller.
    if heat.values.shape[0] > size[0]:
        small = F.adaptive_avg_pool2d(small, size)
    else:
        small = F.interpolate(small, size, mode="bilinear")
    colours = coloured(small[0, 0], strongest(small), table)
    colours[..., 3] = (colours[..., 3] * _OVERLAY_OPACITY).round()
    picture.paste(pillow.fromarray(colours), (0, 0), pillow.fromarray(colours[..., 3]))
    picture.save(path)
