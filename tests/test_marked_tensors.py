"""Tensors that forward freezes and releases (``requires_grad``), copies, and asks for what is set on them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import all_in_tiles
from streaming_cases import assert_same_gradients, loss_of, make_image
from torch import Tensor, nn

from streamcnn import UnsupportedModel

Freeze = Callable[[nn.Module, bool], Any]


class Net(nn.Module):
    def __init__(self, freeze: Freeze, *, late: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)
        self.freeze, self.late = freeze, late

    def forward(self, x: Tensor, released: bool) -> Tensor:
        if not self.late:
            self.freeze(self.stem, released)
        features = self.stem(x)
        if self.late:
            self.freeze(self.stem, released)
        return self.head(features).relu()


def _by_method(module: nn.Module, released: bool) -> None:
    module.requires_grad_(released)


def _by_attribute(module: nn.Module, released: bool) -> None:
    for parameter in module.parameters():
        parameter.requires_grad = released


@pytest.mark.parametrize("freeze", [_by_method, _by_attribute])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_frozen_and_released_in_forward_is(freeze: Freeze, first: bool) -> None:
    net = Net(freeze).double()
    model, plain = all_in_tiles(net), copy.deepcopy(net)
    for number, released in enumerate((first, not first, first)):
        for module in (model, plain):
            module.zero_grad()
            loss_of(module(make_image(number), released)).backward()
        assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in plain.parameters()]
        assert_same_gradients(net, plain)


def test_planning_freezes_nothing() -> None:
    net = Net(_by_attribute).double()
    all_in_tiles(net).plan((2, 3, 37, 45), inputs=(False,))
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_freezing_what_was_used_is_refused() -> None:
    net = Net(_by_method, late=True).double()
    model = all_in_tiles(net)
    model(make_image(), True)
    with pytest.raises(UnsupportedModel, match="that it has used already"):
        model(make_image(), False)
    assert all(parameter.requires_grad for parameter in net.parameters())


class Marked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.requires_grad_().square()


def test_marking_the_callers_image_is_refused() -> None:
    model, image = all_in_tiles(Marked()), make_image()
    with pytest.raises(UnsupportedModel, match="whether the image requires a gradient"):
        model(image)
    assert not image.requires_grad
    image.requires_grad_()
    model(image).sum().backward()
    torch.testing.assert_close(image.grad, 2 * image.detach())


class Copying(nn.Module):
    """Subtracts what a copy of its layer gives, to which no gradient goes."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv, self.factor = nn.Conv2d(3, 4, 3), factor

    def forward(self, x: Tensor) -> Tensor:
        twin = copy.deepcopy(self.conv)
        twin.weight.data.mul_(self.factor)
        assert twin.weight.requires_grad
        return self.conv(x) - twin(x).square()


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_copy_made_in_forward_has_no_part_in_the_gradient(factor: float) -> None:
    net = Copying(factor).double()
    model, plain = all_in_tiles(net), copy.deepcopy(net)
    for module in (model, plain):
        loss_of(module(make_image())).backward()
    assert_same_gradients(net, plain)


class Cached(nn.Module):
    """Works out its weight anew where that was overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.version, self.num_made = -1, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.version != self.conv.weight._version:
            self.version, self.num_made = self.conv.weight._version, self.num_made + 1
        return self.conv(x)


def test_versions_of_tensors_are_their_own() -> None:
    net = Cached().double()
    model = all_in_tiles(net)
    for num_made in (1, 2):
        for _ in range(2):
            model(make_image())
            assert (net.version, net.num_made) == (net.conv.weight._version, num_made)
        with torch.no_grad():
            net.conv.weight.mul_(2)


class Tagged(nn.Module):
    """Reads attributes that are set on tensors."""

    def __init__(self, *, is_guarded: bool) -> None:
        super().__init__()
        self.conv, self.is_guarded = nn.Conv2d(3, 4, 3), is_guarded

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        if not self.is_guarded:
            time.perf_counter()  # Dynamo does not follow it.
        tags = [getattr(tensor, "tag", 1.0) for tensor in (x, vector, self.conv.weight)]
        return self.conv(x) * vector * tags[0] + tags[1] * tags[2]


@pytest.mark.parametrize("is_guarded", [True, False])
def test_attributes_of_tensors_are_read(is_guarded: bool) -> None:
    net = Tagged(is_guarded=is_guarded).double()
    model, image, vector = all_in_tiles(net), make_image(), torch.ones(4, 1, 1, dtype=torch.float64)
    for tagged in (image, vector, net.conv.weight):
        torch.testing.assert_close(model(image, vector), net(image, vector))
        tagged.tag = 3.0
        torch.testing.assert_close(model(image, vector), net(image, vector))
    del image.tag
    torch.testing.assert_close(model(image, vector), net(image, vector))
