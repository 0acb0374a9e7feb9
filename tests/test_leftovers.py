"""What is left of a model, or of a pass, in the process's memory once it is dropped."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.guards import CheckFunctionManager
from torch._dynamo.utils import guard_failures, orig_code_map
from torch.fx.graph_module import _loader

from streamcnn import StreamingModel
from streamcnn.capture.guarded.dynamo_leftovers import references_kept_in


class Scaled(nn.Module):
    """A CNN that reads an attribute."""

    def __init__(self, *, draws: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.scale = 1.0
        self.draws = draws

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu().mean((2, 3)) * self.scale
        # No guard knows what random numbers are, so that each pass is captured anew.
        return y * random.random() if self.draws else y


def passes_of_one_size(model: StreamingModel) -> None:
    for _ in range(2):
        model(torch.rand(1, 3, 40, 50)).sum().backward()


def passes_of_many_sizes(model: StreamingModel) -> None:
    for size in (40, 41, 42, 43, 44):
        model(torch.rand(1, 3, size, 50)).sum().backward()


def passes_of_changed_code(model: StreamingModel) -> None:
    for model.net.scale in (1.0, 2.0, 3.0):
        model(torch.rand(1, 3, 40, 50)).sum().backward()


def refused_passes(model: StreamingModel) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="image"):
            model(torch.rand(3, 4))


def losses(model: StreamingModel) -> None:
    model.streamed_loss(torch.rand(1, 3, 40, 50), torch.ones(1), lambda y, t: (y.sum() - t).square().sum())


def left() -> Counter[str]:
    """What Dynamo and captures have in memory."""
    gc.collect()
    kinds = {"RawGraph", "_Captured", "CheckFunctionManager", "GuardManagerWrapper", "_Captures"}
    found = Counter(type(each).__name__ for each in gc.get_objects() if type(each).__name__ in kinds)
    return found + Counter(compiled=len(orig_code_map.values), failures=len(guard_failures))


@pytest.mark.parametrize(
    "use", [passes_of_one_size, passes_of_many_sizes, passes_of_changed_code, refused_passes, losses]
)
@pytest.mark.parametrize("draws", [False, True])
def test_nothing_is_left_of_a_model(use: Callable[[StreamingModel], None], draws: bool) -> None:
    def once() -> None:
        use(StreamingModel(Scaled(draws=draws), tile=16))

    once()
    before = left()
    for _ in range(3):
        once()
    assert left() == before


def test_no_source_is_left_of_a_pass_that_is_captured_anew() -> None:
    model = StreamingModel(Scaled(draws=True), tile=16)
    passes_of_one_size(model)
    before = len(_loader.eval_cache)
    passes_of_one_size(model)
    assert len(_loader.eval_cache) == before


def test_guards_end_with_what_they_know_by_identity() -> None:
    class Value:
        pass

    value, ended, kept = Value(), list[str](), list[ref[object]]()
    manager = SimpleNamespace(_weakrefs={}, invalidate=lambda *, obj_str: ended.append(obj_str))
    with references_kept_in(kept):
        assert CheckFunctionManager.id_ref(manager, value, "a value") == id(value)
        assert CheckFunctionManager.id_ref(manager, value, "the same") == id(value)
        assert CheckFunctionManager.id_ref(manager, 3, "a number") == id(3)
    assert not ended
    del value
    gc.collect()
    assert ended == ["a value"]
