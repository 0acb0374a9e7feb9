"""Maps that are computed again: through the barriers in between, instead of being stored, or once more into
their stores in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from helpers import assert_streamed_equals_plain, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from test_random_networks import Step, assert_streams, networks, patient, tiles
from torch import nn

from benchmarks.networks import UNet
from streamcnn import StreamingModel
from streamcnn.planning.policies import Policies
from streamcnn.planning.search import Search, Solution
from streamcnn.support.models import load_model

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class EveryOther:
    """Has the search recompute or drop maps: all that may be, or every second or third of them."""

    def __init__(self, recomputed: int | None, dropped: int | None = None) -> None:
        self.recomputed = recomputed
        self.dropped = dropped
        self.count = 0

    def __call__(self, search: Search, found: Solution) -> Solution:
        maps = sorted(found.base.stored, key=search.program.position)
        free = [name for name in maps if name not in search.whole]
        recomputed = frozenset(free[:: self.recomputed] if self.recomputed else ())
        left = [name for name in maps if name not in recomputed]
        dropped = frozenset(left[:: self.dropped] if self.dropped else ())
        solution = search.solution(
            found.base, Policies(dropped=dropped, recomputed=recomputed), reuses_blocks=True
        )
        self.count += len(recomputed) + len(solution.rematerialised)
        return solution


NETS: dict[str, Callable[[], nn.Module]] = {
    # Of few channels: which maps are stored and recomputed does not depend on their number.
    "resnet18": lambda: load_model("resnet18", num_classes=5, channels=(8, 12, 16, 24)),
    "unet": lambda: UNet(6),
}


@pytest.mark.parametrize(
    ("name", "size", "tile", "recomputed", "dropped"),
    [
        ("resnet18", (67, 59), 40, 2, None),
        ("resnet18", (67, 59), 40, 3, None),
        ("unet", (53, 61), 24, 1, None),
        ("resnet18", (67, 59), 40, None, 1),
        ("unet", (53, 61), 24, None, 2),
        ("resnet18", (67, 59), 40, 3, 2),
    ],
)
def test_networks(
    name: str,
    size: tuple[int, int],
    tile: int,
    recomputed: int | None,
    dropped: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = EveryOther(recomputed, dropped)
    monkeypatch.setattr(Search, "improved", lambda search, found: chosen(search, found))
    net = randomized(NETS[name]().double()).train()
    assert_streamed_equals_plain(net, (2, 3, *size), tile=tile, one_tile=True, resident=None)
    assert chosen.count


@settings(patient, max_examples=15)
@given(networks(), tiles, st.none() | st.integers(1, 3), st.none() | st.integers(1, 3))
def test_random_networks(
    case: tuple[list[Step], bool, bool, tuple[int, int, int, int]],
    tile: tuple[int, int],
    recomputed: int | None,
    dropped: int | None,
) -> None:
    chosen = EveryOther(recomputed, dropped)
    with patch.object(Search, "improved", lambda search, found: chosen(search, found)):
        assert_streams(case, tile)


@pytest.mark.parametrize(("recomputed", "dropped"), [(1, None), (None, 1)])
def test_running_statistics_are_updated_once(
    recomputed: int | None, dropped: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = EveryOther(recomputed, dropped)
    monkeypatch.setattr(Search, "improved", lambda search, found: chosen(search, found))
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


def test_a_dropped_map_is_computed_once_more_and_no_oftener(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = EveryOther(None, 1)
    monkeypatch.setattr(Search, "improved", lambda search, found: chosen(search, found))
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (3, 8, 8, 8):
        layers += [nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = StreamingModel(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)), tile=64)
    image = torch.randn(1, 3, 96, 80)
    plan = model.plan(tuple(image.shape))
    # Of a forward and a backward pass, which is two, one forward pass more; halos come on top.
    assert 4 / 3 < plan.recomputation < 1.75
    (before,) = plan.rematerialised
    phases = plan.rematerialised[before]
    assert [phase.level for phase in phases] == sorted(phase.level for phase in phases)
    assert before == max(phase.level for phase in plan.phases if phase.differentiated)
    stored = [name for phase in phases for name in phase.stored]
    # All that a batch norm's gradient or a later phase looks at.
    assert stored == [name for phase in plan.phases for name in phase.stored if "conv2d" in name]
    assert all(not plan.stores[name].kept for name in stored)
    model(image).sum().backward()
    assert model.last_report is not None
    again = [phase for phase in model.last_report.phases if phase.direction == "again"]
    assert [phase.level for phase in again] == [phase.level for phase in phases]
