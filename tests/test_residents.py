"""What plans say of operators on whole maps: that they are there, why, how many, and what they take."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from helpers import traced
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn import StreamingModel
from streamcnn.execution.maps import Maps
from streamcnn.graph.program import Kind, on_whole_maps
from streamcnn.plan.hardware import NOMINAL
from streamcnn.plan.plan import Plan
from streamcnn.planning.backends import CpuBackend
from streamcnn.planning.backends.cpu import RUNTIME_BYTES
from streamcnn.planning.cost_model import BACKWARD_WORK, resident_time, resident_work

WIDTH = 16
HARDWARE = NOMINAL["cpu"]


class Attention(nn.Module):
    """Self-attention over all positions of a map, by matrix products or by the fused operator."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.fused = fused
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        # Rows of bounded norm are whole, and so is what follows.
        tokens = self.conv(x).renorm(2, 3, 9.0).flatten(2).transpose(1, 2)
        query, key, value = self.mix(tokens).chunk(3, -1)
        if self.fused:
            attended = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        else:
            attended = torch.softmax(query @ key.transpose(1, 2), -1) @ value
        return self.head((tokens + attended).mean(1))


class InTheMiddle(nn.Module):
    """A resident operator with maps before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.last = nn.Conv2d(WIDTH, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + x.renorm(2, 2, 9.0)
        return self.last(x.sin()).mean((2, 3))


def plan_of(net: nn.Module, edge: int, *, tail: bool = True) -> Plan:
    model = StreamingModel(net, "8GiB")
    model.resident_tail = tail
    return model.plan((1, 3, edge, edge), torch.float32)


@pytest.mark.parametrize("fused", [False, True])
def test_operations_of_attention(fused: bool) -> None:
    program, differentiated = traced(Attention(fused=fused), (1, 3, 20, 30))
    tokens = 600
    works = {node.name: resident_work(program, node) for node in on_whole_maps(program)}
    flops = {name: work.flops for name, work in works.items()}
    assert flops["linear"] == 2 * tokens * WIDTH * 3 * WIDTH
    product = 2 * tokens * tokens * WIDTH
    if fused:
        assert flops["scaled_dot_product_attention"] == 2 * product
    else:
        assert flops["matmul"] == flops["matmul_1"] == product
        assert flops["softmax"] == tokens * tokens
        # The product of queries and keys is read, and as much is written.
        assert works["softmax"].nbytes == 2 * 4 * tokens * tokens
    assert works["flatten"].nbytes == works["transpose"].flops == 0
    # Everything is differentiated: once forward, and backward as often as there are operands.
    time = resident_time(program, differentiated, HARDWARE, CpuBackend.on(1), keeps_blocks=False)
    assert time.flops == sum((1 + BACKWARD_WORK) * each for each in flops.values())


def test_operations_of_a_resident_convolution() -> None:
    # Of so few positions that no map begins with it.
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Unflatten(2, (4, 12)), nn.Conv2d(4, 8, 3))
    program, _ = traced(net, (1, 3, 10, 8))
    (node,) = (node for node in on_whole_maps(program) if node.name == "conv2d_1")
    assert resident_work(program, node).flops == 2 * (4 * 8 * 9) * 2 * 10
    assert not resident_work(program, node).grouped


@pytest.mark.parametrize("tail", [True, False])
def test_time_grows_with_the_square_of_the_tokens(tail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # With them, only plain PyTorch takes new memory for the attention matrix.
    monkeypatch.setenv("STREAMCNN_KEEP_BLOCKS", "0")
    small, large = (plan_of(Attention(), edge, tail=tail) for edge in (64, 128))
    assert 12 < large.projected_seconds / small.projected_seconds < 20
    # 16,384 tokens: a product of 2 x 16384^2 x 16 operations, twice forward and four times backward.
    least = 6 * 2 * 16384**2 * WIDTH / HARDWARE.dense_flops
    assert large.projected_seconds > least
    assert large.plain_seconds > least
    assert large.projected_seconds == pytest.approx(large.plain_seconds, rel=0.1)
    assert large.recomputation == pytest.approx(1.0, abs=0.01)


def test_bytes_hold_the_attention_matrix() -> None:
    matrix = 4 * 64**4
    formed, fused = (plan_of(Attention(fused=fused), 64) for fused in (False, True))
    # The matrix itself, its gradient and that of what it was made from.
    assert formed.projected_bytes > 3 * matrix
    assert formed.plain_bytes > 3 * matrix
    assert fused.projected_bytes < matrix


class MaskedAttention(nn.Module):
    """The fused operator with dropout or with a mask that is trained."""

    def __init__(self, num_tokens: int, dropout: float, *, masked: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(3, WIDTH)
        self.dropout = dropout
        self.mask = nn.Parameter(torch.zeros(1, 1, num_tokens, num_tokens)) if masked else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mix(x.flatten(2).transpose(1, 2))[:, None]
        # With dropout, only causal attention runs on whole maps.
        return F.scaled_dot_product_attention(
            tokens, tokens.sin(), tokens.cos(), self.mask, self.dropout, is_causal=self.dropout > 0
        )


@pytest.mark.parametrize(
    ("dropout", "masked", "least"), [(0.0, False, 0.0), (0.1, False, 4.0), (0.0, True, 3.0)]
)
def test_bytes_hold_the_matrix_where_attention_is_not_one_kernel(
    dropout: float, masked: bool, least: float
) -> None:
    matrix = 4 * 48**4
    nbytes = plan_of(MaskedAttention(48**2, dropout, masked=masked), 48).projected_bytes
    # A mask that is trained, and its gradient, are beside it.
    assert least * matrix < nbytes - RUNTIME_BYTES < (least + 3) * matrix


def test_a_tail_hides_no_reason() -> None:
    with_tail, without = (plan_of(Attention(), 64, tail=tail) for tail in (True, False))
    assert not with_tail.phases
    assert with_tail.residents == without.residents
    (reason,) = with_tail.residents
    assert reason.startswith("aten.renorm: it has no rule")
    lines = with_tail.explain().splitlines()
    assert lines[-1] == f"resident: {reason}"
    # One convolution, renorm, flatten, softmax, sum, mean; two transposes, layers, products; a chunk.
    assert lines[-2] == "then 13 operators on whole maps (the resident tail)"
    assert "then 12 operators on whole maps (the resident tail)" in without.explain()


def test_resident_operators_in_the_middle_are_no_tail() -> None:
    plan = plan_of(InTheMiddle(), 64, tail=False)
    assert plan.num_resident == 0
    assert [reason.partition(":")[0] for reason in plan.residents] == ["aten.renorm"]
    assert "resident tail" not in plan.explain().splitlines()[-2]


def test_a_streamed_network_has_none() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    program, differentiated = traced(net, (2, 3, 20, 20))
    assert on_whole_maps(program) == ()
    assert resident_time(program, differentiated, HARDWARE, CpuBackend.on(1), keeps_blocks=False).seconds == 0
    assert any(node.kind is Kind.GLOBAL for node in program.nodes.values())


class BoundedRows(nn.Module):
    """An operator on whole maps after every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4 if i else 3, 4, 3, padding=1) for i in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).renorm(2, 3, 9.0)
        return x.mean((2, 3))


@pytest.mark.parametrize("budget", [None, "20MiB", "8GiB"])
def test_no_plan_takes_more_than_plain_pytorch(budget: str | None) -> None:
    plan = StreamingModel(BoundedRows(), budget).plan((1, 3, 1024, 1024), torch.float32)
    assert plan.projected_bytes <= plan.plain_bytes


class Resampled(nn.Module):
    """A map that is taken whole, by an operator whose gradient needs no values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.interpolate(self.first(x), scale_factor=0.5, mode="bilinear"))


def test_a_whole_map_that_no_gradient_needs_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[weakref.ref[Any]] = []
    read_whole = Maps.read_whole

    def keep(maps: Maps, name: str) -> Tensor:
        whole = read_whole(maps, name).clone()
        gathered.append(weakref.ref(whole.untyped_storage()))
        return whole

    monkeypatch.setattr(Maps, "read_whole", keep)
    net = Resampled()
    model = StreamingModel(net, tile=16)
    image = torch.rand(1, 3, 48, 40)
    found = model(image).square().mean()
    assert gathered
    assert [ref() for ref in gathered] == [None] * len(gathered)
    (gradient,) = torch.autograd.grad(found, net.first.weight)
    (expected,) = torch.autograd.grad(net(image).square().mean(), net.first.weight)
    torch.testing.assert_close(gradient, expected)
