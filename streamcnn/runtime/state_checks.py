"""Passes that change states: copies from before, and refusals of changes to the image or to shared memory."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor

from streamcnn.capture.capture import RawGraph
from streamcnn.data.reader import Image
from streamcnn.errors import UnsupportedModel


def refuse_shared_memory(graph: RawGraph, states: Mapping[str, Tensor]) -> None:
    """Check that no state that the pass changes shares memory with another one.

    Raises
    ------
    UnsupportedModel
        If one does, naming both.
    """
    by_memory: dict[int, list[str]] = {}
    known = {**graph.constants, **states}
    for key, state in known.items() if graph.updates else ():
        by_memory.setdefault(state.untyped_storage().data_ptr(), []).append(key)
    # Tensors on the meta device have no memory.
    by_memory.pop(0, None)
    for keys in by_memory.values():
        for first, second in permutations(keys, 2):
            if first in graph.updates and _overlap(known[first], known[second]):
                raise UnsupportedModel(
                    f"the forward pass changes '{first}', which shares memory with '{second}': give each a "
                    "tensor of its own"
                )


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one storage may share elements, by the range from their first to their last."""
    starts = (first.storage_offset(), second.storage_offset())
    ends = (
        start + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        for start, t in zip(starts, (first, second), strict=True)
    )
    return first.numel() > 0 < second.numel() and max(starts) <= min(ends)


def as_before(state: Tensor) -> Tensor:
    """A copy of a state that the pass changes; the copy's gradient is the state's."""
    with torch.enable_grad():
        return state.clone()


def refuse_changes_of_the_image(graph: RawGraph, image: Image) -> None:
    """Check that the pass leaves the caller's tensor as it is.

    Raises
    ------
    UnsupportedModel
        If the pass overwrites the tensor, or changes whether it requires a gradient.
    """
    if graph.marks_image and isinstance(image, Tensor):
        raise UnsupportedModel(
            "the forward pass changes whether the image requires a gradient (requires_grad): do so before "
            "the call"
        )
    if graph.changes_image and isinstance(image, Tensor):
        raise UnsupportedModel(
            "the forward pass overwrites the image, which is the caller's: use an operator that returns "
            "a new tensor, as x = x - mean instead of x.sub_(mean)"
        )
