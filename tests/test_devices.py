"""Nothing of a pass stays on another device than the model's: PyTorch's "meta" device stands for a GPU.

It has no memory and no values, and operators refuse to mix it with tensors on the host, as a GPU's do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.utils import _pytree as pytree

from streamcnn import StreamingModel
from streamcnn.data.reader import BatchReader
from streamcnn.geometry.regions import Region
from streamcnn.graph.ops import constants, dropout, pooling, samples
from streamcnn.graph.ops.rules import Sample
from streamcnn.runtime import streaming_model

DROPOUT = Sample(
    "dropout in train mode",
    lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Dropout(0.5),
        nn.Dropout2d(0.5),
        nn.BatchNorm2d(4, momentum=None),
        nn.AdaptiveAvgPool2d(1),
        nn.Dropout(0.2),
    ),
)


@pytest.fixture(autouse=True)
def _no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what looks at values, and autocast, which "meta" does not know."""

    def read(reader: BatchReader, region: Region) -> Tensor:
        return reader.read_stored(region).to(reader.device)

    monkeypatch.setattr(BatchReader, "read", read)
    monkeypatch.setattr(streaming_model, "require_values", lambda device, image: None)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)


def outputs_of(net: nn.Module, image: Tensor) -> list[Tensor]:
    found: Any = pytree.tree_leaves(StreamingModel(net, tile=16)(image))
    return [output for output in found if output.requires_grad]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("sample", [*samples(), DROPOUT], ids=lambda sample: sample.name)
def test_a_pass_stays_on_the_device_of_the_model(sample: Sample) -> None:
    net = sample.build().train(sample.train).to("meta")
    outputs = outputs_of(net, torch.randn(sample.shape))
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    gradients = [parameter.grad for parameter in net.parameters()]
    assert gradients
    assert all(g is not None and g.device.type == "meta" for g in (*gradients, *outputs))


def test_an_image_on_the_host_gets_its_gradient_there() -> None:
    net = nn.Conv2d(3, 4, 3).to("meta")
    (output,) = outputs_of(net, torch.randn(1, 3, 40, 40, requires_grad=True))
    # The copy to the host is what there are no values for.
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        output.backward(torch.empty_like(output))


def test_a_model_of_buffers_alone_is_captured_on_their_device() -> None:
    net = nn.BatchNorm2d(3, affine=False).to("meta")
    assert StreamingModel(net)(torch.randn(1, 3, 20, 20)).device.type == "meta"


@pytest.mark.parametrize(
    "make",
    [
        lambda device: dropout.draw_seed(device=device),
        lambda device: pooling._numbers((4, 6), (1, 1, 1, 2), dtype=torch.float32, device=device),
        lambda device: constants.brought(torch.rand(3), device),
    ],
    ids=["seed of dropout", "divisors of pooling", "values"],
)
def test_the_host_waits_for_no_card_to_take_small_values(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[torch.device], Tensor]
) -> None:
    """It would wait until the card has done all that it was given before."""
    pinned: list[Tensor] = []

    def to(values: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        assert device.type == "cuda"
        assert non_blocking
        assert any(values is each for each in pinned)
        return values

    monkeypatch.setattr(Tensor, "pin_memory", lambda values: (pinned.append(values), values)[1])
    monkeypatch.setattr(Tensor, "to", to)
    make(torch.device("cuda"))
    assert len(pinned) == 1


def test_a_card_has_a_constant_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And waits for it, since the next pass may be on another stream."""
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    like: Any = SimpleNamespace(
        is_cuda=True, shape=torch.Size([7919]), dtype=torch.float64, device=torch.device("cpu")
    )
    with torch.inference_mode():
        found = constants.filled(0.5, like)
    assert torch.equal(found, torch.full((7919,), 0.5, dtype=torch.float64))
    assert not found.is_inference()
    assert constants.filled(0.5, like) is found
    assert len(waited) == 1
    assert constants.filled(0.5, torch.zeros(3)) is not constants.filled(0.5, torch.zeros(3))


@pytest.mark.parametrize("mode", [FakeTensorMode, FunctionalTensorMode])
def test_what_is_recorded_to_be_compiled_pins_nothing(mode: Any) -> None:
    with mode():
        assert constants.is_traced(torch.rand(3))
    assert not constants.is_traced(torch.rand(3))
