"""Integer arithmetic of ``preprocess`` that does not fit its type is refused; all other is exact in tiles."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamcnn import DatasetMismatch, StreamingModel
from streamcnn.data.reader import BatchReader
from streamcnn.data.sources import ArraySource, ImageSource, TensorSource
from streamcnn.data.wrapping import find_wrap
from streamcnn.geometry.regions import Interval, Region

CPU = torch.device("cpu")
IMAGE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 70, 90), np.uint8))
IMAGE[:, 0, 0], IMAGE[:, 0, 1] = 0, 255
BYTES = torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 3, 1, 1)
TABLE = torch.linspace(0, 1, 256)

Preprocess = Callable[[Tensor], Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


FINE: list[Preprocess] = [
    lambda tile: tile / 255 - 0.5,
    lambda tile: tile.float() * 2 - 255,
    lambda tile: (255 - tile) / 255,
    lambda tile: (tile.short() * 2 - 255).float(),
    lambda tile: (tile // 2 * 2).float(),
    lambda tile: (tile ^ 255).float(),
    lambda tile: (tile << 4).float(),
    lambda tile: tile.sum(1, keepdim=True).float().expand(-1, 3, -1, -1),
    lambda tile: TABLE[tile.long()],
    lambda tile: tile.float().mul_(3).sub_(7),
    lambda tile: (tile > 99).float(),
    lambda tile: torch.where(tile > 200, 200, tile).float(),
]

WRAPPING: list[tuple[Preprocess, str]] = [
    (lambda tile: (tile * 2 - 255).float(), "mul of torch.uint8 gives 0 where 256 is meant"),
    (lambda tile: (tile - 128).float(), "sub of torch.uint8 gives 128 where -128 is meant"),
    (lambda tile: (-tile).float(), "neg of torch.uint8 gives 255 where -1 is meant"),
    (lambda tile: (tile + tile).float(), "add of torch.uint8 gives 0 where 256 is meant"),
    (lambda tile: (tile - BYTES).float(), "sub of torch.uint8 gives 255 where -1 is meant"),
    (lambda tile: (tile[:, :1] - tile[:, 1:2]).float(), "sub of torch.uint8 gives 1 where -255 is meant"),
    (lambda tile: (tile**2).float(), "pow of torch.uint8 gives 0 where 256 is meant"),
    (lambda tile: tile.clone().add_(1).float(), "add of torch.uint8 gives 0 where 256 is meant"),
    (lambda tile: tile.to(torch.int8).float(), "_to_copy of torch.int8 gives -128 where 128 is meant"),
    (lambda tile: (tile.float() * 2).byte().float(), "_to_copy of torch.uint8 gives 0 where 256 is meant"),
    (
        lambda tile: tile.sum(1, keepdim=True, dtype=torch.uint8).float(),
        "sum of torch.uint8 gives 2 where 258 is meant",
    ),
]


@pytest.mark.parametrize("position", range(len(FINE)))
def test_what_fits_is_the_same_in_tiles_and_whole(position: int) -> None:
    preprocess = FINE[position]
    plain = net()
    expected = plain(preprocess(IMAGE[None]))
    model = StreamingModel(net(), tile=32, preprocess=preprocess)
    sources: list[Tensor | ImageSource] = [
        IMAGE[None],
        TensorSource(IMAGE),
        ArraySource(IMAGE.numpy(), channels_last=False),
    ]
    for image in sources:
        found = model(image)
        torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(model.net[0].weight.grad, plain[0].weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("position", range(len(WRAPPING)))
def test_what_wraps_is_refused(position: int) -> None:
    preprocess, what = WRAPPING[position]
    message = (
        f"preprocess= calculates with integers, and {what}, for pixels from 0 to 255: allowed are results "
        "that fit the type; turn the tile into floats first, such as tile.float() * 2 - 255"
    )
    for image in (IMAGE[None], TensorSource(IMAGE)):
        reader = BatchReader(image, CPU, preprocess)
        with pytest.raises(DatasetMismatch, match=f"^{re.escape(message)}$"):
            reader.read(Region.whole((70, 90)))


def test_a_model_refuses_it_and_a_whole_image_would_have_wrapped() -> None:
    def preprocess(tile: Tensor) -> Tensor:
        return (tile * 2 - 255).float()

    wrapped = preprocess(IMAGE[None])
    assert wrapped.min() >= 0
    assert not torch.equal(wrapped, IMAGE[None].float() * 2 - 255)
    model = StreamingModel(net(), tile=32, preprocess=preprocess)
    with pytest.raises(DatasetMismatch, match=r"calculates with integers, and mul of torch\.uint8"):
        model(IMAGE[None])
    with torch.no_grad(), pytest.raises(DatasetMismatch, match="preprocess= calculates with integers"):
        model(TensorSource(IMAGE))


def test_only_values_that_there_are_count() -> None:
    """Tomographies are int16 from -1024 on; a tile with larger values is looked at again."""
    image = torch.arange(-1024, -1024 + 60 * 40, dtype=torch.int16).view(1, 1, 60, 40)
    calls = []

    def preprocess(tile: Tensor) -> Tensor:
        calls.append(tuple(tile.shape))
        return (tile * 20).float()

    reader = BatchReader(image, CPU, preprocess)
    top = Region(Interval(0, 40), Interval(0, 40))
    torch.testing.assert_close(reader.read(top), image[:, :, :40].float() * 20)
    reader.read(top)
    assert len(calls) == 6  # one pixel, the values, and twice the tile and some of its pixels
    image[0, 0, 59, 39] = 2000
    with pytest.raises(DatasetMismatch, match=r"mul of torch\.int16 gives .* for pixels from -1024 to 2000"):
        reader.read(Region(Interval(40, 60), Interval(0, 40)))


@pytest.mark.parametrize(
    "dtype", [torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
)
def test_wider_integers(dtype: torch.dtype) -> None:
    largest = torch.iinfo(dtype).max
    assert find_wrap(lambda tile: tile.to(torch.float64) * 2, 3, dtype, (0, largest)) is None
    assert find_wrap(lambda tile: tile.to(torch.float64) * 2, 3, dtype, (0, 0)) is None
    narrow = find_wrap(lambda tile: tile.to(torch.int8).float(), 1, dtype, (0, 200))
    assert "where 128 is meant" in str(narrow)
    if torch.iinfo(dtype).min < 0:
        assert "where" in str(find_wrap(lambda tile: tile * 3, 3, dtype, (0, largest)))


def test_a_function_that_fails_with_other_pixels_is_not_judged() -> None:
    def preprocess(tile: Tensor) -> Tensor:
        if tile.shape[0] == 1:
            raise RuntimeError("made for batches")
        return tile.float()

    image = torch.stack([IMAGE, IMAGE])
    assert torch.equal(BatchReader(image, CPU, preprocess).read(Region.whole((70, 90))), image.float())


def test_a_function_that_draws_finds_its_generators_as_they_were() -> None:
    def noisy(tile: Tensor) -> Tensor:
        return tile / 255 + torch.rand(()) + random.random() + np.random.random()

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert find_wrap(noisy, 3, torch.uint8, (0, 255)) is None
    found = torch.rand(()).item(), random.random(), np.random.random()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert found == (torch.rand(()).item(), random.random(), np.random.random())
