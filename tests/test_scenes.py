"""Synthetic images of digits: the same every time, digits apart, labels right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from streamcnn.data import scenes
from streamcnn.data.digits import draw, glyphs_by_digit
from streamcnn.data.scenes import LABELS_FILE, make_scene, open_scenes, write_scenes
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.regions import Region

SIZE = 256


def test_a_scene_depends_on_its_arguments_alone() -> None:
    first = make_scene(seed=3, index=1, size=SIZE)
    make_scene(seed=3, index=2, size=SIZE)
    again = make_scene(seed=3, index=1, size=SIZE)
    np.testing.assert_array_equal(first.image, again.image)
    assert first.digits == again.digits


def test_seed_and_index_both_matter() -> None:
    images = {
        make_scene(seed=seed, index=index, size=64).image.tobytes() for seed in range(3) for index in range(3)
    }
    assert len(images) == 9


@pytest.mark.parametrize("index", range(40))
def test_digits_are_apart_in_the_image_and_sum_to_the_label(index: int) -> None:
    scene = make_scene(seed=0, index=index, size=SIZE)
    assert scene.image.shape == (1, SIZE, SIZE)
    assert scene.image.dtype == np.uint8
    assert set(np.unique(scene.image)) == {0, 255}
    assert 3 <= len(scene.digits) <= 5
    assert scene.label == sum(placed.digit for placed in scene.digits) <= 27
    covered = np.zeros((SIZE, SIZE), dtype=np.int64)
    for placed in scene.digits:
        rows, cols = placed.region
        assert Region.whole((SIZE, SIZE)).contains(placed.region)
        assert 14 <= rows.size == cols.size <= SIZE // 2
        covered[rows.start : rows.stop, cols.start : cols.stop] += 1
    assert covered.max() == 1


def test_the_digits_are_what_differs_from_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_scene(seed=0, index=5, size=SIZE)
    monkeypatch.setattr(scenes, "_invert_digit", lambda ink, placed: None)
    background = make_scene(seed=0, index=5, size=SIZE).image[0]
    for placed in scene.digits:
        rows, cols = placed.region
        window = np.s_[rows.start : rows.stop, cols.start : cols.stop]
        glyph = glyphs_by_digit()[placed.digit][placed.glyph]
        np.testing.assert_array_equal(scene.image[0][window] != background[window], draw(glyph, rows.size))


def test_sides_prefer_both_extremes() -> None:
    sides = [
        placed.region.rows.size
        for index in range(100)
        for placed in make_scene(seed=1, index=index, size=128).digits
    ]
    shares, _ = np.histogram(sides, bins=3, range=(14, 64))
    assert shares[1] < shares[0]
    assert shares[1] < shares[2]


def test_refuses_images_without_room() -> None:
    with pytest.raises(
        ValueError, match="image size 63 is too small for five digits: allowed are 64 and more"
    ):
        make_scene(seed=0, index=0, size=63)


def test_draw_at_its_own_size_keeps_the_scan() -> None:
    glyph = glyphs_by_digit()[7][0]
    np.testing.assert_array_equal(draw(glyph, 8), glyph > 7)


def test_written_scenes_read_back(tmp_path: Path) -> None:
    write_scenes(tmp_path, 3, SIZE, seed=4)
    opened = open_scenes(tmp_path)
    assert len(opened) == 3
    for index, (source, label) in enumerate(opened):
        scene = make_scene(seed=4, index=index, size=SIZE)
        assert label == scene.label
        pixels = source.read(Region.whole((SIZE, SIZE)))
        torch.testing.assert_close(pixels, torch.from_numpy(scene.image), rtol=0, atol=0)


def test_labels_are_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scenes(tmp_path, 1, 64, seed=0)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(scenes, "write_zarr_image", fail)
    with pytest.raises(OSError, match="disk full"):
        write_scenes(tmp_path, 2, 64, seed=0)
    with pytest.raises(DatasetMismatch, match=r"no labels\.json in .*write the images again"):
        open_scenes(tmp_path)


def test_damaged_labels_are_named(tmp_path: Path) -> None:
    (tmp_path / LABELS_FILE).write_text('{"0000.zarr": 3')
    with pytest.raises(CorruptImage, match=r"cannot parse .*labels\.json"):
        open_scenes(tmp_path)
    (tmp_path / LABELS_FILE).write_text(json.dumps({"0000.zarr": 3}))
    with pytest.raises(CorruptImage, match=r"no zarr array at .*0000\.zarr"):
        open_scenes(tmp_path)
