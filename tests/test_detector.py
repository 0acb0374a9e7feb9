"""The row outside the rules: a detector of digits, its loss, and what the digits add up to."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.detector import (
    BACKGROUND,
    STRIDE,
    DetectorTrainer,
    DigitDetector,
    DigitSums,
    ImagesWithDigits,
    SourceWithDigits,
    detection_loss,
    digit_detector,
    digits_of,
    level_of,
    most_probable,
    sums,
)
from streamcnn import verify
from streamcnn.data.dataset import TileDataset
from streamcnn.data.tile_store import TileStore
from streamcnn.data.ultramnist import Recipe, Spec, load_digits
from streamcnn.data.ultramnist.generate import generate
from streamcnn.data.ultramnist.layout import REFERENCE_SIZE, PlacedDigit
from streamcnn.geometry.regions import Interval, Region
from streamcnn.training import TrainSettings


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> TileDataset:
    folder = tmp_path_factory.mktemp("images")
    spec = Spec(seed=0, recipe=Recipe.SINGLE, size=64)
    for _ in generate(folder, spec, load_digits("uci"), num_train=6, num_test=0, workers=0):
        pass
    return TileDataset(TileStore(folder), "train")


def placed(value: int, side: int, row: int, col: int) -> PlacedDigit:
    """A digit whose centre is there."""
    top, left = row - side // 2, col - side // 2
    return PlacedDigit(value, side, 1, Region(Interval(top, top + side), Interval(left, left + side)))


def maps_of(digits: list[PlacedDigit], size: int, num_levels: int, *, sure: float = 30.0) -> list[Tensor]:
    """What a detector gives that finds these digits and nothing else: logits (11, rows, columns)."""
    maps = []
    for level in range(num_levels):
        cell = STRIDE * 2**level
        logits = torch.zeros(11, size // cell, size // cell)
        logits[BACKGROUND] = sure
        for digit in digits:
            if level_of(digit, num_levels) == level:
                row, col = ((span.start + span.stop) // 2 // cell for span in digit.box)
                logits[:, row, col] = 0
                logits[digit.value, row, col] = sure
        maps.append(logits)
    return maps


DIGITS = [placed(7, 14, 30, 41), placed(0, 30, 90, 20), placed(9, 60, 60, 90)]


def test_each_digit_is_found_on_the_level_on_which_it_has_14_to_28_pixels() -> None:
    sides = {5: 0, 14: 0, 27: 0, 28: 1, 55: 1, 56: 2, 111: 2, 112: 2}
    assert {side: level_of(placed(1, side, 0, 0), 3) for side in sides} == sides


@pytest.mark.parametrize("size", [64, 128, 512, 1024, REFERENCE_SIZE])
def test_the_levels_reach_the_largest_digits(size: int) -> None:
    num_levels = digit_detector(10, size).num_levels
    # At the paper's size, 2128 pixels.
    largest = 2128 if size == REFERENCE_SIZE else size // 2
    assert largest < 28 * 2 ** (num_levels - 1)
    assert size // (STRIDE * 2 ** (num_levels - 1)) >= 1


def test_the_loss_is_least_where_every_digit_is_found_at_its_place() -> None:
    found = detection_loss(maps_of(DIGITS, 128, 3), DIGITS)
    assert found < 1e-6
    for change in (
        placed(6, 14, 30, 41),  # another value
        placed(7, 14, 30, 65),  # another place
        placed(7, 56, 30, 41),  # another level
    ):
        assert detection_loss(maps_of([change, *DIGITS[1:]], 128, 3), DIGITS) > 1
    assert detection_loss(maps_of([*DIGITS, placed(1, 14, 110, 110)], 128, 3), DIGITS) > 1
    assert detection_loss(maps_of([], 128, 3), []) < 1e-6


def test_cells_that_a_digit_covers_beside_its_own_do_not_count() -> None:
    digits = [placed(3, 30, 64, 64)]
    maps = [logits.requires_grad_() for logits in maps_of(digits, 128, 4, sure=1.0)]
    detection_loss(maps, digits).backward()
    counts = [(logits.grad != 0).any(0) for logits in maps if logits.grad is not None]
    # On its own level, cells of 16 pixels: one of the four that its box meets.
    assert counts[1].sum() == 64 - 4 + 1
    assert counts[1][4, 4]
    # None of those on the levels beside it, and all on the next.
    assert (counts[0].sum(), counts[2].sum()) == (256 - 16, 16 - 4)
    assert counts[3].all()


def test_sums_are_those_of_independent_digits() -> None:
    torch.manual_seed(0)
    first, second = torch.rand(11).log(), torch.rand(11).log()
    logits = torch.zeros(1, 11, 16, 16)
    logits[:, BACKGROUND] = 40
    logits[0, :, 2, 3], logits[0, :, 9, 9] = first, second
    expected = torch.zeros(15)
    for (a, p), (b, q) in itertools.product(*(enumerate(torch.softmax(x, 0)) for x in (first, second))):
        expected[min(14, sum(value for value in (a, b) if value != BACKGROUND))] += p * q
    assert torch.allclose(sums([logits], 15)[0].exp(), expected, atol=1e-5)
    nothing = sums([logits[:, :, 12:, 12:]], 15)[0].exp()
    assert nothing.argmax() == 0
    assert torch.isfinite(nothing.log()).all()


def test_a_digit_is_found_once() -> None:
    def found(*digits: PlacedDigit) -> list[int]:
        maps = [torch.softmax(logits, 0) for logits in maps_of(list(digits), 128, 3)]
        return sorted(int(cell.argmax()) for cell in most_probable(maps))

    assert found(*DIGITS) == [0, 7, 9]
    # The same one by the next cell, or on the next level.
    assert found(placed(4, 20, 60, 60), placed(4, 20, 60, 60 + STRIDE)) == [4]
    assert found(placed(4, 27, 60, 60), placed(4, 28, 60, 60)) == [4]
    # One beside another, of the same size or not, is another.
    assert found(placed(8, 30, 64, 40), placed(1, 14, 64, 64)) == [1, 8]
    assert found(placed(8, 56, 64, 64), placed(1, 14, 64, 100)) == [1, 8]
    assert found(placed(8, 17, 64, 64), placed(1, 17, 64, 81)) == [1, 8]


def test_the_detector_streams_exactly() -> None:
    verification = verify(digit_detector(10, 200), (2, 1, 200, 200), tile=64)
    assert max(verification.errors.values()) < 1e-9
    assert verification.num_tiles > 4


def test_images_bring_their_digits(images: TileDataset) -> None:
    told = ImagesWithDigits(images)
    assert len(told) == 6
    assert (told.labels, told.fingerprint) == (images.labels, images.fingerprint)
    source, label = told[1]
    plain, _ = images[1]
    assert isinstance(source, SourceWithDigits)
    [digit] = source.digits
    assert digit.value == label == images.labels[1]
    whole = Region.whole((64, 64))
    assert torch.equal(source.read(whole), plain.read(whole))
    # Where it is said to be, it is: the canvas is empty elsewhere.
    assert source.read(digit.box).sum() == source.read(whole).sum() > 0
    copy = pickle.loads(pickle.dumps(source))
    assert copy.digits == source.digits
    assert torch.equal(copy.read(whole), source.read(whole))


def test_it_is_trained_on_them(images: TileDataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DigitSums(DigitDetector(10, 2), preprocess=lambda tile: tile / 255)
    settings = TrainSettings(epochs=25, batch_size=3, learning_rate=3e-3)
    losses: list[float] = []

    def listen(kind: str, values: Any) -> None:
        if kind == "update":
            losses.append(values["loss"])

    trainer = DetectorTrainer(model, ImagesWithDigits(images), images, settings, tmp_path, listener=listen)
    trainer.run()
    assert sum(losses[-4:]) < 0.1 * sum(losses[:4])
    sources = [images[position][0] for position in range(6)]
    assert model.train()(sources)[0].shape == (6, 11, 8, 8)
    logits = model.eval()(sources)
    assert logits.shape == (6, 10)
    assert (logits.argmax(1) == torch.tensor(images.labels)).sum() >= 5


def test_the_truth_of_a_store_is_read() -> None:
    truth = [{"value": 3, "side": 20, "factor": 1, "box": [10, 20, 30, 40]}]
    assert digits_of(truth) == [PlacedDigit(3, 20, 1, Region(Interval(10, 30), Interval(20, 40)))]
