"""What reading an image takes in host memory: stated by sources, planned for, held to, refused by name."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image
from torch import nn

from streamcnn import StreamingModel
from streamcnn.data.augmentation import Augmentation, AugmentedSource
from streamcnn.data.reader import BatchReader
from streamcnn.data.sources import ArraySource, ImageSource, TensorSource, open_image
from streamcnn.errors import PlanDoesNotFit
from streamcnn.geometry.regions import Interval, Region
from streamcnn.plan.reading import BatchCost, ReadingCost

EDGE = 2600
HELD = 3 * EDGE * EDGE
"""Bytes of the image decoded."""
CORNER = Region(Interval(0, 1), Interval(0, 1))


def test_pieces_under_a_region_are_counted_wherever_it_lies() -> None:
    # 10 positions touch 3 pieces of 8 at most, of which there are 2 down.
    cost = ReadingCost((16, 90), held=7, pixel=3, piece=(8, 8), piece_bytes=1000, fixed=5)
    assert cost.of((10, 10)) == (7, 3 * 100 + 1000 * 2 * 3 + 5)
    # One position touches one piece.
    assert cost.of((1, 1)) == (7, 3 + 1000 + 5)
    limited = ReadingCost((16, 90), piece=(8, 8), piece_bytes=1000, layers=3, at_once=4)
    assert limited.of((1, 1)) == (0, 3000)
    assert limited.of((10, 10)) == (0, 4000)


def test_a_batch_is_read_one_image_after_the_other() -> None:
    first, second = ReadingCost((9, 9), held=10, opening=50, pixel=3), ReadingCost((9, 9), held=4, fixed=100)
    batch = BatchCost((first, second), stored_pixel=3)
    assert batch.held == 14
    assert batch.opening == 50
    # The dearer read, the other image's region, and the batch of both.
    assert batch.of((2, 2)) == (14, 100 + 3 * 4 + 2 * 3 * 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    Image.fromarray(pixels).save(made / "a.png", compress_level=1)
    tifffile.imwrite(made / "strip.tif", pixels, compression="zlib", rowsperstrip=EDGE, photometric="rgb")
    for name, chunk in (("one.zarr", EDGE), ("chunked.zarr", 256)):
        array = zarr.create_array(made / name, shape=pixels.shape, chunks=(chunk, chunk, 3), dtype="u1")
        array[:] = pixels
    return made


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def streamed(budget: str) -> StreamingModel:
    return StreamingModel(net(), budget, preprocess=lambda tile: tile / 255)


def test_the_command_that_helps_can_be_pasted(tmp_path: Path) -> None:
    path = tmp_path / "my slide's.npy.png"
    Image.fromarray(np.zeros((900, 900, 3), np.uint8)).save(path)
    with pytest.raises(PlanDoesNotFit) as refused:
        streamed("1MiB")(open_image(path))
    command = str(refused.value).partition("`streamcnn convert ")[2].partition(" OUT`")[0]
    assert shlex.split(command) == [str(path)]


STORED = {
    "a.png": f"a PNG picture of {EDGE} x {EDGE} pixels, which is decoded whole",
    "strip.tif": f"TIFF strips of {EDGE} x {EDGE}",
    "one.zarr": f"zarr chunks of {EDGE} x {EDGE} x 3",
}


@pytest.mark.parametrize("name", STORED)
def test_an_image_too_large_to_be_decoded_is_refused_by_name(folder: Path, name: str) -> None:
    source, model = open_image(folder / name), streamed("40MiB")
    with pytest.raises(PlanDoesNotFit) as refused:
        model(source)
    text = str(refused.value)
    assert text.startswith(f"reading {folder / name} takes ")
    assert f"the image is stored as {STORED[name]}. " in text
    assert f"`streamcnn convert {folder / name} OUT`" in text
    assert source.held_bytes == source.bytes_read == 0
    assert model.last_report is None
    # What is named is enough.
    enough = text.partition("raise budget= to at least ")[2].partition(" bytes")[0]
    assert streamed(enough).plan(source).fits


@pytest.mark.parametrize("name", ["a.png", "strip.tif"])
def test_what_is_decoded_whole_is_in_the_plan_and_in_the_measured_peak(folder: Path, name: str) -> None:
    source, model = open_image(folder / name), streamed("300MiB")
    plan = model.plan(source)
    assert {term.name: term.nbytes for term in plan.terms}["decoded image"] == HELD
    assert "reading the image holds 19.3 MiB" in plan.explain()
    result = model(source)
    assert source.held_bytes == HELD
    result.sum().backward()
    assert source.held_bytes == 0
    assert HELD < model.last_report.measured_bytes <= plan.budget  # type: ignore[union-attr,operator]
    # Pages of the decoder's code are read in the first pass of a process, and are in no plan.
    model(source).sum().backward()
    assert HELD < model.last_report.measured_bytes <= plan.projected_bytes  # type: ignore[union-attr,operator]
    # Pixels that were decoded before the pass count as well.
    source.read(CORNER)
    with torch.no_grad():
        model(source)
    assert model.last_report.measured_bytes >= HELD  # type: ignore[union-attr,operator]
    assert source.held_bytes == 0


def test_chunks_are_counted_and_change_the_plan(folder: Path) -> None:
    source, model = open_image(folder / "chunked.zarr"), streamed("64MiB")
    assert source.reading_bytes((1, 1)) == (0, 2 * 3 * 256 * 256 + 2 * 3)
    plan = model.plan(source)
    assert plan.fits
    assert plan.image_held_bytes == 0
    assert plan.image_read_bytes >= 2 * 3 * 256 * 256
    assert model.plan((1, *source.shape)).image_read_bytes == 0
    model(source).sum().backward()
    assert model.last_report.measured_bytes <= 64 * 2**20  # type: ignore[union-attr,operator]


def test_an_image_that_another_pass_waits_with_is_kept(folder: Path) -> None:
    source, model = open_image(folder / "a.png"), streamed("300MiB")
    first, second = model(source), model(source)
    first.sum().backward()
    assert source.held_bytes == HELD
    second.sum().backward()
    assert source.held_bytes == 0


def test_an_augmented_image_takes_what_its_file_takes(folder: Path) -> None:
    stored = open_image(folder / "a.png")
    source = AugmentedSource(stored, Augmentation(quarter_turns=1))
    assert source.reading_cost.held == HELD
    assert source.reading_cost.opening == stored.reading_cost.opening
    # One pixel of a turned image, whose axes run backwards.
    assert torch.equal(
        source.read(CORNER)[:, 0, 0], stored.read(Region(Interval(0, 1), Interval(EDGE - 1, EDGE)))[:, 0, 0]
    )
    assert source.held_bytes == HELD
    source.release()
    assert stored.held_bytes == 0


def test_tensors_and_images_for_a_gpu_take_nothing_of_the_budget() -> None:
    source: ImageSource = TensorSource(torch.zeros(3, 8, 8))
    assert source.reading_bytes((4, 4)) == (0, 0)
    mapped = ArraySource(np.zeros((3, 8, 8), np.float32))
    assert BatchReader(mapped, torch.device("cpu")).reading.of((2, 2)) == (0, 3 * 4 * 2 * 2)
    assert BatchReader(mapped, torch.device("meta")).reading.costs == ()


def test_where_reading_the_image_takes_most_the_plan_says_so(tmp_path: Path) -> None:
    pixels = np.ones((3, 128, 128), np.uint8)
    zarr.create_array(tmp_path / "a.zarr", data=pixels, chunks=pixels.shape)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1))
    model = StreamingModel(net, tile=32, budget="1MiB", preprocess=lambda tile: tile / 255)
    assert model.plan([open_image(tmp_path / "a.zarr")]).worst_operator == "the image"
