"""Copies of many small tensors at once."""

from __future__ import annotations

import torch
from operator_counts import count_operators
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.runtime.state_copies import assign, copied


class Tagged(Tensor):
    """A class of its own, which is not for joining with others."""


def make_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "mean": torch.randn(5),
        "counter": torch.tensor(3),
        "grid": torch.randn(2, 3, 4).transpose(0, 2),
        "steps": torch.tensor([2**62, -1]),
        "empty": torch.empty(0, 4),
        "weight": nn.Parameter(torch.randn(2, 2)),
        "negative zero": torch.tensor([-0.0, float("nan")]),
        "spread": torch.randn(3, 1).expand(3, 2),
        "complex": torch.randn(4, dtype=torch.complex64),
        "tagged": torch.randn(4).as_subclass(Tagged),
    }


def test_copies_are_equal_and_of_their_own() -> None:
    tensors = make_tensors()
    found = copied(tensors)
    assert found.keys() == tensors.keys()
    for name, copy in found.items():
        torch.testing.assert_close(copy, tensors[name].detach(), rtol=0, atol=0, equal_nan=True)
        assert type(copy) is (Tagged if name == "tagged" else Tensor)
        assert not copy.requires_grad
        copy.fill_(7)
    for name, tensor in make_tensors().items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(copied(make_tensors())["negative zero"][0])


def test_values_are_assigned_in_place_whatever_their_type() -> None:
    targets = {name: tensor.clone() for name, tensor in make_tensors().items()}
    before = dict(targets)
    values = {
        name: (tensor + 1).double() if tensor.is_floating_point() else tensor + 1
        for name, tensor in make_tensors().items()
        if name != "grid"
    }
    assign(targets, values)
    assert all(targets[name] is tensor for name, tensor in before.items())
    for name, tensor in targets.items():
        expected = make_tensors()[name] if name == "grid" else values[name].to(tensor.dtype)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)


def test_running_statistics_change_in_as_many_copies_as_there_are_kinds_of_them() -> None:
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))]
    model = StreamingModel(nn.Sequential(*layers), tile=16)
    counts = count_operators(lambda: model(torch.randn(1, 3, 30, 30)))
    assert counts["_foreach_copy_"] == 2


def test_one_of_a_kind_is_copied_alone() -> None:
    assert count_operators(lambda: copied({"a": torch.ones(2)})) == {"ones": 1, "clone": 1}
    assert count_operators(lambda: assign({"a": torch.ones(2)}, {"a": torch.ones(2)}))["copy_"] == 1
