"""Tiles as bands of full rows: as many as square ones, exact in memory and on disk."""

from __future__ import annotations

import dataclasses

import pytest
from helpers import assert_streamed_equals_plain, traced
from torch import nn

from streamcnn.plan.hardware import NOMINAL
from streamcnn.planning.backends import CpuBackend
from streamcnn.planning.candidates import TilingCandidates
from streamcnn.planning.staging import divide

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


@pytest.mark.parametrize("prefers", [False, True])
def test_every_stage_may_be_cut_into_bands_but_one_that_reads_the_image(prefers: bool) -> None:
    program, wanted = traced(make_net(), (1, 3, 4000, 4000))
    backend = dataclasses.replace(CpuBackend.on(2), prefers_bands=prefers)
    tilings = TilingCandidates(program, wanted, NOMINAL["cpu"], None, backend)
    for stage in divide(program).stages:
        grids = [(each.tiled.rows.num_parts, each.tiled.cols.num_parts) for each in tilings.of(stage)]
        assert len(grids) == len(set(grids))
        bands = [rows for rows, cols in grids if rows > 1 and cols == 1]
        squares = [rows * cols for rows, cols in grids if cols > 1]
        if program.image in stage.inputs:
            assert not bands
        else:
            assert bands[:3] == [2, 3, 4]
            # Where bands are preferred, as long as they are 256 input pixels high.
            assert (min(squares, default=16) < 4000 // 256) is not prefers, grids
        assert grids[0] == (1, 1)


@pytest.mark.parametrize("height", [1, 8, 17])
def test_bands_are_exact(height: int) -> None:
    assert_streamed_equals_plain(make_net(), SHAPE, tile=(height, SHAPE[3]))


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("height", [8, 17])
def test_bands_on_disk_are_exact(height: int) -> None:
    assert_streamed_equals_plain(make_net(), SHAPE, tile=(height, SHAPE[3]))
