"""Operators that read windows or other grids, streamed and plain: convolution, padding, pooling, resizing."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from helpers import all_in_tiles, assert_streamed_equals_plain, traced
from operator_cases import SHAPE, WIDTH, Applied, Function, after_convolution, assert_streams, by_name
from operator_counts import count_operators
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile

from streamcnn.geometry.axis_maps import Adaptive
from streamcnn.geometry.regions import Interval, Region
from streamcnn.graph.ops.adaptive_pooling import window_maxima
from streamcnn.graph.ops.pooling import max_pool
from streamcnn.graph.ops.window_reductions import WindowMaxima
from streamcnn.graph.program import Kind

# --- windows ------------------------------------------------------------------------------------------


CONVOLUTIONS = {
    "1x1": nn.Conv2d(WIDTH, 4, 1),
    "1x1, stride 3": nn.Conv2d(WIDTH, 4, 1, stride=3),
    "kernel smaller than stride": nn.Conv2d(WIDTH, 4, 2, stride=5),
    "even kernel": nn.Conv2d(WIDTH, 4, 4, padding=1),
    "even kernel, stride 2, padding 2": nn.Conv2d(WIDTH, 4, (2, 4), stride=2, padding=(1, 2)),
    "asymmetric kernel and padding": nn.Conv2d(WIDTH, 4, (1, 5), padding=(2, 0)),
    "asymmetric stride and dilation": nn.Conv2d(WIDTH, 4, 3, stride=(1, 3), dilation=(3, 1), padding=(3, 1)),
    "padding wider than the kernel": nn.Conv2d(WIDTH, 4, 3, padding=6),
    "same": nn.Conv2d(WIDTH, 4, (3, 5), padding="same", dilation=(2, 1)),
    "same, even kernel": nn.Conv2d(WIDTH, 4, (4, 2), padding="same"),
    "valid": nn.Conv2d(WIDTH, 4, 3, padding="valid"),
    "padding on one side": nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(WIDTH, 4, 3, stride=2)),
    "grouped": nn.Conv2d(WIDTH, 9, 3, groups=3, bias=False),
    "depthwise with multiplier": nn.Conv2d(WIDTH, 2 * WIDTH, 3, groups=WIDTH, padding=1, stride=2),
    "as large as the map": nn.Conv2d(WIDTH, 4, (21, 17)),
    "larger than the map": nn.Conv2d(WIDTH, 4, 23, padding=3),
}


@by_name(CONVOLUTIONS)
# Plain PyTorch says that it copies its input; streaming does not.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_convolution(case: nn.Module) -> None:
    # Where every output reads the whole map, there is one output and so one tile.
    assert_streams(case, one_tile=True)


TRANSPOSED = {
    "stride 2": nn.ConvTranspose2d(WIDTH, 4, 2, stride=2),
    "kernel smaller than stride": nn.ConvTranspose2d(WIDTH, 4, 2, stride=3),
    "kernel larger than stride": nn.ConvTranspose2d(WIDTH, 4, 5, stride=2, padding=1),
    "stride 1": nn.ConvTranspose2d(WIDTH, 4, 3, padding=2),
    "output padding": nn.ConvTranspose2d(WIDTH, 4, 3, stride=4, padding=1, output_padding=(3, 2)),
    "dilated beyond the stride": nn.ConvTranspose2d(WIDTH, 4, 3, stride=2, dilation=3, padding=(4, 1)),
    "asymmetric": nn.ConvTranspose2d(WIDTH, 4, (1, 4), stride=(3, 1), padding=(0, 2), bias=False),
    "grouped": nn.ConvTranspose2d(WIDTH, 9, 3, stride=2, groups=3),
}


@by_name(TRANSPOSED)
def test_transposed_convolution(case: nn.Module) -> None:
    assert_streams(nn.Sequential(case, nn.Conv2d(case.out_channels, 3, 2)))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_mode(mode: str) -> None:
    assert_streams(nn.Conv2d(WIDTH, 4, 3, padding=(4, 2), padding_mode=mode, stride=2))


PADS = {
    "reflect, one side": lambda x: F.pad(x, (3, 0, 0, 5), mode="reflect"),
    "replicate, far": lambda x: F.pad(x, (11, 1, 25, 0), mode="replicate"),
    "circular, one side": lambda x: F.pad(x, (0, 6, 2, 0), mode="circular"),
    "constant": lambda x: F.pad(x, (1, 2, 30, 4), value=0.6),
    "crop": lambda x: F.pad(x, (-1, -2, -3, 4)),
    "channels": lambda x: torch.cat(
        (F.pad(x, (0, 0, 0, 0, 1, 2), value=0.4)[:, :3], F.pad(x[:, :3], (2, 1, 0, 3, 0, 0))[..., :-3, :-3]),
        1,
    ),
    "channels and columns": lambda x: F.pad(x, (2, -1, 0, 0, -1, 1), value=0.7),
    "rows alone": lambda x: F.pad(x, (0, 0, 1, 2), value=-1.0),
}


@by_name(PADS)
def test_padding(case: Function) -> None:
    assert_streams(nn.Sequential(Applied(case), nn.Conv2d(WIDTH, 2, 3, stride=2)))


POOLS = {
    "max": nn.MaxPool2d(2),
    "max, overlapping": nn.MaxPool2d(3, 2, 1),
    "max, ceil mode": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max, ceil mode and padding": nn.MaxPool2d((3, 4), (2, 3), (1, 2), ceil_mode=True),
    "max, dilated": nn.MaxPool2d(3, 1, 1, dilation=2),
    "max, gaps": nn.MaxPool2d(2, 5),
    "average": nn.AvgPool2d(2),
    "average, gaps": nn.AvgPool2d((2, 1), (3, 4)),
    **{
        f"average, ceil mode {ceil}, count padding {count}": nn.AvgPool2d(
            (3, 4), (2, 3), (1, 2), ceil_mode=ceil, count_include_pad=count
        )
        for ceil in (False, True)
        for count in (False, True)
    },
    "average, own divisor": nn.AvgPool2d(3, 2, 1, divisor_override=5, ceil_mode=True),
    "power average": nn.LPPool2d(2, 3, 2),
    "local response norm": nn.LocalResponseNorm(4, 2.0, 0.5, 0.1),
    "maximum of neighbouring channels": Applied(lambda x: F.max_pool3d(x, (3, 1, 1), 1, (1, 0, 0))),
}


@by_name(POOLS)
def test_pooling(case: nn.Module) -> None:
    assert_streams(nn.Sequential(case, nn.Conv2d(WIDTH, 2, 1)))


@pytest.mark.parametrize("shape", [(1, 64, 65, 130), (3, 5, 17, 9), (2, 1, 8, 8), (1, 70, 1, 9)])
@pytest.mark.parametrize("window", [((3, 3), (2, 2), (1, 1), (1, 1)), ((1, 2), (1, 1), (1, 2), (0, 1))])
def test_max_pooling_is_atens_to_the_bit(shape: tuple[int, ...], window: tuple[tuple[int, int], ...]) -> None:
    kernel, stride, dilation, padding = window
    # Many equal values, whose first one has the gradient, and one that is no number.
    x = (torch.rand(shape) - 0.5).clamp(min=0)
    x[0, 0, 0, 0] = torch.nan
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = max_pool(ours, kernel, stride, dilation, padding)
    expected = torch.max_pool2d(plain, kernel, stride, padding, dilation)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.is_contiguous()
    gradient = torch.rand_like(expected).transpose(2, 3).contiguous().transpose(2, 3)
    found.backward(gradient)
    expected.backward(gradient)
    assert ours.grad is not None
    assert plain.grad is not None
    assert torch.equal(ours.grad, plain.grad)


def test_max_pooling_of_equal_values() -> None:
    # Which of several equal values gets the gradient must not depend on the tile.
    assert_streams(nn.Sequential(nn.ReLU(), nn.MaxPool2d(4, 3, 1), nn.Conv2d(WIDTH, 2, 1)))


ADAPTIVE = {
    "average to 1": nn.AdaptiveAvgPool2d(1),
    "average to 3 x 2": nn.AdaptiveAvgPool2d((3, 2)),
    "average to rows": nn.AdaptiveAvgPool2d((None, 1)),
    "average to columns": nn.AdaptiveAvgPool2d((2, None)),
    "average to 9 x 1": nn.AdaptiveAvgPool2d((9, 1)),
    "average to 9 x 11": nn.AdaptiveAvgPool2d((9, 11)),
    "average to 11 x 17, equal columns": nn.AdaptiveAvgPool2d((11, 17)),
    "average to more positions": nn.AdaptiveAvgPool2d((34, 26)),
    "average to more rows and fewer columns": nn.AdaptiveAvgPool2d((25, 3)),
    "average to the same": nn.AdaptiveAvgPool2d((21, 17)),
    "maximum to 1": nn.AdaptiveMaxPool2d(1),
    "maximum to 1 of equal values": nn.Sequential(nn.Upsample(scale_factor=2), nn.AdaptiveMaxPool2d(1)),
    "maximum to 4": nn.AdaptiveMaxPool2d(4),
    "maximum to 5 x 3 of equal values": nn.Sequential(nn.ReLU(), nn.AdaptiveMaxPool2d((5, 3))),
    "maximum to rows": nn.AdaptiveMaxPool2d((None, 1)),
    "maximum to 13 x 9 of equal values": nn.Sequential(nn.ReLU(), nn.AdaptiveMaxPool2d((13, 9))),
    "maximum to more positions": nn.AdaptiveMaxPool2d((30, 29)),
    "maximum of one image": Applied(lambda x: F.adaptive_max_pool2d(x[0], (10, 12))),
    "average of one image": Applied(lambda x: F.adaptive_avg_pool2d(x[0], (10, 4))),
}


@by_name(ADAPTIVE)
def test_adaptive_pooling(case: nn.Module) -> None:
    assert_streams(case)


class LaidOver(nn.Module):
    """Pyramid pooling: summaries of a map, worked on, beside the map that they are enlarged to."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.mix = nn.Sequential(nn.Conv2d(WIDTH, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        summaries = [self.mix(F.adaptive_avg_pool2d(x, size)) for size in (2, 3)]
        mean = F.adaptive_avg_pool2d(x, 1)
        laid = [F.interpolate(each, x.shape[2:], **self.options) for each in (mean, *summaries)]
        return torch.cat((x, *laid), 1).sin()


@pytest.mark.parametrize(
    "options", [{"mode": "nearest"}, {"mode": "bilinear"}, {"mode": "bilinear", "align_corners": True}]
)
def test_a_summary_laid_over_its_map_is_not_held_whole(options: dict[str, Any]) -> None:
    net = LaidOver(**options)
    assert_streams(net)
    program, _ = traced(after_convolution(net), SHAPE)
    largest = max(node.nbytes for node in program.nodes.values() if node.kind is Kind.GLOBAL)
    assert largest <= 2 * 4 * 3 * 3 * 8


def test_a_summary_in_the_resident_tail_stays_one() -> None:
    program, _ = traced(after_convolution(LaidOver()), SHAPE, tail="adaptive_avg_pool2d")
    maps = [node.name for node in program.nodes.values() if node.is_map]
    assert maps == [program.image, "conv2d"]


@pytest.mark.parametrize("size", [(3, 2), (9, 12), (21, 17), (25, 30)])
def test_places_of_adaptive_maxima(size: tuple[int, int]) -> None:
    def places(x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = F.adaptive_max_pool2d(x.relu(), size, return_indices=True)
        return values, x.flatten(2).gather(2, indices.flatten(2)) + indices.flatten(2)

    assert_streams(places, resident=None)


@pytest.mark.parametrize("size", [(10, 10), (49, 49), (17, 9), (3, 2), (40, 5)])
def test_adaptive_means_of_whole_numbers_are_those_of_aten(size: tuple[int, int]) -> None:
    """Sums over counts: how much of a window a mask covers is 1 where it covers all."""
    torch.manual_seed(0)
    pool, ones = nn.AdaptiveAvgPool2d(size), torch.ones(1, 2, 199, 133)
    for image in (ones, ones.double(), torch.randint_like(ones, -4, 5).double()):
        assert torch.equal(all_in_tiles(pool)(image), pool(image))


@pytest.mark.parametrize("size", [(None, 1), (1, None), (None, 3), (2, None)])
def test_adaptive_maxima_of_each_row_or_column(size: tuple[int | None, int | None]) -> None:
    assert_streams(lambda x: x * F.adaptive_max_pool2d(x.relu(), size).mean())


def test_adaptive_maxima_of_many_rows_are_taken_at_once() -> None:
    # One by one they took minutes to trace.
    shape, axes = (1, 1, 50_000, 50_000), (2, 3)
    reduction = WindowMaxima(shape, axes, True, (Adaptive(50_000, 50_000), Adaptive(50_000, 2)))
    image = torch.empty(shape, device="meta")
    assert count_operators(lambda: reduction.partial(image, Region.whole(shape[2:]))).total() < 50


@pytest.mark.parametrize("pool", [nn.AdaptiveMaxPool2d((3, 7777)), nn.AdaptiveAvgPool2d((7777, 3))])
def test_tracing_looks_at_few_of_many_windows(pool: nn.Module) -> None:
    # Each of the whole map's cost a millisecond and more on tensors without values: a minute.
    counts = count_operators(lambda: traced(Applied(pool), (1, 3, 9000, 9001)))
    assert sum(counts.values()) < 100


def test_adaptive_maxima_of_infinite_values() -> None:
    # Nothing is larger than what stands for a window of which no tile has shown anything.
    assert_streams(
        lambda x: F.adaptive_max_pool2d(x.where(x > 9, -torch.inf), 3).sigmoid(), zero_gradients=True
    )


# --- grids --------------------------------------------------------------------------------------------


RESIZES: dict[str, dict[str, Any]] = {
    "nearest, factor 3": {"scale_factor": 3},
    "nearest, factor 2.5": {"scale_factor": 2.5},
    "nearest, factors that round": {"scale_factor": (3.04, 0.47)},
    "nearest, two factors": {"scale_factor": (2.0, 1.0)},
    "nearest, size": {"size": (30, 40)},
    "nearest, smaller": {"size": (5, 9)},
    "nearest, factor 0.4": {"scale_factor": 0.4},
    "bilinear, factor 2": {"scale_factor": 2, "mode": "bilinear"},
    "bilinear, factor 4": {"scale_factor": 4, "mode": "bilinear"},
    "bilinear, factor 2.5": {"scale_factor": 2.5, "mode": "bilinear"},
    "bilinear, factor recomputed": {
        "scale_factor": 2.03,
        "mode": "bilinear",
        "recompute_scale_factor": True,
    },
    "bilinear, factors that round to whole ones": {"scale_factor": (3.04, 1.04), "mode": "bilinear"},
    "bilinear, one factor": {"scale_factor": (1.0, 3.0), "mode": "bilinear"},
    "bilinear, size": {"size": (30, 40), "mode": "bilinear"},
    "bilinear, smaller": {"size": (5, 9), "mode": "bilinear"},
    "bilinear, corners, factor 2": {"scale_factor": 2, "mode": "bilinear", "align_corners": True},
    "bilinear, corners, size": {"size": (40, 30), "mode": "bilinear", "align_corners": True},
    "nearest exact, size": {"size": (30, 40), "mode": "nearest-exact"},
    "nearest exact, factor 2": {"scale_factor": 2, "mode": "nearest-exact"},
    "nearest exact, factor 0.4": {"scale_factor": 0.4, "mode": "nearest-exact"},
    **{
        f"{mode}, antialiased {antialiased}, {name}": {"mode": mode, "antialias": antialiased, **size}
        for mode, antialiased in (("bicubic", False), ("bicubic", True), ("bilinear", True))
        for name, size in {
            "factor 2": {"scale_factor": 2},
            "factors that round": {"scale_factor": (3.04, 0.47)},
            "size": {"size": (5, 40)},
            "corners, size": {"size": (9, 30), "align_corners": True},
        }.items()
    },
    "bilinear, corners, one row": {"size": (1, 30), "mode": "bilinear", "align_corners": True},
}


@by_name(RESIZES)
def test_resizing(case: dict[str, Any]) -> None:
    assert_streams(
        nn.Sequential(Applied(lambda x: F.interpolate(x, **case)), nn.Conv2d(WIDTH, 2, 3, padding=1)),
        one_tile=True,
    )


def _masked(x: Tensor) -> Tensor:
    """Some values infinite, as scores are that are to lose every comparison."""
    return x.masked_fill(x > 2, -torch.inf)


INFINITE: dict[str, Function] = {
    "adaptive windows": lambda x: F.adaptive_avg_pool2d(_masked(x), (19, 23)),
    "adaptive windows, few": lambda x: F.adaptive_avg_pool2d(_masked(x), (5, 3)),
    "area": lambda x: F.interpolate(_masked(x), (29, 50), mode="area"),
    "bilinear": lambda x: F.interpolate(_masked(x), (74, 90), mode="bilinear"),
    "bilinear, columns": lambda x: F.interpolate(_masked(x), (37, 61), mode="bilinear"),
    "bilinear, rows, corners": lambda x: F.interpolate(
        _masked(x), (50, 45), mode="bilinear", align_corners=True
    ),
    "antialiased": lambda x: F.interpolate(_masked(x), (19, 23), mode="bilinear", antialias=True),
    "antialiased, columns": lambda x: F.interpolate(_masked(x), (37, 61), mode="bilinear", antialias=True),
    "antialiased, cubic, rows": lambda x: F.interpolate(_masked(x), (15, 45), mode="bicubic", antialias=True),
}


@by_name(INFINITE)
def test_infinite_values_reach_no_result_that_does_not_read_them(case: Function) -> None:
    image = torch.randn(2, 3, 37, 45, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = all_in_tiles(Applied(case))(image), case(image)
    assert (expected.isneginf() & found.isneginf()).any() or expected.isnan().any()
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factors", [(1.04, 1.03), (1.04, 2.0)])
@pytest.mark.parametrize("antialias", [False, True])
def test_resizing_that_aten_differentiates_wrongly_is_resident(
    factors: tuple[float, float], antialias: bool
) -> None:
    options: dict[str, Any] = {"scale_factor": factors, "mode": "bicubic", "antialias": antialias}
    assert_streams(lambda x: F.interpolate(x, **options), resident=True)


@pytest.mark.parametrize(
    "factors",
    [
        pytest.param((2.03, 1.5), id="doubles an extent"),
        pytest.param((1.02, 1.5), id="keeps an extent"),
        pytest.param((41.0, 1.0), id="rounded gradient"),
    ],
)
def test_nearest_resizing_in_which_aten_contradicts_itself_is_resident(factors: tuple[float, float]) -> None:
    # Of a wide map ATen takes other positions than of a small one.
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=factors), nn.Conv2d(4, 2, 3, stride=(2, 1))
    )
    assert_streamed_equals_plain(net, (1, 3, 22, 210), tile=32, resident=True)


REGRIDDED = {
    "pixel shuffle": nn.Sequential(nn.Conv2d(WIDTH, 18, 1), nn.PixelShuffle(3), nn.Conv2d(2, 2, 2)),
    "pixel unshuffle": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.PixelUnshuffle(2), nn.Conv2d(24, 2, 2)),
    "slices that stride": Applied(lambda x: x[..., 1::2, 2:-1:3]),
    "slices from the end": Applied(lambda x: x[:, -3:, -9:, :-4] * 2),
    "focus": Applied(
        lambda x: torch.cat((x[..., :-1:2, :-1:2], x[..., 1::2, :-1:2], x[..., 1::2, 1::2]), 1).sin()
    ),
    "windows": Applied(lambda x: x.unfold(2, 5, 2).unfold(3, 2, 3).mul(2).sin().amax((4, 5))),
    "windows, channels last": Applied(lambda x: x.movedim(1, -1).unfold(1, 3, 1).unfold(3, 2, 2).mean(-1)),
    "narrow": Applied(lambda x: x.narrow(2, 3, 11).narrow(3, -8, 7).narrow(1, 2, 3)),
}


@by_name(REGRIDDED)
def test_regridding(case: nn.Module) -> None:
    assert_streams(case)


class Largest(nn.Module):
    """Largest values and their places, of a map with many equal values."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.conv, self.size = nn.Conv2d(3, 4, 3, padding=1), size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        y = (2 * y).round().relu() + (y - y.detach())
        return nn.functional.adaptive_max_pool2d(y, self.size, return_indices=True)


@pytest.mark.parametrize("size", [(2, 40), (37, 3), (8, 53), (45, 1), (30, 40), (45, 53), (50, 60)])
def test_the_first_of_equal_values_in_many_windows(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    assert_streamed_equals_plain(Largest(size), (2, 3, 45, 53), tile=(17, 20))


@pytest.mark.parametrize("count", [200, 800])
def test_the_work_of_windows_does_not_grow_with_their_number(count: int) -> None:
    x, region = torch.rand(1, 1, 64, 4000), Region(Interval(0, 64), Interval(0, 4000))
    windows = (Adaptive(64, 8), Adaptive(4000, count))
    pooling = WindowMaxima(x.shape, (2, 3), True, windows)
    places = torch.zeros(1, 1, 8, count, dtype=torch.long)
    calls = count_operators(lambda: pooling.partial(x, region))
    assert calls.total() < 400
    assert count_operators(lambda: pooling.gradient(x, region, (places, places.float()))).total() < 50
    many = (Adaptive(64, 32), Adaptive(4000, count))
    assert count_operators(lambda: window_maxima(x, many, out=region_of(many), origin=region)).total() < 400


def test_windows_of_half_of_a_map_take_two_copies_of_it() -> None:
    # As many as a plan has room for.
    x, region = torch.rand(1, 8, 600, 1000), Region(Interval(0, 600), Interval(0, 1000))
    pooling = WindowMaxima(x.shape, (2, 3), True, (Adaptive(600, 5), Adaptive(1000, 900)))
    pooling.partial(x[:, :, :8, :8], Region(Interval(0, 8), Interval(0, 8)))
    with profile(profile_memory=True, acc_events=True) as found:
        pooling.partial(x, region)
    held = accumulate(event.self_cpu_memory_usage for event in found.events())
    assert max(held) <= 2 * x.nbytes + 2**23


def region_of(windows: tuple[Adaptive, Adaptive]) -> Region:
    rows, cols = (Interval(0, axis.count) for axis in windows)
    return Region(rows, cols)
