"""Tiles that are moved while others are computed: exact, and nothing is left behind."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from copy_engines import LateCopies
from stores_away import away
from streaming_cases import Gate, assert_same_gradients, error_of, loss_of
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn import StreamingModel
from streamcnn.execution.exchange import Exchange
from streamcnn.execution.executor import Execution
from streamcnn.plan.storage import Tier
from streamcnn.runtime import pass_stores
from streamcnn.stores import GpuTransfers

SHAPE = (1, 3, 61, 53)
conv = partial(nn.Conv2d, kernel_size=3, bias=False)


class Residual(nn.Module):
    """Maps with several readers, in one phase and in others; a statistic in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 6, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.a = nn.Sequential(conv(6, 6, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.b = nn.Sequential(conv(6, 6, padding=2, dilation=2), nn.BatchNorm2d(6), Gate(6))
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.b(self.a(x)))
        x = x + self.a(x)
        return self.head(x).mean((2, 3))


class Skips(nn.Module):
    """An encoder and decoder that ends in a map."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(conv(3, 5, padding=1), nn.GroupNorm(1, 5), nn.GELU())
        self.deep = nn.Sequential(conv(5, 7, padding=1), nn.BatchNorm2d(7), nn.SiLU())
        self.up = nn.Sequential(conv(12, 5, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        deep = self.deep(F.max_pool2d(skip, 2))
        deep = F.interpolate(deep, size=skip.shape[2:], mode="bilinear")
        return self.up(torch.cat([skip, deep], 1))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LateCopies]]:
    """The copy engines of all passes; every one of them is done with all that it was asked for."""
    made: list[LateCopies] = []

    def transfers_of(device: torch.device) -> GpuTransfers:
        made.append(LateCopies(device))
        return GpuTransfers(made[-1])

    monkeypatch.setattr(pass_stores, "transfers_of", transfers_of)
    yield made
    assert made
    assert not any(engine.num_open for engine in made)


def on_host(name: str) -> Tier:
    return Tier.HOST


def on_disk(name: str) -> Tier:
    return Tier.DISK


def mixed(name: str) -> Tier:
    return list(Tier)[sum(map(ord, name)) % 3]


def make_model(
    make_net: Callable[[], nn.Module], tile: int | tuple[int, int]
) -> tuple[StreamingModel, nn.Module]:
    torch.manual_seed(0)
    net = make_net().double()
    model = StreamingModel(net, tile=tile)
    model.resident_tail = False
    return model, copy.deepcopy(net)


def assert_exact(model: StreamingModel, plain: nn.Module, image: Tensor) -> None:
    for net in (model, plain):
        net.zero_grad()
    images = [image.clone().requires_grad_() for _ in range(2)]
    outputs = [net(x) for net, x in zip((model, plain), images, strict=True)]
    assert error_of(*outputs) < 1e-12
    for output in outputs:
        loss_of(output).backward()
    assert_same_gradients(model, plain)
    assert error_of(images[0].grad, images[1].grad) < 1e-10


@pytest.mark.parametrize(
    ("overlaps", "crosses"),
    [(True, True), (True, False), (False, True), (False, False)],
    ids=["overlapping, crossing", "overlapping", "crossing", "at once"],
)
@pytest.mark.parametrize("choose", [on_host, on_disk, mixed], ids=lambda choose: choose.__name__)
@pytest.mark.parametrize("make_net", [Residual, Skips], ids=lambda net: net.__name__)
@pytest.mark.parametrize(
    ("shape", "tile", "memory_format"),
    [
        (SHAPE, (16, 53), torch.channels_last),
        (SHAPE, 20, torch.contiguous_format),
        (SHAPE, 64, torch.contiguous_format),
        ((2, *SHAPE[1:]), 24, torch.channels_last),
    ],
    ids=str,
)
def test_exact_however_late_copies_are(
    engines: list[LateCopies],
    monkeypatch: pytest.MonkeyPatch,
    make_net: Callable[[], nn.Module],
    choose: Callable[[str], Tier],
    shape: tuple[int, ...],
    tile: int | tuple[int, int],
    memory_format: torch.memory_format,
    overlaps: bool,
    crosses: bool,
) -> None:
    away(monkeypatch, choose, lambda part: overlaps, lambda part: crosses)
    model, plain = make_model(make_net, tile)
    for net in (model, plain):
        net.to(memory_format=memory_format)
    image = torch.randn(shape, dtype=torch.float64).to(memory_format=memory_format)
    for _ in range(2):
        assert_exact(model, plain, image)
    assert sum(engine.num_brought for engine in engines)
    assert sum(engine.num_taken for engine in engines)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_narrow_types(
    engines: list[LateCopies], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    away(monkeypatch, on_host)
    model, plain = make_model(Residual, (16, 53))
    model.float(), plain.float()
    image = torch.randn(SHAPE)
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        outputs = [net(image) for net in (model, plain)]
    assert error_of(*outputs) < (2e-2 if dtype is torch.bfloat16 else 1e-5)
    for output in outputs:
        loss_of(output).backward()
    assert_same_gradients(model, plain, 0.1 if dtype is torch.bfloat16 else 1e-3)


def test_the_next_tile_is_under_way_while_one_is_computed(
    engines: list[LateCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    away(monkeypatch, on_host)
    model, _ = make_model(Residual, (16, 53))
    asked: list[tuple[str, int]] = []
    for name in ("prepare", "scatter"):

        def noted(name: str, original: Callable[..., Any], *args: Any) -> Any:
            asked.append((name, args[2].row))
            return original(*args)

        monkeypatch.setattr(Exchange, name, partial_method(partial(noted, name, getattr(Exchange, name))))
    model(torch.randn(SHAPE, dtype=torch.float64)).sum().backward()
    assert len(asked) > 20
    assert asked[:4] == [("prepare", 1), ("scatter", 0), ("prepare", 2), ("scatter", 1)]
    # A GPU would be waited for at the end of a phase, and for what leaves it for a host that adds.
    waits = sum(engine.num_settled for engine in engines)
    assert waits < sum(engine.num_taken for engine in engines)


@pytest.mark.parametrize("trails", [True, False])
def test_a_phase_begins_while_the_last_tile_of_the_one_before_is_on_its_way(
    engines: list[LateCopies], monkeypatch: pytest.MonkeyPatch, trails: bool
) -> None:
    away(monkeypatch, on_host, crosses=lambda part: trails)
    model, _ = make_model(Residual, (16, 53))
    num_open: list[int] = []
    original = Exchange.gather

    def noted(self: Exchange, step: Any, tile: Any, *others: Any) -> list[Tensor]:
        if tile.row == 0:
            num_open.append(engines[-1].num_taken_open)
        return original(self, step, tile, *others)

    monkeypatch.setattr(Exchange, "gather", noted)
    output = model(torch.randn(SHAPE, dtype=torch.float64))
    assert not engines[-1].num_open, "at the end of the forward pass all has arrived"
    assert num_open[0] == 0
    output.sum().backward()
    assert any(num_open) == trails
    if trails:
        assert all(num_open[1:4])


@pytest.mark.parametrize("leads", [True, False])
def test_the_first_tile_of_a_phase_is_asked_for_while_the_last_one_before_is_computed(
    engines: list[LateCopies], monkeypatch: pytest.MonkeyPatch, leads: bool
) -> None:
    away(monkeypatch, on_host, crosses=lambda part: leads)
    model, _ = make_model(Residual, (16, 53))
    brought = {"before": 0, "in": 0}
    original = Exchange.gather

    def noted(self: Exchange, step: Any, tile: Any, *others: Any) -> list[Tensor]:
        count = engines[-1].num_brought
        if tile.row == 0:
            brought["before"] += len(self._first)
        found = original(self, step, tile, *others)
        if tile.row == 0:
            brought["in"] += engines[-1].num_brought - count
            assert not self._first
        return found

    monkeypatch.setattr(Exchange, "gather", noted)
    model(torch.randn(SHAPE, dtype=torch.float64)).sum().backward()
    assert (brought["before"] > 0) == leads
    # Maps that the phase before has written itself come when they are complete.
    assert brought["in"] > 0


def test_what_segments_send_does_not_stay_on_its_way(
    engines: list[LateCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    away(monkeypatch, on_host)
    model, _ = make_model(Residual, (16, 53))
    overlaps: list[bool] = []
    original = Execution._backward_segment

    def noted(self: Execution, level: int) -> None:
        overlaps.append(self._transfers.overlaps)
        original(self, level)

    monkeypatch.setattr(Execution, "_backward_segment", noted)
    model(torch.randn(SHAPE, dtype=torch.float64)).sum().backward()
    assert len(overlaps) > 1
    assert not any(overlaps)


def test_the_next_tile_is_asked_for_before_the_host_waits_for_what_has_gone(
    engines: list[LateCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    away(monkeypatch, on_host)
    model, _ = make_model(Residual, (16, 53))
    asked: list[str] = []
    for owner, name in ((GpuTransfers, "advance"), (LateCopies, "bring")):

        def noted(name: str, original: Callable[..., Any], *args: Any) -> Any:
            asked.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, partial_method(partial(noted, name, getattr(owner, name))))
    model(torch.randn(SHAPE, dtype=torch.float64)).sum().backward()
    # Of the first tile of a phase that has inputs away: it waits; the second comes while that is computed.
    first = asked.index("bring")
    assert asked[first : first + 4] == ["bring", "bring", "advance", "bring"]


def partial_method(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: call(*args)


def assert_as_new(engines: list[LateCopies], model: StreamingModel, plain: nn.Module, image: Tensor) -> None:
    """A pass that failed has left no copy under way, and the next one is exact."""
    assert not any(engine.num_open for engine in engines)
    for net in (model, plain):
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
    assert_exact(model, plain, image)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("choose", [on_host, on_disk], ids=lambda choose: choose.__name__)
def test_a_failure_leaves_nothing_under_way(
    engines: list[LateCopies],
    monkeypatch: pytest.MonkeyPatch,
    choose: Callable[[str], Tier],
    direction: str,
) -> None:
    away(monkeypatch, choose)
    model, plain = make_model(Residual, (16, 53))
    image = torch.randn(SHAPE, dtype=torch.float64)
    output = model(image) if direction == "backward" else None
    original, count = Exchange.scatter, 0

    def failing(self: Exchange, *args: Any) -> None:
        nonlocal count
        count += 1
        original(self, *args)
        if count == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as failure:
        failure.setattr(Exchange, "scatter", failing)
        with pytest.raises(KeyboardInterrupt):
            model(image) if output is None else output.sum().backward()
    assert_as_new(engines, model, plain, image)


def test_memory_of_maps_is_kept_for_the_next_pass_and_given_back(
    engines: list[LateCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    away(monkeypatch, on_host)
    model, plain = make_model(Residual, (16, 53))
    image = torch.randn(SHAPE, dtype=torch.float64)
    pinned = []
    for _ in range(3):
        assert_exact(model, plain, image)
        pinned.append(sum(engine.num_pinned for engine in engines))
    assert pinned[0] == model.spare_pinned.nbytes > 0
    assert pinned[1] == pinned[2] <= 1.25 * pinned[0], "later passes pin no more"
    assert copy.deepcopy(model).spare_pinned.nbytes == 0
    # A pass that is never differentiated goes with its maps.
    model(image)
    gc.collect()
    assert sum(engine.num_pinned for engine in engines) == model.spare_pinned.nbytes
    model.release()
    gc.collect()
    assert sum(engine.num_pinned for engine in engines) == model.spare_pinned.nbytes == 0


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("queue", ["bring", "take"])
def test_an_interrupt_before_a_copy_has_a_mark_leaves_nothing_under_way(
    engines: list[LateCopies], monkeypatch: pytest.MonkeyPatch, queue: str, direction: str
) -> None:
    away(monkeypatch, on_host)
    model, plain = make_model(Residual, (16, 53))
    image = torch.randn(SHAPE, dtype=torch.float64)
    output = model(image) if direction == "backward" else None
    original, count = getattr(LateCopies, queue), 0

    def interrupted(self: LateCopies, *args: Any) -> Any:
        nonlocal count
        count += 1
        mark = original(self, *args)
        if count == 6:
            raise KeyboardInterrupt
        return mark

    with monkeypatch.context() as failure:
        failure.setattr(LateCopies, queue, interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(image) if output is None else output.sum().backward()
    assert_as_new(engines, model, plain, image)
