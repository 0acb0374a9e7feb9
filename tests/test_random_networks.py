"""Random networks of branches, shared maps and odd sizes, streamed and plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import assert_streamed_equals_plain, randomized
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 4
"""Channels of every map, so that any two can be joined."""
Size = tuple[int, int]


def _activation(choice: int) -> nn.Module:
    return (nn.ReLU(inplace=True), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(0.2), nn.Hardswish())[choice]


def _norm(choice: int) -> nn.Module:
    norms: tuple[Callable[[], nn.Module], ...] = (
        nn.Identity,
        lambda: nn.BatchNorm2d(WIDTH),
        lambda: nn.GroupNorm(2, WIDTH),
        lambda: nn.InstanceNorm2d(WIDTH, affine=True),
        lambda: nn.BatchNorm2d(WIDTH, momentum=None),
    )
    return norms[choice]()


class _Finished(nn.Module):
    """A norm, where it has values enough, and an activation."""

    def __init__(self, layer: nn.Module, norm: int, activation: int) -> None:
        super().__init__()
        self.layer, self.norm, self.activation = layer, _norm(norm), _activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        # Of a few values, the normalised ones hardly depend on the input, and the gradient is noise.
        few = x.shape[2] * x.shape[3] < 12
        return self.activation(x if few else self.norm(x))


class _Gate(nn.Module):
    """Squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.mix(x.mean((2, 3))))[:, :, None, None]


class _Channels(nn.Module):
    """Layer norm and a linear layer, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.mix(self.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class _Padded(nn.Module):
    """Padding by the map's own values and a convolution without."""

    def __init__(self, mode: str, before: int, after: int) -> None:
        super().__init__()
        self.mode, self.pads = mode, (before, after)
        self.convolution = nn.Conv2d(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        pads = [min(pad, extent - 1) for extent in (x.shape[3], x.shape[2]) for pad in self.pads]
        x = F.pad(x, pads, mode=self.mode)
        return torch.tanh(self.convolution(F.pad(x, (1, 1, 1, 1), value=0.3)))


class _Crop(nn.Module):
    """A strided slice."""

    def __init__(self, start: int, step: int) -> None:
        super().__init__()
        self.start, self.step = start, step

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, min(self.start, x.shape[2] - 1) :: self.step, : x.shape[3] - min(1, x.shape[3] - 1)]


@dataclass(frozen=True)
class Step:
    """One layer and the maps it reads, counted from the latest."""

    layer: Callable[[], nn.Module]
    reads: tuple[int, ...]
    joins: str = ""
    text: str = ""

    def __repr__(self) -> str:
        return f"{self.text}{self.reads}"


class RandomNet(nn.Module):
    """A recipe carried out; the last map and every map that nothing reads are results."""

    def __init__(self, steps: list[Step], dense: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.steps, self.dense = steps, dense
        self.layers = nn.ModuleList(step.layer() for step in steps)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps, read = [torch.tanh(self.stem(x))], set()
        for step, layer in zip(self.steps, self.layers, strict=True):
            places = [max(len(maps) - back, 0) for back in step.reads]
            read.update(places)
            maps.append(layer(_joined([maps[place] for place in places], step.joins)))
        loose = [m for place, m in enumerate(maps) if place not in read]
        pooled = tuple((m * torch.tanh(m)).mean((2, 3)) for m in loose)
        return (*pooled, maps[-1]) if self.dense else pooled


def _joined(maps: list[Tensor], joins: str) -> Tensor:
    """Two maps as one, the second brought to the extents of the first."""
    if len(maps) == 1:
        return maps[0]
    first, second = maps
    if first.shape != second.shape:
        mode = {"add": "nearest", "multiply": "bilinear", "concatenate": "nearest"}[joins]
        second = F.interpolate(second, size=first.shape[2:], mode=mode)
    if joins == "add":
        return first + second
    if joins == "multiply":
        return first * torch.sigmoid(second)
    return torch.cat((first[:, : WIDTH // 2], second[:, WIDTH // 2 :]), 1)


@st.composite
def windows(draw: st.DrawFn, size: int) -> tuple[int, int, int, int, int]:
    """Kernel, stride, padding, dilation and output extent that go with ``size``."""
    kernel, stride, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    reach = dilation * (kernel - 1) + 1
    padding = draw(st.integers(max(0, (reach - size + 1) // 2), 2 + max(0, (reach - size + 1) // 2)))
    return kernel, stride, padding, dilation, (size + 2 * padding - reach) // stride + 1


@st.composite
def layers(draw: st.DrawFn, size: Size) -> tuple[Callable[[], nn.Module], Size, str]:
    """A layer for a map of ``size``, what it makes of the size, and a word for it."""
    choices = ["convolution", "convolution", "convolution", "gate", "channels", "padded", "crop"]
    choices += ["pool"] if min(size) >= 3 else []
    choices += ["upsample", "transposed", "shuffle"] if max(size) <= 24 else []
    choice = draw(st.sampled_from(choices))
    norm, activation = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    if choice == "convolution":
        rows, cols = draw(windows(size[0])), draw(windows(size[1]))
        kernel, stride, padding, dilation, after = zip(rows, cols, strict=True)
        groups = draw(st.sampled_from([1, 2, WIDTH]))

        def build() -> nn.Module:
            options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
            layer = nn.Conv2d(WIDTH, WIDTH, kernel, bias=norm == 0, **options)
            return _Finished(layer, norm, activation)

        return build, after, f"conv{kernel}/{stride} norm {norm}"
    if choice == "pool":
        ceil, kind = draw(st.booleans()), draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))
        height, width = ((-(-(n - 1) // 2) if ceil else (n - 1) // 2) + 1 for n in size)
        return (lambda: kind(3, 2, 1, ceil_mode=ceil)), (height, width), f"{kind.__name__} ceil {ceil}"
    if choice in ("upsample", "transposed", "shuffle"):
        finer: dict[str, Callable[[], nn.Module]] = {
            "upsample": lambda: nn.Upsample(scale_factor=2, mode="bilinear" if norm % 2 else "nearest"),
            "transposed": lambda: _Finished(
                nn.ConvTranspose2d(WIDTH, WIDTH, 3, 2, 1, 1, bias=False), norm, activation
            ),
            "shuffle": lambda: nn.Sequential(nn.Conv2d(WIDTH, 4 * WIDTH, 1), nn.PixelShuffle(2), nn.Tanh()),
        }
        return finer[choice], (2 * size[0], 2 * size[1]), choice
    if choice == "crop":
        start, step = draw(st.integers(0, 3)), draw(st.integers(1, 2))
        height = -(-(size[0] - min(start, size[0] - 1)) // step)
        return (lambda: _Crop(start, step)), (height, size[1] - min(1, size[1] - 1)), "crop"
    if choice == "padded":
        before, after = draw(st.integers(0, 3)), draw(st.integers(0, 2))
        mode = draw(st.sampled_from(["reflect", "replicate", "circular"]))
        grown = [n + min(before, n - 1) + min(after, n - 1) for n in size]
        return (lambda: _Padded(mode, before, after)), (grown[0], grown[1]), f"padded {mode}"
    return (_Gate if choice == "gate" else _Channels), size, choice


@st.composite
def recipes(draw: st.DrawFn, size: Size) -> list[Step]:
    """Steps that fit together on an image of ``size``."""
    sizes, steps = [size], []
    for _ in range(draw(st.integers(2, 6))):
        num_reads = draw(st.integers(1, 2))
        reads = tuple(draw(st.integers(1, min(3, len(sizes)))) for _ in range(num_reads))
        layer, after, text = draw(layers(sizes[len(sizes) - reads[0]]))
        joins = draw(st.sampled_from(["add", "multiply", "concatenate"])) if num_reads == 2 else ""
        steps.append(Step(layer, reads, joins, f"{joins} {text}"))
        sizes.append(after)
    return steps


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[Step], bool, bool, tuple[int, int, int, int]]:
    """Steps, whether the last map is a result, whether to train, and the image's shape."""
    size = draw(st.tuples(st.integers(9, 30), st.integers(9, 30)))
    shape = (draw(st.integers(1, 3)), 3, *size)
    return draw(recipes(size)), draw(st.booleans()), draw(st.booleans()), shape


def assert_streams(
    case: tuple[list[Step], bool, bool, tuple[int, int, int, int]], tile: tuple[int, int]
) -> None:
    steps, dense, train, shape = case
    torch.manual_seed(0)
    net = randomized(RandomNet(steps, dense)).train(train)
    found = assert_streamed_equals_plain(
        net, shape, tile=tile, one_tile=True, zero_gradients=True, resident=None
    )
    # Nearest resampling between some extents is not the same for all of ATen's kernels in float64.
    assert all("ATen's kernels differ" in each for each in found.residents)


tiles = st.tuples(st.integers(4, 12), st.integers(4, 12))
# A generated network takes a while, and one large one is no sign of trouble.
patient = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settings(patient, max_examples=18)
@given(networks(), tiles)
def test_random_network(
    case: tuple[list[Step], bool, bool, tuple[int, int, int, int]], tile: tuple[int, int]
) -> None:
    assert_streams(case, tile)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(patient, max_examples=500)
@given(networks(), tiles)
def test_many_random_networks(
    case: tuple[list[Step], bool, bool, tuple[int, int, int, int]], tile: tuple[int, int]
) -> None:
    assert_streams(case, tile)
