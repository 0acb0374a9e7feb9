"""Captures in several threads: each is made as if it were alone, and changes nothing for the others."""

from __future__ import annotations

import copy
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch._dynamo  # replaces torch.manual_seed for good
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamcnn import StreamingModel


def image(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, 3, 29, 37), generator=generator, dtype=torch.float64)


class Head(nn.Module):
    """Code that can be guarded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).sin().mean((2, 3)))


class DrawsInPython(nn.Module):
    """Code that is captured anew at each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).square().mean((2, 3)) + 0 * random.random()


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads that take turns every 50 us."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(*tasks: Callable[[], object]) -> None:
    """Run tasks at once, each in a thread; raise what the first of them raises."""
    ready = threading.Barrier(len(tasks))

    def begin(task: Callable[[], object]) -> None:
        ready.wait()
        task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        for future in [pool.submit(begin, task) for task in tasks]:
            future.result()


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("budget", [None, "300 MB"])
def test_models_in_several_threads_are_captured_one_after_the_other(budget: str | None) -> None:
    torch.manual_seed(0)
    nets = [DrawsInPython().double() for _ in range(2)] + [nn.Conv2d(3, 4, 3).double()]
    plain, image = copy.deepcopy(nets), torch.randn(2, 3, 24, 20, dtype=torch.float64)
    functions = torch.manual_seed, torch.set_rng_state, nn.BatchNorm2d.forward

    def train(model: nn.Module) -> None:
        for _ in range(2):
            model(image).square().sum().backward()

    in_threads(*(partial(train, StreamingModel(net, budget, tile=12)) for net in nets))
    for net, twin in zip(nets, plain, strict=True):
        train(twin)
        torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-12)
        gradients, expected = ([p.grad for p in each.parameters()] for each in (net, twin))
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
    assert gc.isenabled()
    assert (torch.manual_seed, torch.set_rng_state, nn.BatchNorm2d.forward) == functions


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("make", [DrawsInPython, Head])
def test_one_model_serves_several_threads(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = make().double().eval()
    model = StreamingModel(net, tile=12)
    images = [torch.randn(1, 3, 20 + 4 * k, 24, dtype=torch.float64) for k in range(6)]
    found: dict[int, Tensor] = {}

    def predict(key: int) -> None:
        with torch.no_grad():
            found[key] = model(images[key])

    in_threads(*(partial(predict, key) for key in range(len(images))))
    for key, result in found.items():
        torch.testing.assert_close(result, net(images[key]), rtol=1e-9, atol=1e-12)


class WaitsForOthers(nn.Module):
    """Lets a task run in another thread while its forward pass is captured."""

    def __init__(self, task: Callable[[], None]) -> None:
        super().__init__()
        self.conv, self.task = nn.Conv2d(3, 4, 3), task

    def forward(self, x: Tensor) -> Tensor:
        in_threads(self.task)
        return self.conv(x)


def test_a_capture_changes_nothing_for_other_threads() -> None:
    torch.manual_seed(0)
    streamed_net, net = DrawsInPython().double(), nn.BatchNorm2d(3, momentum=None).double()
    plain, twin = copy.deepcopy(streamed_net), copy.deepcopy(net)
    loss = StreamingModel(streamed_net, tile=12)(image()).square().sum()

    def task() -> None:
        loss.backward()
        for seed in range(2):
            net(image(seed))
        torch.random.set_rng_state(torch.random.get_rng_state())
        checkpoint(lambda x: x + 1, image().requires_grad_(), use_reentrant=False)

    own = WaitsForOthers(task).double()
    torch.testing.assert_close(StreamingModel(own, tile=12)(image()), own.conv(image()))
    plain(image()).square().sum().backward()
    for seed in range(2):
        twin(image(seed))
    torch.testing.assert_close(net.state_dict(), twin.state_dict())
    expected = [p.grad for p in plain.parameters()]
    torch.testing.assert_close([p.grad for p in streamed_net.parameters()], expected, rtol=1e-9, atol=1e-12)
