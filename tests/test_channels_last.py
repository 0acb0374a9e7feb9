"""Models whose maps have their channels side by side: exact, and kept so from phase to phase."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_streamed_equals_plain, randomized
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from streamcnn import StreamingModel
from streamcnn.execution import combiner
from streamcnn.execution.backward_tile import told_apart
from streamcnn.geometry.regions import Region
from streamcnn.graph.ops import channel_kernels
from streamcnn.graph.ops.moments import Moments
from streamcnn.stores import Store, memory
from streamcnn.stores.memory import MemoryStore
from streamcnn.support.models import load_model

LAST = torch.channels_last
SHAPE = (2, 3, 67, 61)


class Block(nn.Module):
    """A residual block, whose input's gradient comes from two phases."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(outside, affine=False)
        self.aside = nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(self.last(self.second(y)) + self.aside(x))


def make_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        Block(4, 4, 1),
        Block(4, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    return net.to(memory_format=LAST)


def per_channel(x: Tensor) -> Tensor:
    return x[:, None, None]


def elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
) -> Tensor:
    """What ``torch.batch_norm_elemt`` computes on a card."""
    result = (x - per_channel(mean)) * per_channel(inverse)
    result = result if weight is None else result * per_channel(weight)
    return (result if bias is None else result + per_channel(bias)).to(x.dtype)


def backward_reduce(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: None, *wanted: bool
) -> tuple[Tensor, ...]:
    """What ``torch.batch_norm_backward_reduce`` computes on a card."""
    product = (gradient * (x - per_channel(mean))).sum((0, 2, 3))
    return gradient.sum((0, 2, 3)), product, torch.empty(0), torch.empty(0)


def backward_elemt(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: None,
    total: Tensor,
    product: Tensor,
    count: Tensor,
) -> Tensor:
    """What ``torch.batch_norm_backward_elemt`` computes on a card."""
    assert count.dtype == torch.int32
    mean_gradient = per_channel(total / count.sum())
    line = (x - per_channel(mean)) * per_channel(inverse.square() * product / count.sum())
    return ((gradient - mean_gradient - line) * per_channel(inverse)).to(x.dtype)


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ways that are taken on a card; the kernels that were called."""
    called: set[str] = set()

    def told(name: str, function: Any) -> Any:
        def call(x: Tensor, *args: Any) -> Any:
            if x.is_contiguous(memory_format=LAST):
                called.add(name)
            else:
                # Captured values have no layout. On a CPU contiguous maps have their moments from there too.
                assert name == "batch_norm_update_stats"
            return function(x, *args)

        return call

    monkeypatch.setattr(memory, "_keeps_tiles", lambda device, zeroed: True)
    monkeypatch.setattr(
        channel_kernels, "fits", lambda x: x.is_floating_point() and channel_kernels.is_channels_last(x)
    )
    for name, function in (
        ("batch_norm_update_stats", torch.batch_norm_update_stats),
        ("batch_norm_elemt", elemt),
        ("batch_norm_backward_reduce", backward_reduce),
        ("batch_norm_backward_elemt", backward_elemt),
    ):
        monkeypatch.setattr(torch, name, told(name, function))
    return called


@pytest.mark.parametrize("tile", [200, 32])
def test_streamed_is_plain(tile: int) -> None:
    assert_streamed_equals_plain(make_net(), SHAPE, tile=tile, one_tile=tile == 200)


@pytest.mark.parametrize("tile", [200, 32, (16, 200)])
def test_streamed_is_plain_as_on_a_card(as_on_a_card: set[str], tile: int | tuple[int, int]) -> None:
    assert_streamed_equals_plain(make_net(), SHAPE, tile=tile, one_tile=tile == 200)
    assert len(as_on_a_card) == 4


def test_resnet18_is_plain_as_on_a_card(as_on_a_card: set[str]) -> None:
    torch.manual_seed(0)
    net = randomized(load_model("resnet18").train()).to(memory_format=LAST)
    assert_streamed_equals_plain(net, (1, 3, 75, 83), tile=200, one_tile=True, tolerance=1e-7)
    assert len(as_on_a_card) == 4


@pytest.mark.parametrize("tile", [200, 32])
@pytest.mark.parametrize("keeps", [False, True])
def test_maps_stay_channels_last(monkeypatch: pytest.MonkeyPatch, keeps: bool, tile: int) -> None:
    """Checkpoints and gradient maps, and what is read of them."""
    seen: list[tuple[Store, Tensor]] = []
    original = MemoryStore._read

    def read(store: MemoryStore, region: Any) -> Tensor:
        found = original(store, region)
        seen.append((store, found))
        return found

    monkeypatch.setattr(MemoryStore, "_read", read)
    monkeypatch.setattr(memory, "_keeps_tiles", lambda device, zeroed: keeps)
    model = StreamingModel(make_net(), tile=tile)
    model.resident_tail = False
    image = torch.randn(SHAPE).to(memory_format=LAST)
    model(image).square().sum().backward()
    assert len({id(store) for store, _ in seen}) > 8
    assert all(found.stride(1) == 1 for _, found in seen)


def test_a_tile_that_is_the_map_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value that a store keeps is at the end what it was when it was handed over.

    Gradients are added to where they are kept, and only where nobody else has them.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    num_gradients = 0
    original = MemoryStore._keep

    def keep(store: MemoryStore, tile: Tensor, *, is_shared: bool) -> None:
        nonlocal num_gradients
        if is_shared:
            kept.append((tile, tile.clone()))
        else:
            num_gradients += 1
        original(store, tile, is_shared=is_shared)

    monkeypatch.setattr(memory, "_keeps_tiles", lambda device, zeroed: True)
    monkeypatch.setattr(MemoryStore, "_keep", keep)
    model = StreamingModel(make_net(), tile=200)
    model.resident_tail = False
    model(torch.randn(SHAPE).to(memory_format=LAST)).square().sum().backward()
    assert len(kept) > 4
    assert num_gradients > 4
    assert all(torch.equal(tile, before) for tile, before in kept)


def test_kernels_take_maps_on_a_card_alone() -> None:
    assert not channel_kernels.fits(torch.randn(1, 4, 5, 6).to(memory_format=LAST))


def test_a_gradient_that_others_have_is_not_kept() -> None:
    """Autograd gives the same tensor for both terms of a sum."""
    gradient = torch.randn(3)
    assert combiner._is_unshared(gradient)
    first, second, none = told_apart((gradient, gradient, None))
    assert none is None
    assert first is not None
    assert second is not None
    assert first.data_ptr() == second.data_ptr()
    assert not combiner._is_unshared(first)
    assert not combiner._is_unshared(second)
    assert not combiner._is_unshared(gradient[1:])


def test_moments_of_what_has_no_values_take_no_memory() -> None:
    shape = (1, 64, 10**5, 10**5)
    reduction = Moments(shape, (0, 2, 3), keepdim=False)
    with FakeTensorMode():
        x = torch.empty(shape)
        count, mean, spread = reduction.partial(x, Region.whole(shape[2:]))
    assert mean.shape == spread.shape == (64,)
    assert float(count) == 1e10


def test_maps_that_are_traced_are_not_given_to_a_cards_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's tensors have no memory, and neither have those in which AOTAutograd wraps them."""
    x = torch.empty(1, 4, 8, 8).contiguous(memory_format=LAST)
    for kind in (Tensor, FunctionalTensor):
        monkeypatch.setattr(kind, "is_cuda", True)
    assert channel_kernels.fits(x)
    with FunctionalTensorMode():
        assert not channel_kernels.fits(FunctionalTensor.to_functional(x))
    with FakeTensorMode() as mode:
        assert not channel_kernels.fits(mode.from_tensor(x))
