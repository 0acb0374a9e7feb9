"""New values of states that are computed together, in a number of operators that does not grow with them."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import torch
from helpers import traced
from operator_counts import count_operators
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.graph.together import Together

SHAPE = (2, 3, 40, 33)


class Counting(nn.Module):
    """Norms that are updated in different ways, and states that forward reads once they are updated."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3) for i in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4, momentum=0.1 + 0.2 * (i % 2)) for i in range(5))
        self.norms.append(nn.BatchNorm2d(4, momentum=None))
        self.register_buffer("calls", torch.tensor(3))
        self.register_buffer("ratio", torch.tensor(1.0, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("shown", torch.tensor(0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        # Used twice: its statistics are updated one after the other.
        x = self.norms[0](x)
        self.calls += 1
        self.ratio += 1
        self.seen += 1
        self.shown += 1
        read = self.norms[1].running_mean.mean() + self.seen
        return x.mean((2, 3)), read, self.shown


@pytest.mark.parametrize("keeps_tail", [False, True])
def test_states_are_updated_as_in_plain_pytorch(keeps_tail: bool) -> None:
    torch.manual_seed(0)
    net = Counting().double()
    plain = deepcopy(net)
    model = StreamingModel(net, budget="1GiB", tile=16)
    model.resident_tail = keeps_tail
    for _ in range(2):
        x = torch.randn(SHAPE, dtype=torch.float64)
        for found, expected in zip(model(x), plain(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert net.calls == 5
    for (name, found), (_, expected) in zip(net.named_buffers(), plain.named_buffers(), strict=True):
        assert found.dtype is expected.dtype, name
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_one_operator_updates_what_differs_in_tensors_alone() -> None:
    program, _ = traced(Counting(), SHAPE)
    found = [node.spec for node in program.nodes.values() if isinstance(node.target, Together)]
    # The numbers of batches of five norms and two counters; statistics of five norms but one that is read.
    assert sorted(len(spec) for spec in found if isinstance(spec, tuple)) == [7, 9]


def operators_of_a_pass(num_norms: int) -> Counter[str]:
    layers = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(num_norms)]
    model = StreamingModel(nn.Sequential(*layers), tile=16)
    model.resident_tail = False
    image = torch.randn(1, 3, 16, 16)
    model(image)
    return count_operators(lambda: model(image))


def test_running_statistics_take_as_many_operators_for_many_norms_as_for_two() -> None:
    few, many = operators_of_a_pass(2), operators_of_a_pass(9)
    updating = ("_foreach_mul", "_foreach_add", "_foreach_add_")
    assert few["_foreach_mul"] == 2
    assert {name: few[name] for name in updating if few[name] != many[name]} == {}
