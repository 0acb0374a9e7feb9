"""Shapes that depend on values which are known when a pass is captured: masks in buffers, pruned weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, all_in_tiles
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn import UnsupportedModel
from streamcnn.verification import relative_errors

Head = Callable[["Net", Tensor], Tensor]

LISTED = [True, False, True, True, False, True]


class Net(nn.Module):
    """A convolution with statistics, and what is made of its map."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.after = nn.Conv2d(6, 6, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor([0.1, -2.0, 0.7, 0.0, 1.3, -0.4]))
        self.register_buffer("mask", torch.tensor(LISTED))
        self.register_buffer("times", torch.tensor([1, 0, 2, 1, 3, 1]))
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self, self.after(self.norm(self.conv(x)).relu()))


def _changed(net: Net, x: Tensor) -> Tensor:
    net.mask[1] = ~net.mask[1]
    return x[:, net.mask]


def _overwritten(net: Net, x: Tensor) -> Tensor:
    places = net.mask.nonzero()[:, 0]
    places += 1
    return x[:, places % 6]


def _pruned(net: Net, x: Tensor) -> Tensor:
    keep = net.scale.abs() > 0.5
    return x[:, keep] * net.scale[keep, None, None]


def _counted(net: Net, x: Tensor) -> Tensor:
    found, counts = torch.unique(net.times, return_counts=True)
    return x[:, found] * counts[:, None, None]


def _assigned(net: Net, x: Tensor) -> Tensor:
    pooled = x.mean((2, 3))
    result = torch.zeros_like(pooled)
    result[:, net.mask] = pooled[:, net.mask] * 2
    return result


def _of_positions(net: Net, x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[2:], dtype=torch.bool)
    mask[3:20, 5:30] = True
    return x[:, :, mask]


def _drawn(net: Net, x: Tensor) -> Tensor:
    return x[:, torch.rand(6) > 0.3].sum(1)


def _regions(net: Net, x: Tensor) -> Tensor:
    boxes = torch.stack([net.times, net.times + 5], 1)
    return torch.stack([x[:, :, box[0] : box[1], box[0] :].amax((2, 3)) for box in boxes])


def _filled(net: Net, x: Tensor) -> Tensor:
    x = x * 1
    x[:, :, net.times[0] :: net.times[2]] = 0.5
    return x


def _raised(net: Net, x: Tensor) -> Tensor:
    x = x * 1
    x[..., net.times[0] + 1] += net.scale[1]
    return x


HEADS: dict[str, Head] = {
    "a mask of channels": lambda net, x: x[:, net.mask],
    "of bytes": lambda net, x: x[:, net.mask.to(torch.uint8)],
    "in a list": lambda net, x: x[:, LISTED],
    "in an array": lambda net, x: x[:, np.array(LISTED)],
    "behind an ellipsis": lambda net, x: x.permute(0, 2, 3, 1)[..., net.mask],
    "in front": lambda net, x: x.transpose(0, 1)[net.mask],
    "of two axes": lambda net, x: x.mean((2, 3))[net.mask.expand(2, -1)],
    "of rows and columns": _of_positions,
    "that picks nothing": lambda net, x: x[:, net.mask & ~net.mask].sum(1) + x.mean(1),
    "that the pass has changed": _changed,
    "that is assigned by": _assigned,
    "of random numbers": _drawn,
    "of a parameter": _pruned,
    "of weights": lambda net, x: x * net.conv.weight[net.conv.weight > 0].sum(),
    "masked_select": lambda net, x: x.mean((2, 3)).masked_select(net.mask),
    "masked_select of a parameter": lambda net, x: x * torch.masked_select(net.scale, net.mask).sum(),
    "masked_select of a map": lambda net, x: torch.masked_select(x, net.mask[:, None, None]),
    "masked_select by keywords": lambda net, x: torch.masked_select(input=x.mean((2, 3)), mask=net.mask),
    "nonzero": lambda net, x: x[:, torch.nonzero(net.mask).squeeze(1)],
    "nonzero, overwritten": _overwritten,
    "argwhere": lambda net, x: x[:, torch.argwhere(net.mask).flatten()],
    "where": lambda net, x: x[:, torch.where(net.mask)[0]],
    "unique": _counted,
    "bincount": lambda net, x: x[:, :4] * torch.bincount(net.times)[:, None, None],
    "one_hot": lambda net, x: x.mean((2, 3)) @ F.one_hot(net.times).to(x.dtype),
    "repeat_interleave": lambda net, x: x.repeat_interleave(net.times, 1),
    "repeat_interleave by keywords": lambda net, x: torch.repeat_interleave(
        input=x, repeats=net.times, dim=-3
    ),
    "repeat_interleave of pooled values": lambda net, x: x.mean((0, 2, 3)).repeat_interleave(net.times),
    "repeat_interleave, all as often": lambda net, x: x.mean((0, 2, 3)).repeat_interleave(torch.tensor([2])),
    "repeat_interleave of times": lambda net, x: x[:, torch.repeat_interleave(net.times)],
    "ends of slices": _regions,
    "ends and a step of a slice that is written": _filled,
    "a place that is written": _raised,
    "a place": lambda net, x: x[:, :, net.times[0]],
    "where to narrow": lambda net, x: x.narrow(2, net.times[0], 7),
    "a size": lambda net, x: F.interpolate(x, size=(net.times[0] + 9, 11)),
    "a size and a number": lambda net, x: x.mean((2, 3)).expand(net.times[0], -1, -1) * net.times[0],
}


def _passes(model: nn.Module, net: Net) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for number in range(2):
        torch.manual_seed(number)
        image = torch.randn((2, 3, 29, 37), dtype=torch.float64, requires_grad=True)
        output = model(image)
        output.square().sum().backward()
        gradients = {name: value.grad for name, value in net.named_parameters() if value.grad is not None}
        found[f"output {number}"] = {"output": output.detach()}
        found[f"gradients {number}"] = {**gradients, "image": image.grad}
        found[f"buffers {number}"] = {name: value.clone() for name, value in net.named_buffers()}
        net.zero_grad()
        with torch.no_grad():
            # Another number of channels in the next pass.
            net.scale.mul_(-0.5).add_(0.2)
            net.mask[3] = False
            net.times[0] = 2
    return found


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_a_shape_that_known_values_decide_is_that_of_plain_pytorch(head: Head) -> None:
    torch.manual_seed(0)
    net = Net(head).double()
    plain = copy.deepcopy(net)
    expected, found = _passes(plain, plain), _passes(all_in_tiles(net), net)
    errors, _ = relative_errors(expected, found)
    assert max(errors.values()) < TOLERANCE, errors
    assert all(
        found[part][name].shape == value.shape for part in expected for name, value in expected[part].items()
    )


@pytest.mark.parametrize(
    "head",
    [
        lambda net, x: x[x > 0],
        lambda net, x: x.mean((2, 3))[:, x.mean((0, 2, 3)) > 0],
        lambda net, x: x[:, net.norm.running_mean > 0],
        lambda net, x: torch.unique(x),
        lambda net, x: x[:, :, : x.mean().long()],
    ],
    ids=["of a map", "of pooled values", "of a buffer that has moved", "unique", "a slice"],
)
def test_a_shape_that_the_image_decides_is_refused(head: Head) -> None:
    net = Net(head).double()
    refusal = r"a shape depends on values.* choose outside of the model|reads a value of a tensor"
    with pytest.raises(UnsupportedModel, match=refusal):
        all_in_tiles(net)(torch.rand(1, 3, 29, 37, dtype=torch.float64))
    assert net.norm.num_batches_tracked == 0
