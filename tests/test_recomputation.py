"""Maps that are computed again, through the barriers in between, instead of being stored."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from helpers import assert_streamed_equals_plain, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from test_random_networks import Step, assert_streams, networks, patient, tiles
from test_zoo import NETS
from torch import nn

from streamcnn.planning.search import Search, Solution

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class EveryOther:
    """Has the search compute maps again: all that may be, or every second or third of them."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.count = 0

    def __call__(self, search: Search, found: Solution) -> Solution:
        free = sorted(found.base.stored - search._whole, key=search.program.position)
        recomputed = frozenset(free[:: self.step])
        self.count += len(recomputed)
        return search.solution(found.base, recomputed, frozenset(), reuses_blocks=True)


@pytest.mark.parametrize(
    ("name", "size", "tile", "step"),
    [("resnet18", (67, 59), 40, 2), ("resnet18", (67, 59), 40, 3), ("unet", (53, 61), 24, 1)],
)
def test_networks(
    name: str, size: tuple[int, int], tile: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = EveryOther(step)
    monkeypatch.setattr(Search, "improved", lambda search, found: chosen(search, found))
    net = randomized(NETS[name]().double()).train()
    assert_streamed_equals_plain(net, (2, 3, *size), tile=tile, one_tile=True, resident=None)
    assert chosen.count


@settings(patient, max_examples=15)
@given(networks(), tiles, st.integers(1, 3))
def test_random_networks(
    case: tuple[list[Step], bool, bool, tuple[int, int, int, int]], tile: tuple[int, int], step: int
) -> None:
    with patch.object(Search, "improved", lambda search, found: EveryOther(step)(search, found)):
        assert_streams(case, tile)


def test_running_statistics_are_updated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Search, "improved", lambda search, found: EveryOther(1)(search, found))
    torch.manual_seed(0)
    net = nn.Sequential(
        *(
            m
            for width in (3, 4, 4)
            for m in (nn.Conv2d(width, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        ),
        nn.AdaptiveAvgPool2d(1),
    )
    found = assert_streamed_equals_plain(net.double().train(), (2, 3, 47, 39), tile=20)
    assert any(name.startswith("buffer") for name in found.errors)
