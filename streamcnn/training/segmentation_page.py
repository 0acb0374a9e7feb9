"""What a run's page shows of a segmentation: each class's scores, and masks over images in colours.

The predicted maps on it come from the validation's own passes, and are kept in the run's folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcnn.data.map_files import write_map
from streamcnn.data.mask_dataset import MaskDataset
from streamcnn.data.sources import ImageSource, TensorSource, open_image
from streamcnn.data.sources.placement import Placement
from streamcnn.data.thumbnails import sampled, thumbnail
from streamcnn.errors import RunMismatch
from streamcnn.metrics import SegmentationScore
from streamcnn.support.disk import writing
from streamcnn.support.documents import require_within
from streamcnn.support.extras import require
from streamcnn.support.text import html_text as escape
from streamcnn.support.units import plural
from streamcnn.training.class_names import class_label
from streamcnn.training.page_parts import EDGE, embedded, percentages
from streamcnn.training.task import Shown

MAPS = "maps"
"""Folder in a run's of the maps that its page shows."""
MAX_PICTURED = 8
"""Images on the page."""
_OPACITY = 0.6
_COLOURS = np.array(
    [
        *((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75)),
        *((227, 119, 194), (188, 189, 34), (23, 190, 207), (82, 84, 163), (231, 203, 148), (99, 121, 57)),
    ],
    np.uint8,
)
"""Of the classes from 1 on, again from the first after the last; class 0 is mostly what is around."""
_IGNORED = (255, 255, 255)


def pictured(num_images: int) -> frozenset[int]:
    """The evenly spread positions of the images that the page shows."""
    count = min(num_images, MAX_PICTURED)
    return frozenset(at * num_images // count for at in range(count))


def keep_maps(folder: Path, maps: Mapping[int, Tensor]) -> None:
    """Write small maps of classes (h, w) into a run's folder, over earlier ones.

    Raises
    ------
    CannotWrite
        If there is no room, or the folder may not be written to.
    RunMismatch
        If the maps' folder is a link that leads out of the run's.
    """
    place = folder / MAPS
    require_within(folder, place, error=RunMismatch)
    with writing(place):
        place.mkdir(exist_ok=True)
    for position, classes in maps.items():
        height, width = classes.shape
        stored = TensorSource(classes[None].to(torch.uint8 if int(classes.max()) < 256 else torch.int32))
        write_map(_path_of(folder, position), stored, Placement((height, width)))


def step_of(size: tuple[int, int]) -> int:
    """The step at which an image (H, W) is sampled for the page; `EDGE` positions at least are left."""
    return max(1, max(size) // EDGE)


def _path_of(folder: Path, position: int) -> Path:
    return folder / MAPS / f"{position}.tif"


def shown(
    epochs: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    images: MaskDataset,
    folder: Path | None,
    *,
    ignored: int | None,
    names: Sequence[str] | None = None,
) -> Shown:
    """IoU and Dice over the epochs; the best one's scores of each class, and pictures.

    Parameters
    ----------
    epochs, best, images, folder
        As for `Task.shown`.
    ignored
        Value of pixels to ignore.
    names
        Names of the classes 0, 1, …; None if they have none.

    Raises
    ------
    RunMismatch
        If the log was written for other validation images.
    """
    if best["num_images"] != len(images):
        raise RunMismatch(
            f"the run was validated by {best['num_images']} images, there are {len(images)} now: "
            "give it back the images that it began with"
        )
    curves = {
        "validation_mean_iou": "mean IoU",
        "validation_mean_dice": "mean Dice",
        "validation_accuracy": "pixels found",
    }
    at = sorted(pictured(len(images)))
    figures = "".join(_figure(position, images, folder, ignored) for position in at)
    shown = f"{len(at)} of {plural(len(images), 'validation image')}"
    score = SegmentationScore(torch.tensor(best["overlaps"]))
    legend = "Masks are drawn over the images in the colours of the table, class 0 in none"
    legend += "" if ignored is None else f", pixels of {ignored}, which do not count, in white"
    return Shown(
        percentages(epochs, "Validation", curves),
        f"<h2>Scores of each class</h2>{_scores(score, names)}"
        f"<h2>{shown}</h2><p>{legend}.</p>{_named_chips(names)}"
        f'<div class="triples">{figures}</div>',
    )


def _scores(score: SegmentationScore, names: Sequence[str] | None) -> str:
    """A table with a row for each class: colour, name if any, scores, and share of the pixels not ignored."""
    named, blank = ("", "") if names is None else ('<th scope="col" class="name">name</th>', "<td></td>")
    heads = '<th scope="col">class</th><th scope="col"></th>' + named
    heads += "".join(f'<th scope="col">{column}</th>' for column in ("IoU", "Dice", "of all pixels"))
    shares = score.overlaps[2] / score.overlaps[2].sum()
    rows = "".join(
        f'<tr><th scope="row">{label}</th><td>{_chip(label)}</td>{_name_cell(label, names)}'
        + "".join(f"<td>{_percent(float(value))}</td>" for value in values)
        + "</tr>"
        for label, values in enumerate(zip(score.iou, score.dice, shares, strict=True))
    )
    means = f"<td>{_percent(score.mean_iou)}</td><td>{_percent(score.mean_dice)}</td><td></td>"
    mean = f'<tr><th scope="row">mean</th><td></td>{blank}{means}</tr>'
    return f'<div class="scroll"><table><tr>{heads}</tr>{rows}{mean}</table></div>'


def _name_cell(label: int, names: Sequence[str] | None) -> str:
    """The table's cell for a class's name; empty if classes have no names."""
    if names is None:
        return ""
    return f'<td class="name">{escape(names[label] if label < len(names) else "")}</td>'


def _named_chips(names: Sequence[str] | None) -> str:
    """The legend of the colours, as a line of the page; empty if classes have no names."""
    if names is None:
        return ""
    chips = "".join(
        f"<span>{_chip(label)} {escape(class_label(label, names))}</span>" for label in range(len(names))
    )
    return f'<p class="legend">{chips}</p>'


def _chip(label: int) -> str:
    """A patch of a class's colour; class 0 has none."""
    if label == 0:
        return ""
    red, green, blue = _COLOURS[(label - 1) % len(_COLOURS)].tolist()
    return f'<span class="chip" style="background: rgb({red}, {green}, {blue})"></span>'


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _figure(position: int, images: MaskDataset, folder: Path | None, ignored: int | None) -> str:
    """An image, its mask over it, and the predicted map over it, if one was kept."""
    source, mask = images[position]
    name = images.names[position]
    picture = thumbnail(source, EDGE)
    layers: dict[str, Any] = {"image": picture, "mask": _over(picture, _classes(mask), ignored)}
    found = None if folder is None else _path_of(folder, position)
    if folder is not None and found is not None and found.exists():
        require_within(folder, found, error=RunMismatch)
        layers["found"] = _over(picture, _classes(open_image(found)), None)
    shown = "".join(
        f"<div>{embedded(layer, f'{what} of {name}', kind='jpeg')}<br>{what}</div>"
        for what, layer in layers.items()
    )
    return f"<figure><figcaption>{escape(name)}</figcaption>{shown}</figure>"


def _classes(mask: ImageSource) -> NDArray[Any]:
    """A mask (H, W) sampled at the steps of small maps, (h, w)."""
    classes: NDArray[Any] = sampled(mask, step_of(mask.shape[1:]))[0]
    return classes


def _over(picture: Any, classes: NDArray[Any], ignored: int | None) -> Any:
    """A Pillow picture in grey, under a map of classes (h, w) in colours that covers all of it."""
    pillow = require("PIL.Image", extra="plots")
    colours = np.zeros((*classes.shape, 4), np.uint8)
    colours[..., :3] = _COLOURS[(classes.astype(np.int64) - 1) % len(_COLOURS)]
    if ignored is not None:
        colours[..., :3][classes == ignored] = _IGNORED
    colours[..., 3] = np.where(classes == 0, 0, round(255 * _OPACITY))
    layer = pillow.fromarray(colours).resize(picture.size, pillow.Resampling.NEAREST)
    grey = picture.convert("L").convert("RGBA")  # in which colours stay what they are
    return pillow.alpha_composite(grey, layer).convert("RGB")
