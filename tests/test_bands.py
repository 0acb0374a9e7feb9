"""Tiles as bands of full rows: as many as square ones, exact in memory and on disk."""

from __future__ import annotations

import pytest
from helpers import assert_streamed_equals_plain, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import programs
from torch import nn

from streamcnn.graph.program import Program
from streamcnn.plan.hardware import NOMINAL
from streamcnn.planning.backends import CpuBackend
from streamcnn.planning.candidates import TilingCandidates
from streamcnn.planning.staging import divide
from streamcnn.planning.tiling import Outline, bands, grid, tile_stage

SHAPE = (2, 3, 61, 47)


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(5, 7, 5, padding=2),
        nn.BatchNorm2d(7),
        nn.SiLU(),
        nn.Conv2d(7, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@settings(max_examples=60)
@given(programs(), st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_there_are_as_many_bands_as_tiles(program: Program, tile: tuple[int, int]) -> None:
    for stage in divide(program).stages:
        outline = Outline.of(program, stage)
        parts = grid(outline, tile)
        found = bands(outline, parts)
        num_rows = min(program.nodes[name].size[0] for name in outline.owned)
        assert (found is None) == (parts[1] == 1 or parts[0] * parts[1] > num_rows)
        if found is not None:
            assert found[1] == 1
            assert tile_stage(outline, found).num_tiles == parts[0] * parts[1]


def test_every_stage_may_be_cut_into_bands_but_one_that_reads_the_image() -> None:
    program, wanted = traced(make_net(), (1, 3, 4000, 4000))
    tilings = TilingCandidates(program, wanted, NOMINAL["cpu"], None, CpuBackend.on(2))
    for stage in divide(program).stages:
        grids = [(each.tiled.rows.num_parts, each.tiled.cols.num_parts) for each in tilings.of(stage)]
        has_bands = any(rows > 1 and cols == 1 for rows, cols in grids)
        assert has_bands == (program.image not in stage.inputs), grids
        assert len(grids) == len(set(grids))


@pytest.mark.parametrize("height", [1, 8, 17])
def test_bands_are_exact(height: int) -> None:
    assert_streamed_equals_plain(make_net(), SHAPE, tile=(height, SHAPE[3]))


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("height", [8, 17])
def test_bands_on_disk_are_exact(height: int) -> None:
    assert_streamed_equals_plain(make_net(), SHAPE, tile=(height, SHAPE[3]))
