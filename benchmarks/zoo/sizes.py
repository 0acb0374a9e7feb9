"""The image sizes that a model takes in plain PyTorch, found by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.zoo.families import Variant
from benchmarks.zoo.states import Shape, without_chance

_SQUARE = ((224, 224), (256, 256), (192, 192), (240, 240), (288, 288), (384, 384), (512, 512))
"""What models of one size are made for."""
SMALL = ((107, 135), (97, 129), (96, 128), (128, 192), *_SQUARE)
"""Odd, a multiple of 32 and one, multiples of 32 and of 64, and sizes that models are made for."""
LARGE = (
    *((4000, 4000), (4032, 4032), (4096, 4096), (2048, 2048), (2016, 2016), (1024, 1024), (1008, 1008)),
    *reversed(_SQUARE),
)
"""4032 = 18 * 224 and 4096 = 16 * 256 are multiples of the usual windows."""


class NoSize(Exception):
    """Plain PyTorch runs the model at none of the sizes; the text says why not at the last ones."""


def fitted(
    variant: Variant, sizes: Iterable[tuple[int, int]], batches: Iterable[int], *, fake: bool
) -> tuple[nn.Module, Shape]:
    """The model for the first size and batch that its forward pass takes in train mode, and that shape.

    Parameters
    ----------
    fake
        Run it without memory for what it computes, only for the shapes.

    Raises
    ------
    NoSize
        If it takes none.
    """
    refusals: dict[str, str] = {}
    batches = tuple(batches)
    for size in sizes:
        try:
            net = without_chance(variant(size)).train()
        except Exception as error:
            # Whatever a library raises is its way to refuse a size.
            refusals[_words(error)] = f"{size[0]}x{size[1]}"
            continue
        for batch in batches:
            shape = (batch, 3, *size)
            refusal = _error_of(net, shape, _on_fakes if fake else _on_copies)
            if refusal is None:
                return net, shape
            refusals[_words(refusal)] = f"{size[0]}x{size[1]}"
    raise NoSize("; ".join(f"{size}: {words}" for words, size in list(refusals.items())[-2:]))


def _error_of(net: nn.Module, shape: Shape, run: Callable[[nn.Module, Shape], None]) -> Exception | None:
    try:
        with torch.no_grad():
            run(net, shape)
    except Exception as error:
        return error
    return None


def _on_fakes(net: nn.Module, shape: Shape) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        net(torch.empty(shape))


def _on_copies(net: nn.Module, shape: Shape) -> None:
    """A forward pass that leaves the buffers as they were."""
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net(torch.randn(shape))
    for name, buffer in net.named_buffers():
        buffer.copy_(before[name])


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
