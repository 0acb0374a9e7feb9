"""Small pictures of large images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamcnn import TensorSource
from streamcnn.data import thumbnails
from streamcnn.data.thumbnails import sampled, shrunk, thumbnail
from streamcnn.geometry.regions import Region


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 300))
def test_pixels_are_the_means_of_blocks(height: int, width: int, factor: int, part: int) -> None:
    pixels = torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(height))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thumbnails, "PART_PIXELS", part)
        found = shrunk(TensorSource(pixels.to(torch.uint8)), factor)
    assert found.shape == (-(-height // factor), -(-width // factor), 3)
    for row, col in np.ndindex(found.shape[:2]):
        rows, cols = (slice(at * factor, (at + 1) * factor) for at in (row, col))
        block = pixels[:, rows, cols].double().mean((1, 2))
        assert found[row, col] == pytest.approx(block.numpy(), abs=0.501)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 300))
def test_samples_are_single_pixels(height: int, width: int, factor: int, part: int) -> None:
    pixels = torch.arange(height * width, dtype=torch.int32).reshape(1, height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thumbnails, "PART_PIXELS", part)
        found = sampled(TensorSource(pixels), factor)
    np.testing.assert_array_equal(found, pixels[:, ::factor, ::factor].numpy())


def test_a_wide_image_is_read_in_parts() -> None:
    class Watched(TensorSource):
        largest = 0

        def read(self, region: Region) -> torch.Tensor:
            self.largest = max(self.largest, region.rows.size * region.cols.size)
            return super().read(region)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thumbnails, "PART_PIXELS", 500)
        source = Watched(torch.zeros(1, 30, 2000, dtype=torch.uint8))
        shrunk(source, 10)
    assert source.largest <= 500


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 300), (100, 75)), ((50, 101), (50, 100)), ((9, 1000), (1, 100)), ((7, 9), (7, 9))],
)
def test_the_longer_side_has_the_edge_unless_it_is_smaller(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    picture = thumbnail(TensorSource(torch.zeros(1, *size, dtype=torch.uint8)), 100)
    assert (picture.height, picture.width) == expected


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (torch.full((1, 4, 4), 65535, dtype=torch.uint16), 255),
        (torch.full((1, 4, 4), 0.5), 128),
        (torch.full((2, 4, 4), 7.0), 255),
        (torch.full((4, 4, 4), 51, dtype=torch.uint8), 51),
    ],
)
def test_any_type_and_number_of_channels_is_shown(pixels: torch.Tensor, expected: int) -> None:
    found = np.asarray(thumbnail(TensorSource(pixels), 2))
    assert found.shape == (2, 2, 3)
    assert (found == expected).all()


def test_pixels_that_are_no_numbers_are_black_and_leave_others_alone() -> None:
    pixels = torch.full((1, 4, 4), 1.0)
    pixels[:, :2, :2] = torch.nan
    pixels[:, 2, 2], pixels[:, 2, 3] = torch.inf, -torch.inf
    found = np.asarray(thumbnail(TensorSource(pixels), 2))[..., 0]
    assert found.tolist() == [[0, 255], [255, 191]]


def test_boxes_are_marked_where_they_are() -> None:
    source = TensorSource(torch.zeros(1, 200, 100, dtype=torch.uint8))
    found = np.asarray(thumbnail(source, 100, [{"box": (100, 20, 160, 60), "value": 7}]))
    marked = np.argwhere(found[:, :, 0] == 255)
    assert (marked.max(0) == (80, 30)).all()
    assert marked[:, 1].min() == 9
    # The value is written above the box.
    assert (found[34:48, 10:25] != 0).any()
    assert (found[51:79, 11:29] == 0).all()
