"""The gradient of depthwise convolutions' weights, worked out in pieces."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.graph.ops import depthwise
from streamcnn.graph.ops.depthwise import has_slow_weights, weight_gradient

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def in_float64(x: Tensor, weight: Tensor, gradient: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    weight = weight.double().requires_grad_()
    result = torch.conv2d(x.double(), weight, None, stride, padding, 1, len(weight))
    (found,) = torch.autograd.grad(result, weight, gradient.double())
    return found


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(16, 40),
    extra=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    kernel=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=pairs,
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    cached=st.sampled_from([1, 4000, 2**21]),
)
def test_the_gradient_is_that_of_the_whole(
    batch: int,
    channels: int,
    extra: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    cached: int,
) -> None:
    generator = torch.Generator().manual_seed(channels)
    size = [k + more for k, more in zip(kernel, extra, strict=True)]
    x = torch.randn(batch, channels, *size, generator=generator)
    weight = torch.randn(channels, 1, *kernel, generator=generator)
    shape = torch.conv2d(x, weight, None, stride, padding, 1, channels).shape
    gradient = torch.randn(shape, generator=generator)
    with patch.object(depthwise, "_CACHED_NBYTES", cached):
        found = weight_gradient(gradient, x, weight, stride, padding)
    expected = in_float64(x, weight, gradient, list(stride), list(padding))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_only_large_depthwise_kernels_of_float32_are_slow() -> None:
    x = torch.zeros(1, 32, 9, 9)

    def is_slow(x: Tensor = x, shape: tuple[int, ...] = (32, 1, 5, 5), dilation: int = 1) -> bool:
        groups = 32 // shape[1]
        return has_slow_weights(x, torch.zeros(shape), (dilation, dilation), groups)

    assert is_slow()
    assert is_slow(shape=(32, 1, 1, 7))
    assert not is_slow(shape=(32, 1, 3, 3))
    assert not is_slow(shape=(64, 1, 5, 5))
    assert not is_slow(shape=(32, 32, 5, 5))
    assert not is_slow(dilation=2)
    assert not is_slow(x.double())
    assert not is_slow(x.contiguous(memory_format=torch.channels_last))


class Net(nn.Module):
    """Two depthwise convolutions, one of them followed by a norm that stores its value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.second = nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.norm = nn.BatchNorm2d(16)
        self.third = nn.Conv2d(16, 16, (7, 4), stride=2, groups=16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.norm(self.second(self.first(x))).relu()).square().mean((2, 3)).sum()


@pytest.mark.parametrize("tile", [None, (24, 31)], ids=["resident tail", "tiles"])
def test_streamed_gradients_are_plain_ones_in_float64(tile: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.rand(2, 3, 75, 61)
    streamed = StreamingModel(net, **({"tile": tile} if tile else {"budget": "2GiB"}))
    with patch.object(depthwise, "weight_gradient", wraps=weight_gradient) as called:
        with patch("streamcnn.graph.ops.convolution.weight_gradient", called):
            streamed(x).backward()
    assert called.called
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    net.double()(x.double()).backward()
    for name, parameter in net.named_parameters():
        assert found[name] is not None
        torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-3, atol=1e-5)
