"""Ctrl-C at any line of entering and leaving the ceiling leaves nothing behind."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.ceiling import cpu
from streamcnn.ceiling.cpu import DataLimit
from streamcnn.runtime import autograd_node, pass_meter, pass_stores, plan_run, read_again, streamed_pass

PACKAGE = Path(streamed_pass.__file__).parents[1]
TRACED = {
    *map(str, (PACKAGE / "ceiling").glob("*.py")),
    str(PACKAGE / "support" / "interrupts.py"),
    *(
        each.__file__
        for each in (streamed_pass, plan_run, pass_stores, autograd_node, read_again, pass_meter)
    ),
}
Place = tuple[str, int]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the ceiling needs Linux")


class Interrupt:
    """Raises ``KeyboardInterrupt`` when a line of a pass is reached for the first or the last time."""

    def __init__(self, place: Place | None = None, at: int = 0) -> None:
        self.place = place
        self.at = at
        self.counts: dict[Place, int] = {}

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            self.counts[place] = self.counts.get(place, 0) + 1
            if place == self.place and self.counts[place] == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def traced(interrupt: Interrupt, action: Callable[[], object]) -> bool:
    """Whether ``action`` was interrupted."""
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def moments(action: Callable[[], object]) -> list[tuple[Place, int]]:
    """Every line that ``action`` comes to, the first time and the last time."""
    counter = Interrupt()
    assert not traced(counter, action)
    return [(place, at) for place, count in counter.counts.items() for at in sorted({1, count})]


def left_behind() -> dict[str, Any]:
    """What an entered ceiling has beside the memory that it measures."""
    import resource

    return {
        "limit": resource.getrlimit(resource.RLIMIT_DATA),
        "threads": [t.name for t in threading.enumerate() if t.name == "streamcnn-sampler"],
        "files": len(os.listdir("/proc/self/fd")),
        "active": len(cpu.entered_limits),
        "gradients": torch.is_grad_enabled(),
    }


def make_model() -> StreamingModel:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout2d(0.5), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)
    )
    return StreamingModel(net, "1GiB", tile=16)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def is_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_pass_leaves_nothing_and_buffers_that_are_all_of_it_or_none() -> None:
    model, image = make_model(), torch.ones(1, 1, 24, 16)
    model(image).sum().backward()
    before, state = buffers_of(model), model.state_dict()
    kept = {name: value.clone() for name, value in state.items()}

    def update() -> None:
        # `torch.manual_seed` would note for CUDA where it was called from, which takes longer than a tile.
        torch.default_generator.manual_seed(1)
        model(image).square().sum().backward()

    update()
    after = buffers_of(model)
    at_first = left_behind()
    found, num_interrupted = list[Any](), 0
    model.load_state_dict(kept)
    every = moments(update)
    assert len(every) > 300
    for place, at in every:
        model.load_state_dict(kept)
        model.zero_grad()
        num_interrupted += traced(Interrupt(place, at), update)
        now = buffers_of(model)
        if left_behind() != at_first or not (is_equal(now, before) or is_equal(now, after)):
            found.append((place, at, left_behind()))
    assert found == []
    # How often something is waited for is not the same each time.
    assert num_interrupted > 0.9 * len(every)
    model.load_state_dict(kept)
    update()
    assert is_equal(buffers_of(model), after)


def test_a_block_inside_of_finally_leaves_nothing() -> None:
    def enter_and_leave() -> None:
        limit = DataLimit(10**9)
        try:
            with limit:
                limit.check()
        finally:
            limit.close()

    enter_and_leave()
    at_first = left_behind()
    every, num_interrupted = moments(enter_and_leave), 0
    for place, at in every:
        num_interrupted += traced(Interrupt(place, at), enter_and_leave)
        assert left_behind() == at_first, (place, at)
    # How often something is waited for is not the same each time.
    assert num_interrupted > 0.9 * len(every)
