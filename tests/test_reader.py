"""Regions of a batch, ready for the model."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.data import source_batch
from streamcnn.data.reader import BatchReader
from streamcnn.data.sources import TensorSource
from streamcnn.errors import CorruptImage
from streamcnn.geometry.regions import Interval, Region

CPU = torch.device("cpu")
IMAGE = torch.arange(2 * 3 * 11 * 13, dtype=torch.float32).reshape(2, 3, 11, 13)
REGION = Region(Interval(2, 9), Interval(5, 12))
PART = IMAGE[:, :, 2:9, 5:12]


@pytest.mark.parametrize(
    "image", [IMAGE, [TensorSource(image) for image in IMAGE], IMAGE.clone().requires_grad_()], ids=[0, 1, 2]
)
def test_a_region_of_a_batch(image: Tensor | list[TensorSource]) -> None:
    reader = BatchReader(image, CPU)
    assert reader.shape == IMAGE.shape
    assert reader.dtype == torch.float32
    tile = reader.read(REGION)
    assert torch.equal(tile, PART)
    assert not tile.requires_grad


def test_one_source_is_a_batch_of_one() -> None:
    reader = BatchReader(TensorSource(IMAGE[1]), CPU)
    assert reader.shape == (1, 3, 11, 13)
    assert torch.equal(reader.read(REGION), PART[1:])


def test_for_a_gpu_the_region_read_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [TensorSource(image) for image in IMAGE]
    read: list[Region] = []
    original = TensorSource.read
    monkeypatch.setattr(
        TensorSource, "read", lambda source, region: read.append(region) or original(source, region)
    )
    other = Region(Interval(0, 3), Interval(0, 4))
    for keeps, expected in ((False, [REGION] * 4 + [other] * 2), (True, [REGION] * 2 + [other] * 2)):
        reader = BatchReader(sources, CPU)
        reader.keeps_last = keeps
        read.clear()
        for _ in range(2):
            assert torch.equal(reader.read(REGION), PART)
        assert torch.equal(reader.read(other), IMAGE[:, :, :3, :4])
        assert read == expected


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_for_a_gpu_no_more_than_the_region_is_pinned(
    monkeypatch: pytest.MonkeyPatch, order: torch.memory_format
) -> None:
    pins: list[bool] = []
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *args, pin_memory, **kwargs: (pins.append(pin_memory), empty(*args, **kwargs))[1],
    )
    region = PART.contiguous(memory_format=order)[:, :, 1:-1, 2:]
    pinned = source_batch._pinned(region)
    assert pins == [True]
    assert torch.equal(pinned, region)
    assert pinned.is_contiguous(memory_format=order)
    assert pinned.untyped_storage().nbytes() == region.numel() * region.itemsize


def test_a_tensors_region_is_not_copied() -> None:
    assert BatchReader(IMAGE, CPU).read(REGION).data_ptr() == PART.data_ptr()


def test_preprocess_sees_tiles_as_stored_and_decides_type_and_channels() -> None:
    seen = []

    def to_grey(tile: Tensor) -> Tensor:
        seen.append((tuple(tile.shape), tile.dtype))
        return tile.double().mean(1, keepdim=True)

    stored = IMAGE.to(torch.int16)
    reader = BatchReader(stored, CPU, to_grey)
    assert reader.shape == (2, 1, 11, 13)
    assert reader.dtype == torch.float64
    torch.testing.assert_close(reader.read(REGION), PART.double().mean(1, keepdim=True))
    # One pixel tells what the model will get, and pixels of all values whether they wrap; then only what was
    # asked for is touched, some of its pixels once more.
    (first, probe, *last) = seen
    assert first == ((2, 3, 1, 1), torch.int16)
    assert last == [((2, 3, 7, 7), torch.int16), ((2, 3, 2, 4), torch.int16)]
    assert (probe[0][:3], probe[0][3] < 300, probe[1]) == ((1, 3, 1), True, torch.int16)


def test_the_images_of_a_batch_may_be_bool() -> None:
    reader = BatchReader(IMAGE > 100, CPU, lambda tile: tile.float())
    assert torch.equal(reader.read(REGION), (PART > 100).float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_values_that_no_image_has_are_found_where_they_are(value: float, dtype: torch.dtype) -> None:
    image = (IMAGE / 100).to(dtype)
    image[1, 0, 8, 5] = value
    reader = BatchReader(image, CPU)
    with pytest.raises(
        CorruptImage, match=r"NaN or infinite values in rows 2\.\.8, columns 5\.\.11: allowed"
    ):
        reader.read(REGION)
    reader.read(Region(Interval(2, 8), Interval(5, 12)))


def test_on_a_gpu_pixels_are_looked_at_together() -> None:
    image = IMAGE / 100
    image[1, 0, 8, 5] = math.nan
    reader = BatchReader(image, CPU)
    reader._settles_later = True
    first, second = Region(Interval(2, 8), Interval(5, 12)), REGION
    for region in (first, second, first):
        reader.read(region)
    with pytest.raises(CorruptImage, match=r"row 8, column 5: .* in rows 2\.\.8, columns 5\.\.11: allowed"):
        reader.settle()
    reader.settle()


def test_a_pass_on_a_gpu_ends_with_a_corrupt_image(monkeypatch: pytest.MonkeyPatch) -> None:
    later = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(BatchReader, "_settles_later", later, raising=False)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1))
    image = torch.randn(1, 3, 40, 30)
    image[0, 1, 37, 2] = math.inf
    before = copy.deepcopy(net.state_dict())
    for tail in (True, False):
        model = StreamingModel(net, tile=16)
        model.resident_tail = tail
        with pytest.raises(CorruptImage, match="channel 1 at row 37, column 2"):
            model(image)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_infinities_of_both_signs_do_not_cancel() -> None:
    image = IMAGE.clone()
    image[0, 0, 3, 6], image[0, 0, 4, 6] = math.inf, -math.inf
    with pytest.raises(CorruptImage, match="NaN or infinite"):
        BatchReader(image, CPU).read(REGION)


def test_a_sum_that_overflows_is_no_corrupt_image() -> None:
    image = torch.full((1, 3, 11, 13), 60000.0, dtype=torch.float16)
    assert torch.equal(BatchReader(image, CPU).read(REGION), image[:, :, 2:9, 5:12])


def test_on_a_gpu_such_a_sum_is_no_reason_to_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Region] = []
    original = BatchReader.read_stored
    monkeypatch.setattr(BatchReader, "read_stored", lambda *args: (read.append(args[1]), original(*args))[1])
    reader = BatchReader(torch.full((1, 3, 11, 13), 60000.0, dtype=torch.float16), CPU)
    reader._settles_later = True
    reader.read(REGION)
    reader.settle()
    assert read == [REGION]


@pytest.mark.skipif(sys.platform != "linux", reason="the ceiling needs Linux")
def test_an_image_is_read_under_the_ceiling_alone() -> None:
    import resource

    limits = []

    class Watched(TensorSource):
        def _read(self, region: Region) -> Tensor:
            limits.append(resource.getrlimit(resource.RLIMIT_DATA)[0])
            return super()._read(region)

    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1))
    model = StreamingModel(net, "1GiB", tile=16)
    model.resident_tail = False
    model(Watched(torch.rand(3, 40, 40)))
    assert limits
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] not in limits
