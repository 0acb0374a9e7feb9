"""Check Triton's kernels under Triton's interpreter: ``TRITON_INTERPRET=1 python triton_cases.py``.

The program prints each case's largest error and the allowed one, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import plain_passes
import torch
from helpers import randomized
from plain_passes import ACTIVATIONS
from torch import Tensor

from streamcnn import verify
from streamcnn.graph.ops import triton_passes


def largest(found: Tensor, expected: Tensor) -> list[float]:
    """The largest error over the largest value, and the error that rounding may cause."""
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    return [float(error), 32 * torch.finfo(found.dtype).eps]


def passes() -> Iterator[tuple[str, list[float]]]:
    """Each pass on maps of many sizes, with values far from zero."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1, 2, 3, 5), (2, 24, 9, 11), (1, 64, 33, 40), (1, 200, 7, 1), (3, 65, 8, 8)):
            x, gradient, summand, mean, scale, shift = plain_passes.operands(shape, dtype, generator)
            case = f"{dtype} {shape}"
            right = plain_passes.moments(x.double())
            for name, *pair in zip(("mean", "variance"), triton_passes.moments(x), right, strict=True):
                yield f"{case} {name}", largest(*pair)
            found = triton_passes.plus_line(gradient.to(mean.dtype), x, mean, scale, shift)
            expected = plain_passes.plus_line(gradient, x.double(), mean, scale, shift)
            yield f"{case} line", largest(found, expected)
            for activation in ACTIVATIONS:
                for name, added in (("norm", None), ("sum", summand)):
                    found = triton_passes.normalised(x, mean, scale, shift, activation, added)
                    expected = plain_passes.normalised(x.double(), mean, scale, shift, activation, added)
                    yield f"{case} {activation.kind} {name}", largest(found, expected)
                given = (mean, scale, shift, activation)
                for name, *pair in zip(
                    ("gradient", "total", "product"),
                    triton_passes.gradients(x, gradient, *given),
                    plain_passes.gradients(x.double(), gradient.double(), *given),
                    strict=True,
                ):
                    yield f"{case} {activation.kind} {name}", largest(*pair)


def moments_far_from_zero() -> Iterator[tuple[str, list[float]]]:
    """Moments of maps whose mean is large against their variance."""
    generator = torch.Generator().manual_seed(1)
    for mean in (1e2, 1e4, 1e6):
        x = (mean + torch.randn((1, 24, 90, 70), generator=generator, dtype=torch.float64)).float()
        found = triton_passes.moments(x.contiguous(memory_format=torch.channels_last))
        for name, *pair in zip(("mean", "variance"), found, plain_passes.moments(x.double()), strict=True):
            yield f"{name} with a mean of {mean}", largest(*pair)


def moments_of_many_programs() -> Iterator[tuple[str, list[float]]]:
    """Moments by as many programs as on a GPU, merged block by block, with an incomplete last block."""
    one, triton_passes._multiprocessors = triton_passes._multiprocessors, lambda device: 132
    generator = torch.Generator().manual_seed(2)
    x = (20 + torch.randn((1, 70, 99, 100), generator=generator)).contiguous(
        memory_format=torch.channels_last
    )
    found = triton_passes.moments(x)
    for name, *pair in zip(("mean", "variance"), found, plain_passes.moments(x.double()), strict=True):
        yield f"{name} of many programs", largest(*pair)
    triton_passes._multiprocessors = one


def special_values() -> Iterator[tuple[str, list[float]]]:
    """NaN and infinities, which must give NaN and finite values where plain PyTorch does."""
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1.0]).reshape(1, 2, 3, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    zero, one = torch.zeros(2), torch.ones(2)
    for activation in ACTIVATIONS:
        found = triton_passes.normalised(x, zero, one, zero, activation, None)
        expected = plain_passes.normalised(x, zero, one, zero, activation, None)
        yield f"special {activation.kind}", [float(not torch.equal(found.isnan(), expected.isnan())), 0.0]
        finite = expected.isfinite()
        yield f"special values {activation.kind}", [float((found - expected)[finite].abs().max()), 1e-6]


def streamed() -> Iterator[tuple[str, list[float]]]:
    """A residual net in a single tile and in many."""
    plain_passes.take_passes(triton_passes)
    net = randomized(plain_passes.make_net()).to(memory_format=torch.channels_last)
    for tile in (200, 24):
        found = verify(net, (2, 3, 43, 41), tile=tile)
        yield f"streamed {tile}", [max(found.errors.values()), 1e-9]


if __name__ == "__main__":
    assert triton_passes.IS_INTERPRETED
    json.dump(
        {
            **dict(passes()),
            **dict(moments_far_from_zero()),
            **dict(moments_of_many_programs()),
            **dict(special_values()),
            **dict(streamed()),
        },
        sys.stdout,
    )
