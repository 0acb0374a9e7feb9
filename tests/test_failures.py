"""A pass that fails in its middle changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from failure_cases import assert_unchanged, everything_of, make_image, make_model
from torch import nn

from streamcnn import (
    BudgetExceeded,
    StreamingModel,
)
from streamcnn.data.reader import BatchReader
from streamcnn.execution import global_graph
from streamcnn.execution.backward_tile import BackwardTile
from streamcnn.execution.executor import Execution
from streamcnn.execution.global_graph import GlobalGraph
from streamcnn.execution.interpreter import TileRun
from streamcnn.execution.maps import Maps
from streamcnn.stores import MemoryStore, SpillFolder, StoreSpec, ZarrStore

TOLERANCE = 1e-9


def update(model: nn.Module, seed: int = 7) -> None:
    """One pass in both directions with a fixed seed."""
    torch.manual_seed(seed)
    model(make_image()).square().sum().backward()


def assert_works_as_if_new(model: StreamingModel, reference: nn.Module) -> None:
    """The next pass gives what plain PyTorch gives."""
    for module in (model, reference):
        update(module)
    largest = max(float(p.grad.norm()) for p in reference.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        floor = max(float(q.grad.norm()), 1e-6 * largest)
        assert float((p.grad - q.grad).norm()) <= TOLERANCE * floor, name
    for (name, a), b in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=0, msg=name)


class Injected(Exception):
    """Raised on purpose."""


@contextmanager
def failing(owner: type | ModuleType, method: str, error: BaseException, call: int) -> Iterator[None]:
    """Let the given call of ``method`` (0 is the first) raise ``error``."""
    original: Callable[..., Any] = getattr(owner, method)
    calls = 0

    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise error
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, replacement)
        yield
    assert calls > call, f"{owner.__name__}.{method} was called {calls} times only"


FORWARD = [
    (BatchReader, "read", 0),
    (BatchReader, "read", 5),
    (ZarrStore, "write", 0),
    (ZarrStore, "write", 4),
    (ZarrStore, "reserve", 3),
    (ZarrStore, "__init__", 0),
    (SpillFolder, "__init__", 0),
    (TileRun, "evaluate_operator", 10),
    (GlobalGraph, "run", 1),
    (global_graph, "evaluate", 6),
    (Execution, "_barrier", 1),
]
BACKWARD = [
    (BatchReader, "read", 2),
    (ZarrStore, "reserve", 2),
    (ZarrStore, "add", 0),
    (ZarrStore, "add", 3),
    (TileRun, "evaluate_operator", 4),
    (GlobalGraph, "backward", 0),
    (GlobalGraph, "backward", 1),
    (GlobalGraph, "accumulate", 3),
    (BackwardTile, "arriving", 3),
]


def _named(places: list[tuple[type, str, int]]) -> list[Any]:
    return [pytest.param(*place, id=f"{place[0].__name__}.{place[1]}-{place[2]}") for place in places]


def error_at(call: int) -> BaseException:
    """At half of the places it is the user who stops the pass."""
    return KeyboardInterrupt() if call % 2 else Injected("stop")


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize(("owner", "method", "call"), _named(FORWARD))
def test_a_failed_forward_pass_changes_nothing(
    owner: type | ModuleType, method: str, call: int, tmp_path: Path
) -> None:
    model = make_model(tmp_path)
    reference = copy.deepcopy(model.net)
    for module in (model, reference):
        update(module)
    before = everything_of(model)
    error = error_at(call)
    with failing(owner, method, error, call), pytest.raises(type(error)) as caught:
        model(make_image())
    assert caught.value is error
    assert_unchanged(before, everything_of(model))
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())
    assert_works_as_if_new(model, reference)


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize(("owner", "method", "call"), _named(BACKWARD))
def test_a_failed_backward_pass_changes_nothing(
    owner: type | ModuleType, method: str, call: int, tmp_path: Path
) -> None:
    model = make_model(tmp_path)
    reference = copy.deepcopy(model.net)
    losses = []
    for module in (model, reference):
        update(module)
        torch.manual_seed(3)
        losses.append(module(make_image()).square().sum())
    before = everything_of(model)
    error = error_at(call)
    with failing(owner, method, error, call), pytest.raises(type(error)):
        losses[0].backward(retain_graph=True)
    assert_unchanged(before, everything_of(model))
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())
    # The graph was to be kept, so that the pass can be differentiated after all.
    for loss in losses:
        loss.backward()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    assert_works_as_if_new(model, reference)


@pytest.mark.usefixtures("on_disk")
def test_images_that_cannot_be_released_leave_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Injected

    monkeypatch.setattr(BatchReader, "release", refuse)
    model = make_model(tmp_path)
    with torch.no_grad(), pytest.raises(Injected) as caught:
        model(make_image())
    # The error's traceback holds the pass, so nothing is collected here.
    assert caught.tb is not None
    model.release()
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_closed_leaves_no_other_open() -> None:
    class Stuck(MemoryStore):
        def _free(self) -> None:
            raise Injected

    spec = StoreSpec((1, 1, 2, 2), torch.float32, (2, 3))
    stores = {
        name: kind(spec, torch.device("cpu"))
        for name, kind in zip("abcd", [MemoryStore, Stuck] * 2, strict=True)
    }
    nothing: Any = None
    maps = Maps(nothing, nothing, {}, {}, nothing)
    maps._checkpoints.update(stores)
    with pytest.raises(Injected):
        maps.close()
    assert all(store._closed for store in stores.values())


def test_a_failed_forward_pass_does_not_free_another_one() -> None:
    model = make_model()
    reference = copy.deepcopy(model.net)
    losses = []
    for module in (model, reference):
        torch.manual_seed(3)
        losses.append(module(make_image()).square().sum())
    with failing(MemoryStore, "write", Injected("stop"), 5), pytest.raises(Injected):
        model(make_image())
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=TOLERANCE, atol=1e-12, msg=name)


@pytest.mark.parametrize("text", ["DefaultCPUAllocator: can't allocate memory", "std::bad_alloc"])
def test_a_refused_allocation_names_the_budget(text: str) -> None:
    model = make_model(budget="1GiB")
    before = everything_of(model)
    message = (
        r"allocation in the {} pass was refused: budget 1.00 GiB, projected .* MiB with tiles of 16x16 "
        r"pixels, and there is no plan with smaller ones\. Nothing was changed; raise budget="
    )
    with failing(TileRun, "evaluate_operator", RuntimeError(text), 3):
        with pytest.raises(BudgetExceeded, match=message.format("forward")):
            model(make_image())
    assert_unchanged(before, everything_of(model))
    loss = model(make_image()).sum()
    before = everything_of(model)
    with failing(MemoryStore, "add", MemoryError(), 0):
        with pytest.raises(MemoryError, match=message.format("backward")):
            loss.backward()
    assert_unchanged(before, everything_of(model))


def test_without_a_budget_an_out_of_memory_error_stays_what_it_is() -> None:
    model = make_model()
    error = RuntimeError("std::bad_alloc")
    with failing(TileRun, "evaluate_operator", error, 3), pytest.raises(RuntimeError) as caught:
        model(make_image())
    assert caught.value is error
