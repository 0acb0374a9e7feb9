"""Passes of a model that is looked into: streamed within its budget, its parameters left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from streamcnn.data.reader import Preprocess
from streamcnn.runtime.streaming_model import StreamingModel


@contextmanager
def without_gradients(net: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient: no pass then goes back further than what is asked for."""
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
    """``net`` streamed with the tile, the folder and the observer of ``model``."""
    made = StreamingModel(net, budget, tile=model.tile, spill=model.spill, preprocess=preprocess)
    made.resident_tail, made.observer = model.resident_tail, model.observer
    return made


def as_arguments(additional: Any) -> tuple[Any, ...]:
    """What else goes into the module, as captum takes it: nothing, one argument, or a tuple of several."""
    if additional is None:
        return ()
    return additional if isinstance(additional, tuple) else (additional,)
