"""The page of a run: what it says, from the log and the validation images alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from streamcnn import ImageSource, TensorSource
from streamcnn.data.dataset import ImageDataset
from streamcnn.errors import RunMismatch
from streamcnn.training import RunConfig
from streamcnn.training.classification_page import MAX_MISTAKES
from streamcnn.training.report import render_report

CONFIG = RunConfig(model="resnet18", data="/data/<cats>", budget=100 * 2**20)
UPDATE = {
    "kind": "update",
    "update": 1,
    "seconds": 2.0,
    "megapixels_per_second": 3.0,
    "measured_bytes": 50 * 2**20,
    "projected_bytes": 60 * 2**20,
}


class Images(ImageDataset):
    """Black images of cats and dogs in turn."""

    def __init__(self, count: int) -> None:
        names = tuple(f"image <{position}>" for position in range(count))
        labels = tuple(position % 2 for position in range(count))
        super().__init__(names, labels, classes=("a <cat>", "dog"), augmentation=None, seed=0)

    def _open(self, position: int) -> ImageSource:
        return TensorSource(torch.zeros(1, 8, 8, dtype=torch.uint8))

    def _identities(self) -> Iterator[str]:
        return iter(self.names)

    def prefetch(self, position: int) -> None:
        return

    def truth(self, position: int) -> Any:
        return [{"box": (1, 1, 4, 4), "value": 3}]


def epoch(number: int, accuracy: float, predictions: list[int]) -> dict[str, Any]:
    values = {"loss": 1.0, "accuracy": 0.5, "validation_loss": 2.0, "validation_accuracy": accuracy}
    return {"kind": "epoch", "update": number + 1, "epoch": number, "predictions": predictions, **values}


def test_the_page_shows_the_best_epoch() -> None:
    lines = [UPDATE, epoch(0, 0.75, [0, 1, 1, 1]), {**UPDATE, "update": 2}, epoch(1, 0.25, [1, 0, 1, 1])]
    page = render_report(CONFIG, lines, Images(4))
    assert "<title>Training: resnet18 on &lt;cats&gt;</title>" in page
    expected = "Best validation accuracy 75.0%, after epoch 1; 2 updates in 4.00 s, 3 megapixels per second; "
    assert expected + "at most 50.0 MiB of the 100 MiB allowed." in page
    counts = re.findall(r"<td[^>]*>(\d*)</td>", page)
    assert counts == ["1", "1", "", "2"]
    assert "1 of 4 validation images misclassified" in page
    assert "a &lt;cat&gt;, taken for dog<br><span>image &lt;2&gt;</span>" in page
    assert len(re.findall(r"<img ", page)) == 3 + 1
    # It asks for nothing: all pictures are in the page.
    assert not re.search(r"https?:|@import|<link|<script", page)
    assert page.count("src=") == page.count('src="data:image/png;base64,')


def test_every_setting_is_on_the_page_once() -> None:
    page = render_report(CONFIG, [UPDATE, epoch(0, 1.0, [0, 1])], Images(2))
    found = re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert found is not None
    lines = found[1].splitlines()
    for line in ("budget: 104857600 (100 MiB)", "epochs: 10", "tile: null", "normalise.mean: 0.5"):
        assert lines.count(line) == 1
    assert not [line for line in lines if "settings" in line]


def test_there_are_pictures_of_some_mistakes_alone() -> None:
    count = 2 * MAX_MISTAKES
    page = render_report(CONFIG, [UPDATE, epoch(0, 0.0, [1, 0] * MAX_MISTAKES)], Images(count))
    assert f"{count} of {count} validation image{'s' if count > 1 else ''} misclassified" in page
    assert len(re.findall(r"<img ", page)) == 3 + MAX_MISTAKES


def test_memory_that_was_not_measured_is_not_drawn() -> None:
    page = render_report(CONFIG, [{**UPDATE, "measured_bytes": None}, epoch(0, 1.0, [0, 1])], Images(2))
    assert len(re.findall(r"<img ", page)) == 2
    assert "allowed" not in page


def test_the_log_of_another_task_has_no_page() -> None:
    line = {**epoch(0, 1.0, [0, 1]), "overlaps": [[1], [1], [1]]}
    del line["predictions"]
    with pytest.raises(RunMismatch, match="the log is not of a classification: put back what"):
        render_report(CONFIG, [UPDATE, line], Images(2))


def test_a_run_without_an_epoch_or_with_other_images_has_no_page() -> None:
    with pytest.raises(RunMismatch, match="no epoch of the run is over"):
        render_report(CONFIG, [UPDATE], Images(2))
    with pytest.raises(RunMismatch, match="was validated by 2 images, there are 3 now"):
        render_report(CONFIG, [UPDATE, epoch(0, 1.0, [0, 1])], Images(3))
