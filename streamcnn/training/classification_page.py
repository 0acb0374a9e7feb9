"""What a run's page shows of a classifier: the confusion matrix, and pictures of misclassified images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamcnn.data.dataset import ImageDataset
from streamcnn.data.thumbnails import thumbnail
from streamcnn.errors import RunMismatch
from streamcnn.support.text import html_text as escape
from streamcnn.support.units import plural
from streamcnn.training.page_parts import EDGE, embedded, percentages
from streamcnn.training.task import Shown

MAX_MISTAKES = 24
"""Pictures of mistakes on the page."""


def shown(epochs: Sequence[Mapping[str, Any]], best: Mapping[str, Any], images: ImageDataset) -> Shown:
    """Accuracy over the epochs, and the best epoch's confusion matrix and misclassified images.

    Raises
    ------
    RunMismatch
        If the log was written for other validation images.
    """
    predictions = best["predictions"]
    if len(predictions) != len(images):
        raise RunMismatch(
            f"the run was validated by {len(predictions)} images, there are {len(images)} now: "
            "give it back the images that it began with"
        )
    wrong = [at for at, found in enumerate(predictions) if found != images.labels[at]]
    curves = {"accuracy": "training", "validation_accuracy": "validation"}
    return Shown(
        percentages(epochs, "Accuracy", curves),
        "\n".join(
            [
                "<h2>Which class is taken for which</h2>",
                _confusion(predictions, images),
                f"<h2>{len(wrong)} of {plural(len(images), 'validation image')} misclassified</h2>",
                _mistakes(wrong[:MAX_MISTAKES], predictions, images),
            ]
        ),
    )


def _confusion(predictions: Sequence[int], images: ImageDataset) -> str:
    """The confusion matrix as HTML: a row for each label, a column for each prediction."""
    num_classes = max(images.num_classes, 1 + max(predictions))
    counts = [[0] * num_classes for _ in range(num_classes)]
    for label, found in zip(images.labels, predictions, strict=True):
        counts[label][found] += 1
    heads = "".join(f'<th scope="col">{escape(_name(images, found))}</th>' for found in range(num_classes))
    rows = "".join(
        f'<tr><th scope="row">{escape(_name(images, label))}</th>'
        + "".join(_cell(count, sum(row), right=label == found) for found, count in enumerate(row))
        + "</tr>"
        for label, row in enumerate(counts)
    )
    caption = (
        "Rows: labels. Columns: what the images are taken for. "
        "The deeper the colour, the larger the share of the row."
    )
    return f'<p>{caption}</p><div class="scroll"><table><tr><th></th>{heads}</tr>{rows}</table></div>'


def _cell(count: int, total: int, *, right: bool) -> str:
    share = count / total if total else 0.0
    color = "31, 111, 235" if right else "198, 40, 40"
    style = f"background: rgba({color}, {0.75 * share:.2f})"
    kind = ' class="right"' if right else ""
    return f'<td{kind} style="{style}">{count or ""}</td>'


def _mistakes(wrong: Sequence[int], predictions: Sequence[int], images: ImageDataset) -> str:
    return f'<div class="mistakes">{"".join(_mistake(at, predictions[at], images) for at in wrong)}</div>'


def _mistake(position: int, found: int, images: ImageDataset) -> str:
    source, label, *_ = images[position]
    picture = thumbnail(source, EDGE, images.truth(position) or ())
    name = images.names[position]
    caption = f"{escape(f'{_name(images, label)}, taken for {_name(images, found)}')}<br>"
    caption += f"<span>{escape(name)}</span>"
    return f"<figure>{embedded(picture, name)}<figcaption>{caption}</figcaption></figure>"


def _name(images: ImageDataset, label: int) -> str:
    return str(label) if images.classes is None or label >= len(images.classes) else images.classes[label]
