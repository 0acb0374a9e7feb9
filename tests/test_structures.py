"""How networks are put together, in any shape, streamed and plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_streamed_equals_plain, randomized
from operator_cases import SHAPE, TILE, WIDTH, Applied, Function, after_convolution, assert_streams, by_name
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn import StreamingModel

# --- how networks are put together --------------------------------------------------------------------


class SharedAtTwoScales(nn.Module):
    """One block with batch norm, used on the image's grid and on a coarser one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, bias=False)
        self.block = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        fine = self.block(self.stem(x))
        coarse = self.block(F.avg_pool2d(fine, 2))
        return fine.mean((2, 3)) + coarse.amax((2, 3))


class Pyramid(nn.Module):
    """A map used at several scales, and several results."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.lateral = nn.ModuleList(nn.Conv2d(WIDTH, 4, 1) for _ in range(3))
        self.smooth = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        first = F.relu(self.norm(self.stem(x)))
        maps = [first, F.max_pool2d(first, 3, 2, 1), F.avg_pool2d(first, 4, 3, ceil_mode=True)]
        fine, middle, coarse = (lateral(m) for lateral, m in zip(self.lateral, maps, strict=True))
        middle = middle + F.interpolate(coarse, size=middle.shape[2:], mode="nearest")
        fine = fine + F.interpolate(middle, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return {"dense": self.smooth(fine), "others": (middle.mean((2, 3)), [coarse]), "pooled": first.amax()}


class PositionalParameters(nn.Module):
    """Parameters with spatial extent, in every shape that broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [
            (1, WIDTH, 21, 17),
            (21, 17),
            (WIDTH, 1, 1),
            (21, 1),
            (1, 1, 1, 17),
            (2, 1, 21, 17),
            (1,),
            (),
        ]
        self.terms = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        for index, term in enumerate(self.terms):
            x = x + term if index % 2 else (x * term).tanh()
        return x


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardised first."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), self.bias, padding=1)


class Conditional(nn.Module):
    """A convolution whose weight depends on the image, by the grouping trick of CondConv."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.Parameter(torch.randn(3, 4 * WIDTH * 9) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = torch.sigmoid(self.router(x.mean((2, 3)))) @ self.experts
        result = F.conv2d(x.reshape(1, n * c, h, w), weight.view(n * 4, c, 3, 3), padding=1, groups=n)
        return result.view(n, 4, h, w)


class Tied(nn.Module):
    """Two layers with one weight, and a bias that is used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, stride=2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x))) * self.first.bias.sum()


class Buffers(nn.Module):
    """Buffers read and written, persistent or not, and constants made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(1, 2, WIDTH).reshape(1, -1, 1, 1))
        self.register_buffer("kernel", torch.ones(WIDTH, 1, 3, 3) / 9, persistent=False)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.kernel, groups=WIDTH, stride=2)
        return x * self.scale + torch.tensor(0.3) + torch.eye(WIDTH)[2].reshape(1, -1, 1, 1)


class SqueezeExcite(nn.Module):
    """Channels weighted by their means."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(WIDTH, 3, 1),
            nn.ReLU(),
            nn.Conv2d(3, WIDTH, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class ResponseNorm(nn.Module):
    """Global response norm, channels last, as in ConvNeXt V2."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        norm = x.norm(p=2, dim=(1, 2), keepdim=True)
        return x + self.gain * x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))


class BlockAttention(nn.Module):
    """Channel and spatial attention, as in CBAM."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU(), nn.Linear(3, WIDTH))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mix(x.mean((2, 3))) + self.mix(F.adaptive_max_pool2d(x, 1).flatten(1))
        x = x * torch.sigmoid(gate)[:, :, None, None]
        summary = torch.cat((x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]), 1)
        return x * torch.sigmoid(self.spatial(summary))


class GatedAttentionHead(nn.Module):
    """Attention over positions written with 1x1 convolutions; the softmax over space is resident."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(WIDTH, 4, 1)
        self.score = nn.Conv2d(4, 1, 1)
        self.classify = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.avg_pool2d(x, 2))
        score = self.score(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)))
        weight = torch.softmax(score.flatten(1), 1).view_as(score)
        return self.classify((x * weight).sum((2, 3)))


class Broadcasting(nn.Module):
    """A map of one row and one of a single position, read by every position of a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Conv2d(WIDTH, WIDTH, (21, 3), padding=(0, 1))
        self.point = nn.Conv2d(WIDTH, 1, (21, 17))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.row(x).sigmoid() + self.point(x) * x.sin()


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "positional parameters": PositionalParameters,
    "weight standardisation": lambda: Standardized(WIDTH, 4, 3),
    "weights from the image": Conditional,
    "tied parameters": Tied,
    "buffers and constants": Buffers,
    "squeeze-excite": SqueezeExcite,
    "global response norm": ResponseNorm,
    "block attention": BlockAttention,
    "one row and one position": Broadcasting,
}


@by_name(STRUCTURES)
def test_structure(case: Callable[[], nn.Module]) -> None:
    assert_streams(nn.Sequential(nn.Tanh(), case()))


def test_gated_attention_head() -> None:
    assert_streams(GatedAttentionHead())


@pytest.mark.parametrize(("batch", "train"), [(1, True), (3, False)])
@pytest.mark.parametrize("build", [SharedAtTwoScales, Pyramid])
def test_several_scales(build: Callable[[], nn.Module], train: bool, batch: int) -> None:
    assert_streamed_equals_plain(randomized(build()).train(train), (batch, 3, 37, 29), tile=(11, 13))


RESULTS = {
    "tuple": lambda x: (x.mean((2, 3)), x * 2),
    "list in dict": lambda x: {"a": [x.sin(), x.amax()], "b": x[:, :2]},
    "the same twice": lambda x: (x, x),
    "with nothing and numbers": lambda x: (x.sin(), None, 3),
}


@by_name(RESULTS)
def test_results(case: Function) -> None:
    assert_streams(case, resident=None)


def test_results_keep_their_structure() -> None:
    net = after_convolution(RESULTS["list in dict"])
    found = StreamingModel(net, tile=TILE)(torch.randn(SHAPE))
    assert {key: type(value) for key, value in found.items()} == {"a": list, "b": Tensor}
    assert found["a"][0].shape == (2, WIDTH, 21, 17)


def test_results_without_gradient() -> None:
    net = after_convolution(lambda x: (x.sin(), x > 0, x.argmax(1))).double()
    image = torch.randn(SHAPE, dtype=torch.float64)
    found, expected = StreamingModel(net, tile=TILE)(image), net(image)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference)
        assert value.requires_grad == reference.requires_grad


def test_the_image_as_a_result() -> None:
    net = Applied(lambda x: (x, x.sin()))
    assert_streamed_equals_plain(net, SHAPE, tile=TILE)


# Gradients that reach a stored map from later phases only, since its own phase stops or ignores them.
STOPPED = {
    "detached and reduced": lambda x, y: y * y.detach().mean((2, 3), keepdim=True),
    "compared and reduced": lambda x, y: y * (y > 0).to(y.dtype).mean((2, 3), keepdim=True),
    "compared, beside a reduction": lambda x, y: y * (y > 0).double().mean() * x.mean((2, 3), keepdim=True),
    "rounded and normalised": lambda x, y: F.instance_norm(y.detach()) * y,
    "normalised, residual": lambda x, y: F.instance_norm(y) + F.conv2d(y, y.new_ones(2, WIDTH, 3, 3)).mean(),
}


@by_name(STOPPED)
def test_gradients_stopped(case: Function) -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, WIDTH, 3)
            self.last = nn.Conv2d(WIDTH, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(case(x, self.conv(x)))

    assert_streams(Stopped())


# --- shapes -------------------------------------------------------------------------------------------


def small_net() -> nn.Module:
    """Two strided blocks with batch norm and a mean."""
    return randomized(
        nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=3, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.SiLU(),
            SqueezeExcite(),
            nn.AdaptiveAvgPool2d(1),
        )
    )


@pytest.mark.parametrize(
    ("batch", "size"), [(1, (23, 29)), (3, (1, 47)), (2, (47, 1)), (1, (2, 31)), (3, (5, 80)), (1, (48, 32))]
)
def test_image_size(batch: int, size: tuple[int, int]) -> None:
    assert_streamed_equals_plain(small_net(), (batch, 3, *size), tile=(7, 8))


@pytest.mark.parametrize("tile", [1, 3, (2, 29), (23, 5), (1000, 4)])
def test_tile_size(tile: int | tuple[int, int]) -> None:
    assert_streamed_equals_plain(small_net(), (2, 3, 23, 29), tile=tile)


def test_image_smaller_than_the_tile() -> None:
    assert_streamed_equals_plain(small_net(), (2, 3, 23, 29), tile=64, one_tile=True)


def test_no_padding_at_all() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3))
    assert_streamed_equals_plain(net, (1, 3, 41, 37), tile=(6, 10))


def test_channels_last_image() -> None:
    plain, twin = small_net().double(), small_net().double()
    twin.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 23, 29, dtype=torch.float64)
    last = image.clone(memory_format=torch.channels_last)
    torch.testing.assert_close(StreamingModel(twin, tile=8)(last), plain(image), rtol=1e-12, atol=1e-14)


def test_channels_last_inside() -> None:
    assert_streams(lambda x: x.contiguous(memory_format=torch.channels_last).sin())
