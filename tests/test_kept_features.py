"""Hooks that keep what layers give, as libraries of explanations set them: under a lock, by module."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, all_in_tiles
from torch import Tensor, nn

from streamcnn import StreamingModel, UnsupportedModel


class Net(nn.Module):
    def __init__(self, lock: Any = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
        self.head = nn.Linear(5, 2)
        self.lock = lock

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).relu().mean((2, 3)))


def _layer_gradients(net: Net, forward: Any, image: Tensor) -> dict[str, Tensor]:
    """The gradient of a score by what a layer gives, as captum finds it."""
    saved: dict[nn.Module, dict[torch.device, tuple[Tensor, ...]]] = defaultdict(dict)
    lock = threading.Lock()

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        with lock:
            saved[module][output.device] = (output,)
            return output.clone()

    handle = net.layers.register_forward_hook(hook)
    try:
        score = forward(image)[:, 1].sum()
    finally:
        handle.remove()
    ((kept,),) = saved[net.layers].values()
    return {"score": score, "kept": kept, "gradient": torch.autograd.grad(score, kept)[0]}


def test_a_layers_gradients_are_found_under_a_lock() -> None:
    torch.manual_seed(0)
    net, image = Net().double().eval(), torch.randn(2, 3, 29, 37, dtype=torch.float64)
    model = all_in_tiles(net)
    plain = _layer_gradients(net, net, image)
    for _ in range(2):
        torch.testing.assert_close(_layer_gradients(net, model, image), plain, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("make", [threading.Lock, threading.RLock])
def test_a_lock_is_free_after_a_pass(make: Any) -> None:
    class Locked(Net):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            with self.lock:
                self.count += 1
                return super().forward(x) * 2

    torch.manual_seed(0)
    net = Locked(make()).eval()
    model, image = StreamingModel(net, tile=16), torch.randn(2, 3, 29, 37)
    found = model(image)
    assert net.count == 1
    assert net.lock.acquire(blocking=False)
    net.lock.release()
    torch.testing.assert_close(found, net(image))


def test_a_refusal_names_the_code_that_cannot_be_followed() -> None:
    kept = []

    class Timed(Net):
        def forward(self, x: Tensor) -> Tensor:
            begun = time.perf_counter()
            features = self.layers(x)
            kept.append((features, begun))
            return self.head(features.mean((2, 3)))

    model = StreamingModel(Timed())
    for _ in range(2):
        with pytest.raises(
            UnsupportedModel, match=r"Dynamo says .* \(test_kept_features\.py:\d+: begun = time\."
        ):
            model(torch.randn(2, 3, 29, 37))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripting_a_streamed_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"torch\.jit\.script\(\) .* which is model\.net"):
        torch.jit.script(StreamingModel(Net()))
