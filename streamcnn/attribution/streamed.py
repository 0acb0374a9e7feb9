"""Passes for attribution: streamed within a budget, without gradients of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from streamcnn.data.reader import Preprocess
from streamcnn.runtime.streaming_model import StreamingModel


@contextmanager
def without_gradients(net: nn.Module) -> Iterator[None]:
    """Freeze all parameters for the block, so that backward passes go only as far as they must."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def streamed_like(
    model: StreamingModel, net: nn.Module, *, budget: int | None, preprocess: Preprocess | None
) -> StreamingModel:
    """``net`` as a streaming model with the tile, spill folder and observer of ``model``."""
    made = StreamingModel(net, budget, tile=model.tile, spill=model.spill, preprocess=preprocess)
    made.resident_tail, made.observer = model.resident_tail, model.observer
    return made


def as_arguments(additional: Any) -> tuple[Any, ...]:
    """Further arguments of a module as a tuple; as in captum, None, one argument, or a tuple."""
    if additional is None:
        return ()
    return additional if isinstance(additional, tuple) else (additional,)
