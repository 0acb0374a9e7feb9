"""What operators declare that they cost, against what PyTorch counts and what autograd really saves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import traced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import streamcnn
from streamcnn import StreamingModel
from streamcnn.graph.costs import Cost, Operand, Operation, Routine, Saves, cost_of, counted, declare
from streamcnn.graph.ops import (
    FAMILIES,
    Call,
    CallBytes,
    NotStreamable,
    Sample,
    Tracer,
    rule,
    rules_version,
    samples,
)
from streamcnn.graph.ops.convolution import convolve, convolve_transposed
from streamcnn.graph.ops.rules import rule_for
from streamcnn.graph.program import Kind, TensorSpec
from streamcnn.planning.cost_model import resident_work, work

aten = torch.ops.aten


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def operation(
    target: Callable[..., Any], args: Sequence[Any], result: Tensor, *, fuses_attention: bool = False
) -> Operation:
    """A call with the shapes of real tensors."""

    def operand(value: Any) -> Any:
        return Operand(spec_of(value), value.requires_grad) if isinstance(value, Tensor) else value

    return Operation(target, tuple(map(operand, args)), {}, (spec_of(result),), fuses_attention)


# --- what autograd saves ------------------------------------------------------------------------------


def saved_bytes(target: Callable[..., Any], args: Sequence[Any]) -> tuple[int, Tensor]:
    """Bytes of the memory that a call's graph keeps, each block once, parameters left out; and the result."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = target(*args)
    blocks = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for argument in args:
        if isinstance(argument, nn.Parameter):
            blocks.pop(argument.untyped_storage().data_ptr(), None)
    return sum(blocks.values()), result


def declared_bytes(call: Operation) -> int:
    """What a call is declared to save, where all its operands have gradients."""
    saves = cost_of(call.target).saves
    operands = [a.spec.nbytes for a in call.args if isinstance(a, Operand) and isinstance(a.spec, TensorSpec)]
    total = sum(operands) if saves.operands or saves.factors else 0
    total += sum(spec.nbytes for spec in call.results) if saves.result else 0
    return total + (saves.beside(call) if saves.beside else 0)


def values(*shape: int) -> Tensor:
    return torch.rand(shape, requires_grad=True)


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape))


MAP = (2, 6, 12, 10)
SAVING: dict[str, tuple[Any, list[Any]]] = {
    **{
        name: (getattr(aten, name).default, [values(*MAP)])
        for name in ("clone", "exp", "neg", "reciprocal", "relu", "rsqrt", "sigmoid", "sqrt", "tanh")
    },
    "add": (aten.add.Tensor, [values(*MAP), values(*MAP)]),
    "sub": (aten.sub.Tensor, [values(*MAP), values(*MAP)]),
    "detach": (aten.detach.default, [values(*MAP)]),
    "mean": (aten.mean.dim, [values(*MAP), [2, 3]]),
    "sum": (aten.sum.dim_IntList, [values(*MAP), [2, 3]]),
    "softmax": (aten.softmax.int, [values(*MAP), 1]),
    "log_softmax": (aten.log_softmax.int, [values(*MAP), 1]),
    "constant_pad_nd": (aten.constant_pad_nd.default, [values(*MAP), [1, 2, 3, 4]]),
    "max_pool2d": (aten.max_pool2d.default, [values(*MAP), [2, 2]]),
    "conv2d": (aten.conv2d.default, [values(*MAP), weights(4, 6, 3, 3), weights(4)]),
    "conv_transpose2d": (aten.conv_transpose2d.input, [values(*MAP), weights(6, 4, 3, 3)]),
    "linear": (aten.linear.default, [values(5, 6), weights(4, 6), weights(4)]),
    "mm": (aten.mm.default, [values(5, 6), values(6, 7)]),
    "bmm": (aten.bmm.default, [values(3, 5, 6), values(3, 6, 7)]),
    "matmul": (aten.matmul.default, [values(3, 5, 6), values(3, 6, 7)]),
    "attention": (aten.scaled_dot_product_attention.default, [*(values(2, 40, 3) for _ in range(3))]),
    "attention of heads": (
        aten.scaled_dot_product_attention.default,
        [values(2, 3, 40, 4) for _ in range(3)],
    ),
    "attention with dropout": (
        aten.scaled_dot_product_attention.default,
        [*(values(2, 3, 40, 4) for _ in range(3)), None, 0.2],
    ),
    "mul": (aten.mul.Tensor, [values(*MAP), values(*MAP)]),
    # Nothing is declared of these.
    "gelu": (aten.gelu.default, [values(*MAP)]),
    "hardswish": (aten.hardswish.default, [values(*MAP)]),
    "silu": (aten.silu.default, [values(*MAP)]),
}


@pytest.mark.parametrize("case", SAVING.values(), ids=SAVING.keys())
def test_no_more_is_saved_than_is_declared(case: tuple[Any, list[Any]]) -> None:
    target, args = case
    saved, result = saved_bytes(target, args)
    declared = declared_bytes(operation(target, args, result))
    assert saved <= declared
    # Nor is the declaration lazy.
    assert saved >= declared / 2


def test_attention_that_is_one_operator_forms_no_matrix() -> None:
    query = values(2, 3, 40, 4)
    result = F.scaled_dot_product_attention(query, query, query)
    args = [query, query, query]
    target = aten.scaled_dot_product_attention.default
    inner = cost_of(target).inner
    assert inner is not None
    assert inner(operation(target, args, result)) == 0
    # With dropout it is one on a device that has such an operator.
    args = [*args, None, 0.2]
    assert inner(operation(target, args, result, fuses_attention=True)) == 0
    assert inner(operation(target, args, result)) == 2 * 3 * 40 * 40 * query.itemsize


# --- operations ---------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    transposed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_convolutions_are_counted_as_pytorch_counts_them(
    batch: int,
    groups: int,
    channels: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    size: tuple[int, int],
    transposed: bool,
) -> None:
    inside, outside = channels
    x = torch.rand(batch, groups * inside, *size)
    target: Callable[..., Tensor]
    args: list[Any]
    if transposed:
        weight = torch.rand(groups * inside, outside, *kernel)
        target, args = convolve_transposed, [x, weight, (stride, stride), (1, 1), groups]
    else:
        weight = torch.rand(groups * outside, inside, *kernel)
        target, args = convolve, [x, weight, None, (stride, stride), (1, 1), groups]
    with FlopCounterMode(display=False) as counter:
        result = target(*args)
    cost, call = cost_of(target), operation(target, args, result)
    assert cost.operations is not None
    assert cost.operations(call) == counter.get_total_flops() == counted(call)
    assert cost.per_channel is not None
    assert cost.per_channel(call) == (weight.shape[1] == 1)


@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (2, 3, 4, 6)])
def test_linear_layers_are_counted_as_pytorch_counts_them(shape: tuple[int, ...]) -> None:
    args = [torch.rand(shape), torch.rand(5, 6), torch.rand(5)]
    target = aten.linear.default
    call = operation(target, args, target(*args))
    cost = cost_of(target)
    assert cost.operations is not None
    assert cost.operations(call) == counted(call)
    assert cost.routine is Routine.MATRIX_PRODUCT


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.name)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_every_operator_has_a_cost(sample: Sample) -> None:
    program = traced(sample.build().train(sample.train), sample.shape)[0]
    for node in program.nodes.values():
        if node.kind is Kind.LOCAL:
            assert work(program, node).flops > 0
        if node.kind is Kind.GLOBAL:
            assert resident_work(program, node).flops >= 0
        cost = cost_of(node.target)
        for workspace in (cost.workspace, cost.backward_workspace):
            assert workspace is None or workspace(CallBytes(3, 5, 7, 4)) >= 0


# --- registries ---------------------------------------------------------------------------------------


@pytest.fixture
def unshuffle() -> Iterator[Any]:
    """An operator whose rule is put back at the end."""
    target = aten.pixel_unshuffle.default
    builtin = rule_for(target)
    assert builtin is not None
    yield target
    rule(target, replace=True)(builtin)


def refuse(tracer: Tracer, call: Call) -> Any:
    return NotStreamable("we said so")


def test_a_replaced_rule_is_followed_at_once(unshuffle: Any) -> None:
    net = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 3, 3))
    model = StreamingModel(net, tile=16)
    shape = (1, 3, 40, 36)
    before = model.plan(shape)
    assert before.residents == ()
    assert model.plan(shape) is before
    rule(unshuffle, replace=True)(refuse)
    (reason,) = model.plan(shape).residents
    assert "we said so" in reason


def test_a_second_rule_must_say_that_it_replaces_the_first(unshuffle: Any) -> None:
    version = rules_version()
    with pytest.raises(ValueError, match=r"aten\.pixel_unshuffle\.default has a rule already: replace=True"):
        rule(unshuffle)(refuse)
    with pytest.raises(ValueError, match="has a cost already"):
        declare(convolve, cost=Cost())
    assert rules_version() == version


def test_a_key_must_be_an_operator() -> None:
    with pytest.raises(
        TypeError, match=r"a rule's key must be an operator or a function, found 'aten::relu'"
    ):
        rule("aten::relu")(refuse)


def test_the_most_particular_declaration_counts() -> None:
    def target() -> None:
        """Stands for an operator."""

    assert cost_of(target) == Cost()
    mine = Cost(saves=Saves(result=True))
    declare(target, cost=mine)
    assert cost_of(target) is mine
    # An operator's own before that of its tag.
    assert cost_of(aten.relu.default).saves == Saves(result=True)
    assert cost_of(aten.gelu.default).saves == Saves(operands=True)


def test_no_other_room_knows_an_operator_by_name() -> None:
    package = Path(streamcnn.__file__).parent
    families = "|".join(family.__name__.rpartition(".")[2] for family in FAMILIES)
    named = re.compile(rf"\baten\b|torch\.ops|OpOverload|overloadpacket|graph\.ops\.({families})\b")
    rooms = ("plan", "planning", "execution", "runtime")
    found = [
        f"{path.relative_to(package)}: {line}"
        for room in rooms
        for path in (package / room).glob("*.py")
        for line in path.read_text().splitlines()
        if named.search(line)
    ]
    assert found == []
