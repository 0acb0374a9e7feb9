"""Hooks that a forward pass sets on gradients, of values that were or will be overwritten."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import assert_streamed_equals_plain
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from streamcnn import StreamingModel, UnsupportedModel

Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two convolutions, and what is done to their maps."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head(self.body(self, y).mean((2, 3)))


def hook(gradient: Tensor) -> Tensor:
    return F.relu(gradient) * 3


def _behind_a_sum_in_place(net: Net, y: Tensor) -> Tensor:
    z = net.second(y)
    z += y
    z.register_hook(hook)
    return F.relu(z.clone())


def _behind_an_activation_in_place(net: Net, y: Tensor) -> Tensor:
    z = F.relu_(net.second(y))
    z.register_hook(hook)
    return z * y


def _between_two_sums(net: Net, y: Tensor) -> Tensor:
    z = net.second(y)
    z += y
    z.register_hook(hook)
    z *= -2
    z.register_hook(lambda gradient: gradient * 5)
    return z


def _of_features(net: Net, y: Tensor) -> Tensor:
    gate = y.mean((2, 3))
    gate *= 2
    gate.register_hook(hook)
    return net.second(y) * gate[..., None, None]


def _of_what_was_read_before(net: Net, y: Tensor) -> Tensor:
    z = net.second(y)
    before = z * 2
    z.register_hook(hook)
    return before + z


def _of_what_a_view_has_changed(net: Net, y: Tensor) -> Tensor:
    z = net.second(y)
    z[:, :2] *= -2
    z.register_hook(hook)
    return z * 2


def _of_a_view_that_was_overwritten(net: Net, y: Tensor) -> Tensor:
    z = net.second(y)
    view = z[:, :2]
    view *= -2
    view.register_hook(hook)
    return torch.cat([view * 3, z], 1)[:, 1:5]


def _of_a_view_whose_base_is_overwritten(net: Net, y: Tensor) -> Tensor:
    z = net.second(y)
    view = z[:, :2]
    view.register_hook(hook)
    z *= -2
    return torch.cat([view * 3, z], 1)[:, 1:5]


def _two_of_which_one_is_removed(net: Net, y: Tensor) -> Tensor:
    z = net.second(y)
    removed = z.register_hook(hook)
    z.register_hook(lambda gradient: gradient * 7)
    z.register_hook(lambda gradient: gradient * gradient)
    removed.remove()
    return z


BODIES = [body for name, body in list(globals().items()) if name.startswith("_") and callable(body)]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__.strip("_"))
def test_a_hook_sees_the_gradient_of_what_was_held_when_it_was_set(body: Body) -> None:
    torch.manual_seed(0)
    assert_streamed_equals_plain(Net(body), (2, 3, 29, 37), tile=16, resident=None)


def test_a_view_with_a_hook_is_not_overwritten() -> None:
    def body(net: Net, y: Tensor) -> Tensor:
        z = net.second(y)
        view = z[:, :2]
        view.register_hook(hook)
        view *= 2
        return z

    with pytest.raises(UnsupportedModel, match=r"hook on the gradient of a view .* set the hook afterwards"):
        StreamingModel(Net(body))(torch.randn(1, 3, 29, 37, requires_grad=True))


def test_guided_backpropagation() -> None:
    """As captum has it: gradients are cut off at activations that stand behind sums in place."""

    def body(net: Net, y: Tensor) -> Tensor:
        z = net.second(y)
        z += y
        gradients = {}
        z.register_hook(lambda gradient: F.relu(gradients["result"]) if gradients else None)
        result = F.relu(z.clone())
        result.register_hook(lambda gradient: gradients.update(result=gradient))
        return result

    torch.manual_seed(0)
    assert_streamed_equals_plain(Net(body), (2, 3, 29, 37), tile=16, resident=None)


class Kept(nn.Module):
    """A net that keeps the handle of the hook that it sets on its features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.handle: RemovableHandle | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).mean((2, 3)).sin()
        self.handle = y.register_hook(hook)
        with y.register_hook(hook):
            pass
        return self.head(y)


@pytest.mark.parametrize("removed", [False, True])
def test_a_hook_may_be_removed_until_the_gradient_arrives(removed: bool) -> None:
    net = Kept().double()
    found = []
    for model in (net, StreamingModel(net, tile=8)):
        out = model(torch.ones(1, 3, 20, 16, dtype=torch.float64))
        assert isinstance(net.handle, RemovableHandle)
        loss = out.square().sum()
        first = torch.autograd.grad(loss, net.first.weight, retain_graph=True)[0]
        if removed:
            net.handle.remove()
        found.append((first, torch.autograd.grad(loss, net.first.weight)[0]))
        assert torch.equal(*found[-1]) != removed
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    pickle.dumps(net)
