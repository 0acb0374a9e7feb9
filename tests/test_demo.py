"""The demo: its network learns by heart, its figure shows the tiles, its report is honest."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from streamcnn.cli import overfitting
from streamcnn.cli.overfitting import DemoSettings, build_network, draw_tiles, normalise, run_demo
from streamcnn.data.sources import ImageSource, TensorSource
from streamcnn.geometry.regions import Region


class PlainModel(nn.Module):
    """Plain PyTorch behind the interface of the streamed model."""

    measured_bytes: int | None = 3 * 2**20

    def __init__(self, net: nn.Module, **options: object) -> None:
        super().__init__()
        self.net = net

    def forward(self, source: ImageSource) -> Tensor:
        return self.net(normalise(source.read(Region.whole(source.shape[1:]))[None]))

    @property
    def last_report(self) -> SimpleNamespace:
        return SimpleNamespace(measured_bytes=self.measured_bytes)

    def plan(self, shape: tuple[int, ...]) -> SimpleNamespace:
        return SimpleNamespace(tile=(100, 60), plain_bytes=5 * 2**30, explain=lambda: "the plan, explained")


@pytest.fixture
def plain_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(overfitting, "StreamingModel", PlainModel)
    # Small images: on a busy machine several threads would mostly wait for each other.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def run(settings: DemoSettings) -> tuple[overfitting.DemoResult, str]:
    output = io.StringIO()
    return run_demo(settings, Console(file=output, width=200)), output.getvalue()


@pytest.mark.usefixtures("plain_engine")
def test_the_network_learns_four_images_by_heart(tmp_path: Path) -> None:
    result, text = run(DemoSettings(size=192, epochs=14, budget="1GiB", output=tmp_path))
    assert result.overfitted, text
    assert result.losses[-1] < 0.1 * result.losses[0]
    assert result.predictions == result.labels
    assert len(re.findall(r"^epoch ", text, re.MULTILINE)) == 14
    for expected in (
        "5.00 GiB in plain PyTorch",
        "the budget is 1.00 GiB",
        "the plan, explained",
        "3.00 MiB of a",
    ):
        assert expected in text
    assert "knows all 4 images by heart" in text
    assert "\x1b" not in text
    assert result.figure.is_file()


@pytest.mark.usefixtures("plain_engine")
def test_says_so_when_it_did_not_overfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overfitting, "predict", lambda model, images: tuple(label + 1 for _, label in images))
    result, text = run(DemoSettings(size=64, num_images=2, epochs=1, output=tmp_path))
    assert not result.overfitted
    assert "knows only 0 of 2 images: it did not overfit in 1 epoch; give more --epochs" in text
    assert text.count("WRONG") == 2


@pytest.mark.usefixtures("plain_engine")
def test_a_missing_reading_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainModel, "measured_bytes", None)
    result, text = run(DemoSettings(size=64, num_images=1, epochs=1, output=tmp_path))
    assert result.measured_bytes is None
    assert "held at most unknown" in text


def test_refuses_a_budget_before_it_makes_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read 'banana' as a number of bytes"):
        run(replace(DemoSettings(output=tmp_path / "new"), budget="banana"))
    assert not (tmp_path / "new").exists()


def test_streams_a_tiny_run(tmp_path: Path) -> None:
    result, text = run(DemoSettings(size=256, num_images=2, epochs=1, output=tmp_path))
    assert len(result.losses) == 1
    assert result.losses[0] == pytest.approx(3.3, abs=1.5)  # ln 28 before anything is learnt
    assert "image 1: predicted" in text
    assert result.figure.is_file()


def test_the_network_gives_logits_of_every_class() -> None:
    assert build_network(64)(torch.zeros(2, 1, 65, 97)).shape == (2, 28)


def test_normalise_is_pointwise_from_minus_one_to_one() -> None:
    torch.testing.assert_close(
        normalise(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([-1.0, 1.0])
    )


def test_the_figure_has_lines_between_tiles_only(tmp_path: Path) -> None:
    source = TensorSource(torch.zeros(1, 300, 200, dtype=torch.uint8))
    draw_tiles((source, 7), 7, SimpleNamespace(tile=(100, 200)), tmp_path / "two_lines.png")
    draw_tiles((source, 7), 7, SimpleNamespace(tile=(300, 200)), tmp_path / "none.png")
    orange = {
        name: sum(
            red > 200 and blue < 60
            for red, _, blue in Image.open(tmp_path / name).convert("RGB").get_flattened_data()
        )
        for name in ("two_lines.png", "none.png")
    }
    assert orange["two_lines.png"] > 500
    assert orange["none.png"] == 0
