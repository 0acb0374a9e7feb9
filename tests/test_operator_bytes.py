"""What operators and reductions really take on a tile is no more than the memory model has for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measured_bytes import Measured, measured_pass
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn.ceiling.kept_blocks import kept_blocks_available
from streamcnn.graph.ops import Sample, samples

IMAGES = 24
"""As many times a sample's images: blocks of less than 64 KiB are not counted."""
SLACK = 1.12
"""Halos and padding, which are large beside maps so small."""
KNOWN = 2**17
"""Bytes of small blocks."""

pytestmark = pytest.mark.skipif(not kept_blocks_available(), reason="no allocator counts here")


class Applied(nn.Module):
    """A function of a map after a convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def class_loss(x: Tensor) -> Tensor:
    return F.cross_entropy(x, x.detach().argmax(1), torch.rand(8, dtype=x.dtype), label_smoothing=0.1)


FURTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "the largest positions": lambda x: x.flatten(2).topk(5).values,
    "loss of classes": class_loss,
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
    "running": lambda x: x.cumprod(1) + x.logcumsumexp(1) + x.cummax(1).values,
    "running along lines": lambda x: x.cumsum(2) * x.cumprod(3) + x.sort(2)[0] + x.logcumsumexp(3),
    "medians of lines": lambda x: x.median(2, keepdim=True)[0] + x.topk(1, 3)[0] + x.diff(dim=2)[:, :, :1],
    "differences": lambda x: x.diff(dim=1),
    "products": lambda x: x.prod(1),
    "fused": lambda x: F.silu(F.gelu(F.hardswish(F.softplus(F.elu(F.leaky_relu(x)))))),
    "derivatives": lambda x: x.abs().rsqrt().sin().erf() / x + x.square().exp().log().clamp(-1, 1),
    "gates": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid() / (x.abs() + 1),
    "norms of channels": lambda x: F.normalize(x, dim=1) + x.var(1, keepdim=True),
    "larger, bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "smaller, antialiased": lambda x: F.interpolate(x, (21, 20), mode="bicubic", antialias=True),
    "wider and lower": lambda x: F.interpolate(x, (20, 90), mode="bilinear", antialias=True),
    "adaptive average": lambda x: F.adaptive_avg_pool2d(x, (30, 25)),
    "adaptive maximum": lambda x: F.adaptive_max_pool2d(x, (30, 25)),
    "places of maxima": lambda x: (
        x.mean() * F.adaptive_max_pool2d(x, (30, 25), return_indices=True)[1].to(x.dtype)
    ),
    "RMS norm": lambda x: F.rms_norm(x.permute(0, 2, 3, 1), (8,)),
}
ELSEWHERE = (
    # Targets of their own extents.
    "losses",
    # What lies between its axes is more than operand and result.
    "adaptive max pooling to many positions",
)
CASES = (
    *(sample for sample in samples() if not sample.name.startswith(ELSEWHERE)),
    *(Sample(name, lambda function=f: Applied(function)) for name, f in FURTHER.items()),  # type: ignore[misc]
)
EXCEPTIONS = (
    # oneDNN works on 16 channels at a time, however few there are.
    *("convolve", "of_each_image"),
    # ATen works on planes of less than 128 rows and columns in another order.
    *("repeat_nearest", "repeat_bilinear"),
)


def exceeding(found: list[Measured]) -> list[Measured]:
    """Those that take more than the memory model has."""
    return [
        each
        for each in found
        if not each.what.startswith(EXCEPTIONS) and each.nbytes > SLACK * each.projected + KNOWN
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sample", CASES, ids=lambda sample: sample.name)
def test_no_operator_takes_more_than_is_declared(sample: Sample, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and sample.name == "local response norm":
        pytest.skip("PyTorch has no such pooling of volumes in half precision")
    images, *others = sample.shape
    net = sample.build().train(sample.train)
    found = measured_pass(net, (IMAGES * images, *others), dtype)
    assert found
    assert exceeding(found) == []
