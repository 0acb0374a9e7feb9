"""Augmentations: any region of an augmented image is the region of the image augmented whole."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamcnn.data.augmentation import Augmentation, AugmentedSource, RandomAugmentation
from streamcnn.data.sources import TensorSource
from streamcnn.geometry.regions import Interval, Region

IMAGE = torch.arange(2 * 5 * 7, dtype=torch.uint8).view(2, 5, 7)


def augmented(image: Tensor, augmentation: Augmentation) -> Tensor:
    source = AugmentedSource(TensorSource(image), augmentation)
    return source.read(Region.whole(source.shape[1:]))


def test_mirrors_and_turns_are_what_they_say() -> None:
    assert torch.equal(augmented(IMAGE, Augmentation(mirror=True)), IMAGE.flip(2))
    for turns in range(4):
        assert torch.equal(augmented(IMAGE, Augmentation(quarter_turns=turns)), IMAGE.rot90(turns, (1, 2)))
    both = augmented(IMAGE, Augmentation(mirror=True, quarter_turns=1))
    assert torch.equal(both, IMAGE.flip(2).rot90(1, (1, 2)))


@given(data=st.data(), mirror=st.booleans(), turns=st.integers(0, 3), invert=st.booleans())
def test_any_region_is_that_of_the_whole(data: st.DataObject, mirror: bool, turns: int, invert: bool) -> None:
    augmentation = Augmentation(mirror=mirror, quarter_turns=turns, invert=invert, gain=1.3)
    source = AugmentedSource(TensorSource(IMAGE), augmentation)
    intervals = []
    for size in source.shape[1:]:
        start = data.draw(st.integers(0, size - 1))
        intervals.append(Interval(start, data.draw(st.integers(start + 1, size))))
    rows, cols = intervals
    whole = augmented(IMAGE, augmentation)
    found = source.read(Region(rows, cols))
    assert torch.equal(found, whole[:, rows.start : rows.stop, cols.start : cols.stop])


@pytest.mark.parametrize(
    ("dtype", "least", "largest"),
    [
        (torch.uint8, 0, 255),
        (torch.uint16, 0, 65535),
        (torch.int16, -(2**15), 2**15 - 1),
        (torch.int32, -(2**31), 2**31 - 1),
        (torch.float32, 0.0, 1.0),
    ],
)
def test_intensities_stay_in_their_range(dtype: torch.dtype, least: float, largest: float) -> None:
    shares = torch.tensor([[[0.0, 0.25, 0.5, 1.0]]], dtype=torch.float64)
    image = (least + shares * (largest - least)).to(dtype)
    inverted = augmented(image, Augmentation(invert=True))
    assert inverted.dtype == dtype
    assert torch.equal(inverted.double(), least + largest - image.double())
    stronger = augmented(image, Augmentation(gain=2.0))
    assert stronger.dtype == dtype
    middle = (least + largest) / 2
    expected = (image.double() - middle) * 2 + middle
    if not dtype.is_floating_point:
        expected = expected.round().clamp(least, largest)
    assert torch.equal(stronger.double(), expected)


def test_a_draw_depends_on_its_arguments_alone() -> None:
    chances = RandomAugmentation(mirrors=True, turns=True, inversion=0.25, gains=(0.8, 1.25))
    drawn = [chances.draw(seed=1, epoch=2, index=index) for index in range(2000)]
    assert drawn == [chances.draw(seed=1, epoch=2, index=index) for index in range(2000)]
    assert drawn != [chances.draw(seed=1, epoch=3, index=index) for index in range(2000)]
    # Five standard deviations of a binomial share.
    assert sum(a.mirror for a in drawn) / 2000 == pytest.approx(0.5, abs=0.056)
    assert sum(a.invert for a in drawn) / 2000 == pytest.approx(0.25, abs=0.049)
    for turns in range(4):
        assert sum(a.quarter_turns == turns for a in drawn) / 2000 == pytest.approx(0.25, abs=0.049)
    assert all(0.8 <= a.gain <= 1.25 for a in drawn)
    assert sum(a.gain < 1 for a in drawn) / 2000 == pytest.approx(0.5, abs=0.056)


def test_nothing_happens_unless_it_is_asked_for() -> None:
    assert RandomAugmentation().draw(seed=0, epoch=0, index=0).is_identity


def test_a_copy_in_another_process_is_the_same() -> None:
    source = AugmentedSource(TensorSource(IMAGE), Augmentation(mirror=True, quarter_turns=3))
    copy = pickle.loads(pickle.dumps(source))
    region = Region(Interval(1, 4), Interval(2, 5))
    assert torch.equal(copy.read(region), source.read(region))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Augmentation(quarter_turns=4), "quarter_turns=4: allowed are 0, 1, 2 and 3"),
        (lambda: Augmentation(gain=0), "gain=0: allowed are positive"),
        (lambda: RandomAugmentation(inversion=2), "inversion=2: allowed are shares"),
        (lambda: RandomAugmentation(gains=(2, 1)), r"gains=\(2, 1\): allowed is"),
    ],
)
def test_wrong_settings_are_named(make: object, text: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=text):
        make()
