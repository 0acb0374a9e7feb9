"""Images: every pixel by brute force on small canvases, the same bytes everywhere."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamcnn.data.ultramnist import Digits, DigitSet, Recipe, Spec, load_digits, make_image, make_layout
from streamcnn.data.ultramnist import background as backgrounds
from streamcnn.data.ultramnist.background import Background, Circle, Triangle, changes, draw_background
from streamcnn.data.ultramnist.draws import Draws
from streamcnn.support import torchvision_import

Mask = NDArray[np.bool_]

GOLDEN = {
    (Recipe.FAITHFUL, 500, "train", 0): "49c2930049517b28ad1ddc22b44b9d51495eddb6820bbfdcbebab5261bdac261",
    (Recipe.FAITHFUL, 500, "test", 5): "6af5232d96e4039326d3a6814ab2e906003e9b1b5010091049420793cbf01617",
    (Recipe.FAITHFUL, 4000, "train", 0): "933166e33f0166e03e7c104642567eec0215e914680849c412d5da97e52c432d",
    (
        Recipe.FAITHFUL,
        4000,
        "test",
        27_999,
    ): "f5e53e9cb8a77883b2e1d759972892ddb1487ef3e549ab97c51d1d4422592e37",
    (Recipe.SINGLE, 512, "train", 0): "ec43a6c3664e24a502f61ebd1ab3bfcd03198c0990fed72816933bf156a3bc7d",
    (Recipe.SINGLE, 512, "test", 5): "c2c4aa1f73ce3e46d655b00b201870c0e819e73ec06fb01e076aef3fd938d89a",
    (Recipe.BALANCED, 500, "train", 0): "b9a334d2c64be59fec85b7e7f79ce9399e0e7611f2a5a62d1b90047d4fc0ebac",
    (Recipe.BALANCED, 500, "test", 5): "3f93d9824177761b1e9cbe4042d84a30ab74a6a1c61c90faa1504a97f643254f",
    (Recipe.BALANCED, 4000, "train", 0): "ce12bbdbe4fbdc4279be322d1a27d51b480d52e643039aee89cd41b118f9930e",
    (
        Recipe.BALANCED,
        4000,
        "test",
        27_999,
    ): "05d1879614c2a5141730e7c045587f8a507734102c503dfd83000b1b35da2634",
}

recipes = pytest.mark.parametrize("recipe", Recipe)


@functools.cache
def uci() -> Digits:
    return load_digits("uci")


def hash_of(recipe: Recipe, size: int, split: str, index: int) -> str:
    image = make_image(Spec(2206, recipe, size), split, index, uci())
    return hashlib.sha256(image.pixels.tobytes()).hexdigest()


# Determinism


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "-".join(map(str, case)))
def test_images_are_the_same_everywhere(case: tuple[Recipe, int, str, int]) -> None:
    assert hash_of(*case) == GOLDEN[case]


def test_images_do_not_depend_on_order_or_process() -> None:
    cases = [(recipe, 200, "train", index) for recipe in Recipe for index in range(6)]
    in_order = [hash_of(*case) for case in cases]
    assert [hash_of(*case) for case in reversed(cases)] == in_order[::-1]
    code = (
        "import json, test_ultramnist_image as t\n"
        "print(json.dumps([t.hash_of(recipe, 200, 'train', 5) for recipe in t.Recipe]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == in_order[5::6]


def test_every_part_of_the_key_matters() -> None:
    keys = [
        (Spec(seed, recipe, size), split, index)
        for seed in (0, 1)
        for recipe in Recipe
        for size in (64, 65)
        for split in ("train", "test")
        for index in (0, 1)
    ]
    images = {make_image(*key, uci()).pixels.tobytes() for key in keys}
    assert len(images) == len(keys) == 48


# The whole image


def nearest(glyph: Mask, side: int) -> Mask:
    drawn = [[glyph[row * 28 // side, col * 28 // side] for col in range(side)] for row in range(side)]
    return np.array(drawn)


@recipes
@pytest.mark.parametrize("size", [64, 97])
def test_an_image_is_its_digits_xor_its_background(recipe: Recipe, size: int) -> None:
    spec = Spec(1, recipe, size)
    for index in range(8):
        image = make_image(spec, "test", index, uci())
        assert image.pixels.shape == (1, size, size)
        assert image.pixels.dtype == np.uint8
        assert image.layout == make_layout(spec, "test", index)
        background = draw_background(Draws("background", seed=1, split="test", index=index, size=size), size)
        empty = np.zeros((size, size), np.bool_)
        expected = empty if recipe is Recipe.SINGLE else draw(background)
        for digit, glyph in zip(image.layout.digits, image.glyphs, strict=True):
            assert uci().test.labels[glyph] == digit.value
            window = np.s_[
                digit.box.rows.start : digit.box.rows.stop, digit.box.cols.start : digit.box.cols.stop
            ]
            expected[window] ^= nearest(uci().test.images[glyph], digit.side)
        np.testing.assert_array_equal(image.pixels[0], np.where(expected, 255, 0))


def test_glyphs_of_a_digit_are_equally_likely_and_of_the_split() -> None:
    four_each = DigitSet(np.zeros((40, 28, 28), dtype=np.bool_), np.arange(40, dtype=np.uint8) // 4)
    one_each = DigitSet(np.ones((10, 28, 28), dtype=np.bool_), np.arange(10, dtype=np.uint8))
    digits = Digits("idx", "", four_each, one_each, ())
    spec = Spec(0, Recipe.BALANCED, 64)
    drawn: Counter[int] = Counter()
    for index in range(300):
        drawn.update(glyph % 4 for glyph in make_image(spec, "train", index, digits).glyphs)
    assert max(drawn.values()) - min(drawn.values()) < 4 * math.sqrt(drawn.total() / 2)
    image = make_image(spec, "test", 0, digits)
    assert list(image.glyphs) == [digit.value for digit in image.layout.digits]


def test_an_image_takes_little_more_memory_than_its_pixels() -> None:
    make_image(Spec(0, Recipe.BALANCED, 64), "train", 0, uci())
    tracemalloc.start()
    make_image(Spec(0, Recipe.BALANCED, 4000), "train", 0, uci())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 4000 * 4000


# The background, pixel by pixel


def draw(background: Background) -> Mask:
    """Every pixel of grid XOR shapes on its own, the grid from its definition in floating point."""
    pixels = [(row, col) for row in range(background.size) for col in range(background.size)]
    in_shape = [
        any(in_circle(pixel, circle) for circle in background.circles)
        or any(in_triangle(pixel, triangle) for triangle in background.triangles)
        for pixel in pixels
    ]
    return grid(background)[0] ^ np.array(in_shape).reshape(background.size, background.size)


def in_circle(pixel: tuple[int, int], circle: Circle) -> bool:
    return (pixel[0] - circle.row) ** 2 + (pixel[1] - circle.col) ** 2 <= circle.radius**2


def in_triangle(pixel: tuple[int, int], triangle: Triangle) -> bool:
    """Whether a convex combination of the corners gives the pixel; exact, degenerate ones included."""
    (r, c), (r0, c0), (r1, c1), (r2, c2) = pixel, *triangle
    area = (r1 - r0) * (c2 - c0) - (c1 - c0) * (r2 - r0)
    if area:
        s = Fraction((r - r0) * (c2 - c0) - (c - c0) * (r2 - r0), area)
        t = Fraction((r1 - r0) * (c - c0) - (c1 - c0) * (r - r0), area)
        return s >= 0 and t >= 0 and s + t <= 1
    return any(on_line(pixel, *ends) for ends in pairwise((*triangle, triangle[0])))


def on_line(pixel: tuple[int, int], a: tuple[int, int], b: tuple[int, int]) -> bool:
    (r, c), (r0, c0), (r1, c1) = pixel, a, b
    cross = (r1 - r0) * (c - c0) - (c1 - c0) * (r - r0)
    return cross == 0 and min(r0, r1) <= r <= max(r0, r1) and min(c0, c1) <= c <= max(c0, c1)


def grid(background: Background) -> tuple[Mask, NDArray[np.float64]]:
    """The turned grid, and how far each pixel is from the next line between cells, in cells."""
    size, cells = background.size, background.cells
    angle, shear = (math.radians(value / 1e6) for value in (background.rotation, background.shear))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    forward = rotation @ np.array([[1, -math.tan(shear)], [0, 1]]) * (background.scale / 1e6)
    # Enlarging the middle half puts pixel i at (i + 1/2) / 2 from a quarter of the canvas on.
    at = (np.arange(size) + 0.5) / 2 - size / 4
    x, y = np.meshgrid(at, at)
    source = np.linalg.inv(forward) @ np.stack([x.ravel(), y.ravel()]) / size * len(cells) + len(cells) / 2
    col, row = (np.floor(axis).astype(int) + 1 for axis in source)
    bordered = np.pad(cells, 1)
    picture = bordered[row.clip(0, len(cells) + 1), col.clip(0, len(cells) + 1)]
    distance = abs(source - np.round(source)).min(axis=0)
    return picture.reshape(size, size), distance.reshape(size, size)


def integrate(changed: Mask) -> Mask:
    return np.logical_xor.accumulate(changed, axis=0)


def make_background(size: int, *shapes: Circle | Triangle) -> Background:
    """A background of shapes alone."""
    circles = tuple(shape for shape in shapes if isinstance(shape, Circle))
    triangles = tuple(shape for shape in shapes if isinstance(shape, Triangle))
    return Background(size, np.zeros((12, 12), dtype=np.bool_), 0, 0, 1_000_000, circles, triangles)


@st.composite
def shapes(draw_one: st.DrawFn, size: int) -> Circle | Triangle:
    point = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))
    if draw_one(st.booleans()):
        return Circle(*draw_one(point), draw_one(st.integers(1, 2 * size)))
    return Triangle(draw_one(point), draw_one(point), draw_one(point))


@settings(max_examples=150)
@given(st.integers(1, 23).flatmap(lambda size: st.tuples(st.just(size), st.lists(shapes(size), max_size=8))))
def test_shapes_are_what_their_definition_says(case: tuple[int, list[Circle | Triangle]]) -> None:
    background = make_background(case[0], *case[1])
    np.testing.assert_array_equal(integrate(changes(background)), draw(background))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(2, 70),
    rotation=st.integers(-45_000_000, 45_000_000),
    shear=st.integers(-50_000_000, 50_000_000),
    scale=st.integers(800_000, 1_200_000),
)
def test_the_grid_is_turned_sheared_and_scaled(
    seed: int, size: int, rotation: int, shear: int, scale: int
) -> None:
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 2, (rng.integers(12, 24),) * 2).astype(np.bool_)
    background = Background(size, cells, rotation, shear, scale, (), ())
    expected, distance = grid(background)
    # Floating point cannot tell the sides of a line when a pixel lies on it.
    sure = distance > 1e-9
    np.testing.assert_array_equal(integrate(changes(background))[sure], expected[sure])


@pytest.mark.parametrize("angle", [0, 1, -1, 30_000_000, 45_000_000, -45_000_000])
@pytest.mark.parametrize("shear", [0, 45_000_000, -45_000_000, -50_000_000])
def test_pixels_on_lines_are_no_exception(angle: int, shear: int) -> None:
    """Changes from row to row add up to what each pixel shows by itself, also with pixels on lines."""
    for num_cells, size in ((12, 64), (23, 75), (16, 128)):
        cells = np.random.default_rng(size).integers(0, 2, (num_cells, num_cells)).astype(np.bool_)
        background = Background(size, cells, angle, shear, 1_000_000, (), ())
        rows, cols = np.indices((size, size))
        expected = backgrounds.colours(background, backgrounds.axes_of(background), rows, cols)
        np.testing.assert_array_equal(integrate(changes(background)), expected)


def test_the_transform_is_torchvisions() -> None:
    """Same rotation, shear, order and centre; the pixels differ at most along the cells' edges."""
    torchvision_import.install()
    functional = pytest.importorskip("torchvision.transforms.functional")
    size = 480
    cells = np.random.default_rng(0).integers(0, 2, (12, 12)).astype(np.bool_)
    background = Background(size, cells, 31_000_000, -44_000_000, 900_000, (), ())
    whole = torch.from_numpy(np.kron(cells, np.ones((size // 12, size // 12), dtype=np.uint8)))[None]
    turned = functional.affine(whole, angle=31.0, translate=[0, 0], scale=0.9, shear=[-44.0, 0.0])
    half = functional.center_crop(turned, size // 2)[0].numpy()
    expected = half.repeat(2, axis=0).repeat(2, axis=1).astype(np.bool_)
    agreement = (integrate(changes(background)) == expected).mean()
    assert agreement > 0.97


def test_outside_of_the_grid_is_black() -> None:
    cells = np.ones((12, 12), dtype=np.bool_)
    background = Background(400, cells, 45_000_000, 50_000_000, 800_000, (), ())
    picture = integrate(changes(background))
    assert 0.5 < picture.mean() < 1
    assert picture[150:250, 150:250].all()


def test_sines_and_cosines_need_no_library() -> None:
    for angle in (-95_000_000, -45_000_000, -1, 0, 1, 12_345_678, 50_000_000, 95_000_000):
        sin, cos = (value / 2**80 for value in backgrounds.sin_cos(angle))
        assert sin == pytest.approx(math.sin(math.radians(angle / 1e6)), abs=1e-15)
        assert cos == pytest.approx(math.cos(math.radians(angle / 1e6)), abs=1e-15)


# What backgrounds are drawn


def test_backgrounds_are_drawn_from_their_whole_ranges() -> None:
    drawn = [draw_background(Draws("background", index=index), 4000) for index in range(600)]
    assert {len(background.cells) for background in drawn} == set(range(12, 24))
    assert {len(background.circles) for background in drawn} == set(range(5))
    assert {len(background.triangles) for background in drawn} == set(range(5))
    assert 0.49 < np.mean([background.cells.mean() for background in drawn]) < 0.51
    circles = [circle for background in drawn for circle in background.circles]
    corners = [corner for background in drawn for triangle in background.triangles for corner in triangle]
    for values, low, high in (
        ([background.rotation for background in drawn], -45_000_000, 45_000_000),
        ([background.shear for background in drawn], -50_000_000, 50_000_000),
        ([background.scale for background in drawn], 800_000, 1_200_000),
        ([circle.radius for circle in circles], 50, 999),
        ([circle.row for circle in circles], 0, 3999),
        ([circle.col for circle in circles], 0, 3999),
        ([row for row, _ in corners], 0, 3999),
        ([col for _, col in corners], 0, 3999),
    ):
        assert_uniform(values, low, high)


def assert_uniform(values: list[int], low: int, high: int) -> None:
    """All within the bounds, and as many in each tenth of the range as chance allows (4 sigma)."""
    assert low <= min(values) < max(values) <= high
    counts, _ = np.histogram(values, bins=10, range=(low, high + 1))
    assert abs(counts - len(values) / 10).max() < 4 * math.sqrt(len(values) * 0.09)


def test_radii_are_proportional_to_the_canvas() -> None:
    drawn = [draw_background(Draws("background", index=index), 400) for index in range(300)]
    radii = {circle.radius for background in drawn for circle in background.circles}
    assert min(radii) == 5
    assert 95 <= max(radii) <= 100
