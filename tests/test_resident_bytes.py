"""What ordinary autograd saves of operators on whole maps, projected and counted."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamcnn.graph.ops.dropout import drop_elements
from streamcnn.graph.program import Kind
from streamcnn.plan.storage import MemoryTerm
from streamcnn.planning.backends import CpuBackend
from streamcnn.planning.resident_bytes import ResidentBytes
from streamcnn.planning.staging import divide
from tests.helpers import traced

BACKEND = CpuBackend(kernel_bytes=0, code_bytes=0, matrix_bytes=0)
SHAPE = (1, 3, 48, 64)
MAP = 8 * 48 * 64 * 4
"""Bytes of the map that the operators under test read."""
SMALL = 1024
"""Bytes of statistics and seeds, which are left out."""

Between = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """An operator between two convolutions."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.between(self.before(x))).mean((1, 2, 3))


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def formed_attention(x: Tensor) -> Tensor:
    q = tokens(F.avg_pool2d(x, 4))
    return (torch.softmax(q @ q.transpose(1, 2), -1) @ q).transpose(1, 2).reshape(1, 8, 12, 16)


BETWEEN: dict[str, Between] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "leaky relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "square": lambda x: x**2,
    "softmax": lambda x: x.softmax(1),
    "log-softmax": lambda x: x.log_softmax(1),
    "clamp": lambda x: x.clamp(0, 1),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "gate": lambda x: x * x.sigmoid(),
    "residual": lambda x: x + F.relu(x),
    "squeeze and excite": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "expanded": lambda x: x * x.mean((2, 3), keepdim=True).expand_as(x),
    "parts": lambda x: torch.cat([F.gelu(part) for part in x.chunk(2, 1)], 1),
    "slices": lambda x: torch.cat((x[:, :4], F.relu(x[:, 4:])), 1),
    "largest channel": lambda x: x * x.amax(1, keepdim=True),
    "sorted": lambda x: x.sort(1)[0],
    "summed up": lambda x: x.cumsum(3),
    "rolled": lambda x: x.roll(2, 3),
    "flipped": lambda x: x.flip(3),
    "padded": lambda x: F.pad(x, (1, 1, 1, 1)),
    "reflected": lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
    "repeated": lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
    "unshuffled": lambda x: F.pixel_unshuffle(x, 2)[:, ::4],
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "unfolded": lambda x: F.unfold(x, 2, stride=2).reshape(1, 32, 24, 32)[:, ::4],
    "max pooling": lambda x: F.max_pool2d(x, 2),
    "average pooling": lambda x: F.avg_pool2d(x, 2),
    "adaptive pooling": lambda x: F.adaptive_avg_pool2d(x, (8, 8)),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "group norm": lambda x: F.group_norm(x, 2),
    "instance norm": F.instance_norm,
    "layer norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
    "local response norm": lambda x: F.local_response_norm(x, 3),
    "unit length": lambda x: F.normalize(x, dim=1),
    "linear": lambda x: F.linear(x.permute(0, 2, 3, 1), torch.ones(8, 8)).permute(0, 3, 1, 2),
    "transposed convolution": lambda x: F.conv_transpose2d(x, torch.ones(8, 8, 2, 2), stride=2),
    "attention, formed": formed_attention,
}


def saved_bytes(net: nn.Module) -> int:
    """Bytes of the memory that autograd keeps for the backward pass, parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in net.state_dict().values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.randn(SHAPE))
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def resident(net: nn.Module, shape: tuple[int, ...] = SHAPE) -> ResidentBytes:
    """Of a whole net."""
    streamed, _ = traced(net, shape)
    first = next(node.name for node in streamed.nodes.values() if node.kind is Kind.LOCAL)
    program, differentiated = traced(net, shape, tail=first)
    (names,) = divide(program).segments.values()
    return ResidentBytes(program, names, BACKEND, differentiated)


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_what_autograd_saves_is_counted(between: Between) -> None:
    net = Around(between)
    counted = saved_bytes(copy.deepcopy(net))
    assert resident(net).staying == pytest.approx(counted, abs=SMALL)


def test_dropout_saves_a_byte_for_each_element() -> None:
    counted = saved_bytes(Around(lambda x: drop_elements(x, torch.tensor(5), 0.3, tuple(x.shape))))
    assert resident(Around(lambda x: F.dropout(x, 0.3))).staying == pytest.approx(counted, abs=SMALL)


class Reshaped(nn.Module):
    """Views of one map, and a copy where a view must be dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.conv(x).flatten(2).transpose(1, 2).unsqueeze(1).reshape(1, -1)
        return (flat * flat).sum(1)


def test_views_take_nothing() -> None:
    net = Reshaped()
    assert resident(net).staying == 3 * 48 * 64 * 4 + MAP == saved_bytes(net)


class Residual(nn.Module):
    """A map that is read again much later."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.others = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.first(x)
        for conv in self.others:
            x = conv(x)
        return (x + first).mean((1, 2, 3))


def test_gradients_wait_for_the_operator_that_made_their_value() -> None:
    step = resident(Residual()).step()
    terms = {term.name: term.nbytes for term in step.terms}
    # The first map's gradient, and those of operand and result of the last convolution.
    assert step.operator == "conv2d_3"
    assert terms["operands, results and their gradients"] == 3 * MAP
    assert terms["saved by the resident tail"] == 3 * MAP + 3 * 48 * 64 * 4


def test_without_gradients_values_live_to_their_last_reader() -> None:
    net = Residual()
    program = resident(net).program
    (names,) = divide(program).segments.values()
    inference = ResidentBytes(program, names, BACKEND, ())
    step = inference.step()
    assert MemoryTerm("saved by the resident tail", 0) in step.terms
    # The first map, and operand and result of a convolution.
    assert MemoryTerm("operands, results and their gradients", 3 * MAP) in step.terms
    assert inference.staying == 0
    asked = ResidentBytes(program, names, BACKEND, (), ["conv2d", *program.output_names])
    assert asked.staying == MAP + 4
