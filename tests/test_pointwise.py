"""A ``preprocess`` that looks further than at each pixel is refused, however the image is cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamcnn import DatasetMismatch, StreamingModel
from streamcnn.data.pointwise import looks_further, some_pixels
from streamcnn.data.reader import BatchReader
from streamcnn.data.sources import ArraySource, TensorSource
from streamcnn.geometry.regions import Interval, Region

CPU = torch.device("cpu")
IMAGE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 70, 90), np.uint8))
TABLE = torch.linspace(0, 1, 256)
MIX = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.5, -0.2], [0.2, 0.2, 0.9]])
TEXT = "preprocess= makes of a pixel one value among its neighbours and another among others, in rows "

Preprocess = Callable[[Tensor], Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _noisy(tile: Tensor) -> Tensor:
    return tile / 255 + 0.1 * torch.randn(tile.shape)


FURTHER: dict[str, Preprocess] = {
    "over the largest": lambda tile: tile / tile.max(),
    "standardised": lambda tile: (tile.float() - tile.float().mean()) / tile.float().std(),
    "stretched": lambda tile: (tile - tile.amin((2, 3), True)) / (1.0 + tile.amax((2, 3), True)),
    "less the mean": lambda tile: tile.float() - tile.float().mean((2, 3), keepdim=True),
    "blurred": lambda tile: F.avg_pool2d(tile.float(), 3, 1, 1),
    "noisy": _noisy,
    "dropout": lambda tile: F.dropout(tile.float()),
    "brightness at random": lambda tile: tile / 255 * (0.5 + torch.rand(())),
    "mirrored": lambda tile: tile.flip(-1).float(),
    "by place": lambda tile: tile * torch.linspace(0, 1, tile.shape[3]),
    "in bfloat16": lambda tile: (tile / tile.max()).bfloat16(),
}

POINTWISE: dict[str, Preprocess] = {
    "scaled": lambda tile: tile / 255 - 0.5,
    "optical density": lambda tile: -((tile.float() + 1) / 256).log(),
    "stains": lambda tile: torch.einsum("dc,nchw->ndhw", MIX, tile / 255),
    "1 x 1 convolution": lambda tile: F.conv2d(tile / 255, MIX[:, :, None, None]),
    "in bfloat16": lambda tile: F.conv2d((tile / 255).bfloat16(), MIX[:, :, None, None].bfloat16()),
    "table": lambda tile: TABLE[tile.long()],
    "norm of channels": lambda tile: F.normalize(tile.float(), dim=1),
    "grey": lambda tile: tile.float().mean(1, keepdim=True).expand(-1, 3, -1, -1),
    "over a threshold": lambda tile: (torch.einsum("dc,nchw->ndhw", MIX, tile / 255) > 0.4).float(),
}


@pytest.mark.parametrize(
    "source", [lambda: IMAGE[None], lambda: TensorSource(IMAGE)], ids=["tensor", "source"]
)
@pytest.mark.parametrize("preprocess", FURTHER.values(), ids=FURTHER.keys())
def test_what_depends_on_other_pixels_is_refused(
    preprocess: Preprocess, source: Callable[[], Tensor]
) -> None:
    model = StreamingModel(net().to(preprocess(IMAGE[None]).dtype), tile=30, preprocess=preprocess)
    with pytest.raises(DatasetMismatch, match=TEXT):
        model(source())


@pytest.mark.parametrize("preprocess", POINTWISE.values(), ids=POINTWISE.keys())
def test_what_looks_at_each_pixel_is_not_refused(preprocess: Preprocess) -> None:
    plain = net().to(preprocess(IMAGE[None]).dtype)
    model = StreamingModel(plain, tile=30, preprocess=preprocess)
    torch.testing.assert_close(model(IMAGE[None]), plain(preprocess(IMAGE[None])), rtol=1e-2, atol=1e-2)


def test_tiles_of_one_colour_tell_nothing() -> None:
    image = IMAGE.clone()
    image[:, :60] = 240
    model = StreamingModel(net(), tile=10, preprocess=lambda tile: tile / tile.max())
    with pytest.raises(DatasetMismatch, match=f"{TEXT}5"):
        model(TensorSource(image))


def test_two_pixels_past_a_threshold_are_rounding() -> None:
    tile = torch.rand(2, 3, 40, 50)
    for num_different, expected in ((2, False), (3, True)):
        prepared = tile.clone()
        pixels = some_pixels(tile)
        for pixel in pixels.flatten(2)[0, 0, :num_different]:
            prepared[tile == pixel] += 1
        assert bool(looks_further(lambda pixels: pixels, pixels, prepared)) is expected


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "i8", "f2", "f4", "f8", "b1"])
def test_pixels_of_all_types_are_tried(dtype: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (3, 40, 50)).astype(dtype)
    source = ArraySource(pixels, channels_last=False)
    region = Region(Interval(0, 30), Interval(0, 30))
    reader = BatchReader(source, CPU, lambda tile: tile.double())
    assert torch.equal(reader.read(region)[0], torch.from_numpy(pixels[:, :30, :30].astype("f8")))
    with pytest.raises(DatasetMismatch, match=TEXT):
        BatchReader(source, CPU, lambda tile: tile.double() - tile.double().mean()).read(region)


def test_on_a_gpu_it_is_told_when_tiles_are_settled() -> None:
    reader = BatchReader(TensorSource(IMAGE), CPU, FURTHER["standardised"])
    reader._settles_later = True
    reader.read(Region(Interval(3, 40), Interval(5, 60)))
    with pytest.raises(DatasetMismatch, match=f"{TEXT}3..39, columns 5..59"):
        reader.settle()


def test_few_tiles_of_a_pass_are_tried() -> None:
    calls: list[torch.Size] = []

    def counting(tile: Tensor) -> Tensor:
        calls.append(tile.shape)
        return tile / 255

    reader = BatchReader(TensorSource(IMAGE), CPU, counting)
    for row in range(20):
        reader.read(Region(Interval(row, row + 40), Interval(0, 60)))
    assert calls.count(torch.Size((1, 3, 2, 4))) == 8


def test_a_preprocess_that_fails_with_one_pixel() -> None:
    model = StreamingModel(net(), preprocess=lambda tile: F.pad(tile.float(), (2, 2, 2, 2), "reflect"))
    with pytest.raises(RuntimeError, match="Padding size") as caught:
        model(IMAGE[None])
    assert "called with a tile of shape (1, 3, 1, 1)" in caught.value.__notes__[0]
