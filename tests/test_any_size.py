"""Captures that hold for images of any size: the same graphs as those of one size, and given up where not."""

from __future__ import annotations

import copy
import math
import operator
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from streamcnn import StreamingModel
from streamcnn.capture.forward_pass import ForwardPass, stand_in
from streamcnn.capture.guarded import any_size, guards
from streamcnn.graph import fakes

SIZES = [(64, 64), (96, 64), (80, 112), (200, 72), (65, 67), (112, 112), (33, 40)]
Code = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """A convolution, and code that may look at sizes."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.code = code
        self.table = {64: 2.0}
        self.seen: Any = None
        self.position = nn.Parameter(torch.rand(1, 4, 7, 7))

    def forward(self, x: Tensor) -> Any:
        return self.code(self, self.norm(self.conv(x)).relu())


def windows(net: Net, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = F.pad(x, (0, -w % 8, 0, -h % 8))
    return x.view(n, c, x.shape[2] // 8, 8, x.shape[3] // 8, 8).mean((3, 5))


def same_padding(net: Net, x: Tensor) -> Tensor:
    missing = max((math.ceil(x.shape[2] / 3) - 1) * 3 + 5 - x.shape[2], 0)
    return F.avg_pool2d(F.pad(x, (2, 2, missing // 2, missing - missing // 2)), 5, 3)


def coordinates(net: Net, x: Tensor) -> Tensor:
    rows = torch.arange(x.shape[2], dtype=x.dtype) / x.shape[2]
    return x * rows[:, None] + torch.rand(x.shape[2:], dtype=x.dtype)


def halved(net: Net, x: Tensor) -> Tensor:
    height = x.shape[2]
    while height > 32:
        height //= 2
        x = x * 1.5
    return x


SERVED: dict[str, Code] = {
    "nothing": lambda net, x: x,
    "channels": lambda net, x: x * x.size(1) + x.dim(),
    "pooling and a skip": lambda net, x: x[:, :, ::2] + F.max_pool2d(F.pad(x, (1, 1)), 3, (2, 1), (1, 0)),
    "adaptive pooling": lambda net, x: F.adaptive_avg_pool2d(x, (7, 5)) + net.position[..., :5],
    "tokens": lambda net, x: x.flatten(2).transpose(1, 2).mean(1),
    "a crop": lambda net, x: x[:, :, 3:-5, :-2],
    "upsampling": lambda net, x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "a Fourier transform": lambda net, x: torch.fft.fft2(x).abs(),
    "a softmax": lambda net, x: x * x.flatten(2).softmax(-1).amax(-1)[..., None, None],
    "random numbers": lambda net, x: F.dropout(x, 0.3) + torch.rand_like(x),
    "rows": lambda net, x: x.cumsum(2).mean((2, 3)),
}


def remembered(net: Net, x: Tensor) -> Tensor:
    net.seen = x.shape
    return x


def looked_up(net: Net, x: Tensor) -> Tensor:
    try:
        return x * net.table[x.shape[2]]
    except KeyError:
        return x


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.height = x.shape[2]
        return x * ctx.height

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.height


OF_ONE_SIZE: dict[str, Code] = {
    "the size of a skip": lambda net, x: x + F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:]),
    "channels among sizes": lambda net, x: x * x.shape[1],
    "a crop by size": lambda net, x: x[:, :, x.shape[2] // 4 : -5, : x.shape[3] // 2],
    "a branch by size": lambda net, x: F.max_pool2d(x, 2) if x.shape[2] > 90 else x,
    "a square one": lambda net, x: x * 2 if x.shape[2] == x.shape[3] else x,
    "a number": lambda net, x: x / math.sqrt(x.shape[2] * x.shape[3]) + round(x.shape[3] * 0.37),
    "the number of values": lambda net, x: x / x.numel(),
    "strides": lambda net, x: x * x.stride(1),
    "a norm of the map": lambda net, x: F.layer_norm(x, x.shape[1:]),
    "windows": windows,
    "padding as needed": same_padding,
    "coordinates": coordinates,
    "a loop by size": halved,
    "sizes of one kind": lambda net, x: x * len({x.shape[2], x.shape[3]}),
    "a pair among others": lambda net, x: x * 2 if (112, 112) in [tuple(x.shape[2:])] else x,
    "a negative one": lambda net, x: x * int((x.shape[2] - 200) / 3),
    "a remainder": lambda net, x: x * (x.shape[2] % 1.5),
    "rounding": lambda net, x: x * (x.shape[2] * 0.1 + x.shape[2] * 0.2 == x.shape[2] * 0.3),
    "a table": lambda net, x: x * net.table.get(x.shape[2], 3.0),
    "a table with gaps": looked_up,
    "a text": lambda net, x: x * len(f"{x.shape[2]}"),
    "identity": lambda net, x: x * 2 if x.shape[2] is x.shape[3] else x,
    "a tensor of it": lambda net, x: x / torch.tensor(x.shape[2]),
    "a result": lambda net, x: (x, x.shape[2]),
    "what is remembered": remembered,
    "a function of its own": lambda net, x: Scaled.apply(x),
    "a size among others": lambda net, x: x * 2 if 112 in x.shape else x,
    "a ratio among others": lambda net, x: x * 2 if 56.0 in [x.shape[3] / 2] else x,
    "a truth that is one": lambda net, x: x * 2 if (x.shape[2] > 70) is True else x,
    "a truth that is not one": lambda net, x: x * 2 if operator.is_not(x.shape[2] > 70, False) else x,
    "a class": lambda net, x: x * 2 if x.shape[2].__class__ is int else x,
    "tens": lambda net, x: x * round(x.shape[2], -1),
    "the larger of two types": lambda net, x: x * max(x.shape[3], 1.5),
    "the smallest of two types": lambda net, x: x * min(x.shape[3] / 2, x.shape[2], 30),
    "a ratio as a result": lambda net, x: (x, x.shape[2] / x.shape[3]),
}


def key(call: ForwardPass, net: nn.Module, size: tuple[int, int]) -> str:
    """What plans depend on of a graph captured for an image of a size."""
    image = stand_in((1, 3, *size), torch.float64, torch.device("cpu"))
    return call.until_captured(net, image, (), {}, lambda graph, states: graph.key)


def counts(call: ForwardPass) -> list[int | None]:
    """How many graphs there are of any size, for each kind of call; None where that was given up."""
    return [captures and captures.count for captures in call._guarded._of_any_size.values()]


def assert_captured_as_each_by_itself(call: ForwardPass, net: Net) -> None:
    """Capture all sizes, and compare what may have symbols, and the last size, with captures of their own."""
    for number, size in enumerate(SIZES):
        # The first sizes, and all that follow once symbols are given up, are captured by themselves.
        is_by_itself = number < any_size.MANY_SIZES or counts(call) == [None]
        found = key(call, net, size)
        if not is_by_itself or size == SIZES[-1]:
            assert found == key(ForwardPass(), net, size), size


@pytest.mark.parametrize("code", SERVED.values(), ids=SERVED)
def test_a_graph_of_any_size_is_that_of_each_size(code: Code) -> None:
    net, call = Net(code).double(), ForwardPass()
    assert_captured_as_each_by_itself(call, net)
    assert [count is not None for count in counts(call)] == [True]
    assert len(call._guarded._of_size) == any_size.MANY_SIZES


@pytest.mark.parametrize("code", OF_ONE_SIZE.values(), ids=OF_ONE_SIZE)
def test_where_a_size_is_needed_each_is_captured(code: Code) -> None:
    net, call = Net(code).double(), ForwardPass()
    assert_captured_as_each_by_itself(call, net)
    assert counts(call) == [None]


def test_code_that_is_different_is_captured_anew_for_all_sizes() -> None:
    net, call = Net(lambda net, x: x * net.table[64]).double(), ForwardPass()
    for size in SIZES[:4]:
        key(call, net, size)
    net.table[64] = 5.0
    for size in SIZES:
        assert "5.0" in key(call, net, size)
    assert counts(call) == [2]


def test_modes_and_kinds_of_images_have_graphs_of_their_own() -> None:
    net, call = Net(lambda net, x: x).double(), ForwardPass()
    for training in (True, False):
        net.train(training)
        for size in SIZES:
            assert key(call, net, size) == key(ForwardPass(), net, size)
    assert counts(call) == [1, 1]


def test_symbols_that_take_too_long_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(any_size, "_SLOWER", 0)
    monkeypatch.setattr(any_size, "_AT_LEAST", 0)
    net, call = Net(lambda net, x: x).double(), ForwardPass()
    for size in SIZES[:4]:
        assert key(call, net, size) == key(ForwardPass(), net, size)
    assert counts(call) == [None]


class WithMask(nn.Module):
    """A loss of logits with a mask of the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor, weight: float = 1.0) -> Tensor:
        return weight * F.cross_entropy(self.head(self.body(x)), mask)


def test_gradients_are_those_of_plain_pytorch_while_sizes_of_image_and_mask_change() -> None:
    plain = WithMask().double()
    model = StreamingModel(copy.deepcopy(plain), tile=32)
    for number, size in enumerate([*SIZES, *SIZES[:2]]):
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        mask = torch.randint(0, 2, (2, *size))
        mask.note = "mine"  # type: ignore[attr-defined]
        losses = [net(image, mask, weight=1.0 + number % 2) for net in (plain, model)]
        for net, loss in zip((plain, model), losses, strict=True):
            net.zero_grad()
            loss.backward()
        assert torch.allclose(*losses, rtol=1e-12)
        for expected, found in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.allclose(found.grad, expected.grad, rtol=1e-9, atol=1e-12)
        assert vars(mask) == {"note": "mine"}
    # One for each weight, which is a number in the graph.
    assert counts(model._call) == [1, 1]


def test_parameters_can_be_exchanged_after_passes_of_many_sizes() -> None:
    model = StreamingModel(Net(lambda net, x: x).double(), tile=32)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for size in (*SIZES[:5], *SIZES[:5]):
            model(torch.randn(1, 3, *size, dtype=torch.float64)).sum().backward()
            model.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert None not in counts(model._call)


def test_an_image_that_is_too_small_is_refused_as_ever() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 7), nn.Conv2d(2, 2, 7)).double()
    model = StreamingModel(net, tile=32)
    for size in SIZES[:4]:
        model(torch.zeros(1, 3, *size, dtype=torch.float64))
    with pytest.raises(Exception, match="Kernel size can't be greater") as told:
        model(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(type(told.value), match=str(told.value)[:30]):
        StreamingModel(copy.deepcopy(net), tile=32)(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    model(torch.zeros(1, 3, 90, 91, dtype=torch.float64))
    # It has cost nothing that was captured, and the code is not taken for one that cannot be followed.
    assert counts(model._call) == [1]
    assert not model._call._unguardable
    assert len(model._call._guarded._of_size) == any_size.MANY_SIZES


class Weighted(nn.Module):
    """A map times a number, which is part of what a call is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor, weight: float) -> Tensor:
        return self.conv(x) * weight


def test_graphs_of_many_kinds_of_calls_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "MOST_GRAPHS", 4)
    monkeypatch.setattr(guards, "_MOST_KINDS", 3)
    net, call = Weighted().double(), ForwardPass()

    def captured(weight: float, size: tuple[int, int]) -> int:
        image = stand_in((1, 3, *size), torch.float64, torch.device("cpu"))
        call.until_captured(net, image, (weight,), {}, lambda graph, states: None)
        return call._guarded.count

    num_graphs = [captured(float(weight), size) for weight in range(8) for size in SIZES[:3]]
    assert max(num_graphs) == 4 + 3
    assert counts(call) == [1, 1, 1]
    with monkeypatch.context() as patches:
        patches.setattr(guards._Graphs, "__call__", None)
        for weight in (5.0, 6.0, 7.0):
            captured(weight, (90, 91))


def test_what_pytorch_knows_of_fake_tensors_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes, "_MOST_FAKES", 100)
    net, call = Net(lambda net, x: x).double(), ForwardPass()
    known = []
    for height in range(20, 60):
        key(call, net, (height, 51))
        known.append(len(FakeTensorMode.cache))
    assert max(known) < 200


def test_the_code_of_further_sizes_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes the time of a capture happens no more, however many sizes come."""
    followed = []
    as_before = guards._Graphs.__call__

    def counted(self: Any, *graph: Any) -> Any:
        followed.append(time.perf_counter())
        return as_before(self, *graph)

    monkeypatch.setattr(guards._Graphs, "__call__", counted)
    net, call = Net(lambda net, x: x).double(), ForwardPass()
    for height in range(20, 60):
        key(call, net, (height, 50))
    assert len(followed) == any_size.MANY_SIZES + 1
