"""Images that are read region by region."""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from streamcnn.data.sources import ImageSource, TensorSource, ZarrSource, as_sources, write_zarr_image
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.regions import Interval, Region

SHAPE = (3, 37, 53)
WHOLE = Region.whole(SHAPE[1:])


def region(top: int, bottom: int, left: int, right: int) -> Region:
    return Region(Interval(top, bottom), Interval(left, right))


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(image: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image as (C, H, W), as (H, W, C), and its first channel as (H, W)."""
    path = tmp_path_factory.mktemp("images")
    write_zarr_image(path / "chw.zarr", image, chunk=16)
    for name, pixels in {"hwc": image.permute(1, 2, 0), "hw": image[0]}.items():
        array = zarr.create_array(
            path / f"{name}.zarr", shape=pixels.shape, chunks=(16,) * pixels.ndim, dtype="u1"
        )
        array[:] = pixels.numpy()
    return path


@pytest.fixture(params=["tensor", "chw", "hwc", "hw"])
def source(request: pytest.FixtureRequest, image: torch.Tensor, folder: Path) -> ImageSource:
    if request.param == "tensor":
        return TensorSource(image)
    return ZarrSource(folder / f"{request.param}.zarr")


def test_describes_the_image_and_reads_any_region_of_it(source: ImageSource, image: torch.Tensor) -> None:
    channels = source.shape[0]
    assert source.shape[1:] == SHAPE[1:]
    assert source.dtype == torch.uint8
    for asked in (
        WHOLE,
        region(0, 1, 0, 1),
        region(15, 33, 7, 53),
        region(36, 37, 52, 53),
        region(5, 5, 0, 9),
    ):
        rows, cols = asked
        expected = image[:channels, rows.start : rows.stop, cols.start : cols.stop]
        torch.testing.assert_close(source.read(asked), expected, rtol=0, atol=0)


def test_counts_the_bytes_that_it_hands_out(source: ImageSource) -> None:
    source.read(region(0, 10, 0, 20))
    source.read(region(5, 10, 0, 20))
    assert source.bytes_read == source.shape[0] * (10 * 20 + 5 * 20)


@pytest.mark.parametrize("beyond", [region(0, 38, 0, 1), region(0, 1, 50, 54), region(-1, 3, 0, 1)])
def test_refuses_regions_beyond_the_image(source: ImageSource, beyond: Region) -> None:
    with pytest.raises(ValueError, match=r"beyond the image: allowed is rows 0\.\.37, cols 0\.\.53"):
        source.read(beyond)
    assert source.bytes_read == 0


def test_survives_pickling(source: ImageSource) -> None:
    source.read(WHOLE)
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.shape, copy.dtype, copy.bytes_read) == (source.shape, source.dtype, 0)
    torch.testing.assert_close(copy.read(WHOLE), source.read(WHOLE), rtol=0, atol=0)


def test_may_be_read_by_several_threads(source: ImageSource) -> None:
    expected = source.read(WHOLE)
    rows = [Region(Interval(row, row + 1), WHOLE.cols) for row in range(SHAPE[1])]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(source.read, rows * 5))
    for repeat in range(5):
        part = torch.cat(parts[repeat * SHAPE[1] : (repeat + 1) * SHAPE[1]], dim=1)
        torch.testing.assert_close(part, expected, rtol=0, atol=0)
    assert source.bytes_read == 6 * expected.nbytes


def test_reads_only_the_chunks_under_the_region(tmp_path: Path, image: torch.Tensor) -> None:
    write_zarr_image(tmp_path / "a.zarr", image, chunk=16)
    for chunk in (tmp_path / "a.zarr" / "c").rglob("*"):
        if chunk.is_file() and chunk.parts[-2:] != ("1", "2"):
            chunk.write_bytes(b"damaged")
    source = ZarrSource(tmp_path / "a.zarr")
    torch.testing.assert_close(source.read(region(16, 32, 32, 48)), image[:, 16:32, 32:48], rtol=0, atol=0)
    with pytest.raises(CorruptImage):
        source.read(region(15, 32, 32, 48))


def test_tells_channels_by_a_shape_that_leaves_no_doubt_or_is_told(tmp_path: Path) -> None:
    certain = zarr.create_array(tmp_path / "certain.zarr", shape=(60, 200, 3), dtype="u1")
    certain[:] = 1
    assert ZarrSource(certain).shape == (3, 60, 200)
    assert ZarrSource(certain, channels_last=False).shape == (60, 200, 3)
    array = zarr.create_array(tmp_path / "a.zarr", shape=(6, 20, 5), dtype="u1")
    array[:] = 1
    with pytest.raises(DatasetMismatch, match=r"may be \(C, H, W\) or \(H, W, C\): give channels_last=False"):
        ZarrSource(array)
    assert ZarrSource(array, channels_last=True).shape == (5, 6, 20)
    source = ZarrSource(tmp_path / "a.zarr", channels_last=False)
    assert source.shape == pickle.loads(pickle.dumps(source)).shape == (6, 20, 5)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 5, 7)])
def test_refuses_other_numbers_of_axes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    zarr.create_array(tmp_path / "a.zarr", shape=shape, dtype="u1")
    with pytest.raises(
        DatasetMismatch, match=rf"a\.zarr has {len(shape)} axes .* allowed are \(H, W\), .* store one"
    ):
        ZarrSource(tmp_path / "a.zarr")


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", ">f4", "<f8"])
def test_reads_every_pixel_type_that_torch_has(tmp_path: Path, dtype: str) -> None:
    pixels = np.arange(6 * 7).reshape(6, 7).astype(dtype)
    array = zarr.create_array(tmp_path / "a.zarr", shape=pixels.shape, dtype=dtype)
    array[:] = pixels
    got = ZarrSource(array).read(region(2, 5, 1, 4))
    np.testing.assert_array_equal(got.numpy(), pixels[None, 2:5, 1:4])


def test_refuses_pixel_types_that_torch_lacks(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", shape=(4, 5), dtype="datetime64[s]")
    with pytest.raises(DatasetMismatch, match=r"a\.zarr has pixels of type .*datetime64.*: allowed are"):
        ZarrSource(tmp_path / "a.zarr")


def test_names_the_array_and_the_place_of_a_damaged_chunk(tmp_path: Path, image: torch.Tensor) -> None:
    path = tmp_path / "a.zarr"
    write_zarr_image(path, image, chunk=16)
    chunk = path / "c" / "0" / "1" / "0"
    # One flipped bit: only the checksum can tell.
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.raises(CorruptImage, match=r"rows 0\.\.37, cols 0\.\.53 of .*a\.zarr: .*checksum"):
        ZarrSource(path).read(WHOLE)


def test_says_that_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(CorruptImage, match=r"no zarr array at .*gone\.zarr: give the folder"):
        ZarrSource(tmp_path / "gone.zarr")


@pytest.mark.parametrize("metadata", ["{", "{}", '{"zarr_format": 3, "node_type": "array"}'])
def test_names_an_array_whose_metadata_is_damaged(tmp_path: Path, folder: Path, metadata: str) -> None:
    path = tmp_path / "a.zarr"
    shutil.copytree(folder / "chw.zarr", path)
    (path / "zarr.json").write_text(metadata)
    with pytest.raises(CorruptImage, match=r"a\.zarr"):
        ZarrSource(path)


def test_tensor_source_wants_one_image() -> None:
    with pytest.raises(DatasetMismatch, match=r"shape \(2, 3, 4, 5\): allowed is \(C, H, W\)"):
        TensorSource(torch.zeros(2, 3, 4, 5))


@given(st.data())
def test_tensor_source_gives_what_indexing_gives(data: st.DataObject) -> None:
    tensor = torch.arange(2 * 5 * 7).reshape(2, 5, 7)
    top, left = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 7))
    bottom, right = data.draw(st.integers(top, 5)), data.draw(st.integers(left, 7))
    got = TensorSource(tensor).read(region(top, bottom, left, right))
    torch.testing.assert_close(got, tensor[:, top:bottom, left:right], rtol=0, atol=0)


def test_as_sources_takes_one_or_several(image: torch.Tensor) -> None:
    first, second = TensorSource(image), TensorSource(image.flip(0))
    assert as_sources(first) == [first]
    assert as_sources((first, second)) == [first, second]


@pytest.mark.parametrize("other", [torch.zeros(3, 37, 52, dtype=torch.uint8), torch.zeros(SHAPE)])
def test_as_sources_names_the_first_that_differs(image: torch.Tensor, other: torch.Tensor) -> None:
    batch = [TensorSource(image), TensorSource(image), TensorSource(other), TensorSource(other)]
    with pytest.raises(
        DatasetMismatch, match=r"image 2 of the batch is .* image 0 is \(3, 37, 53\) torch\.uint8"
    ):
        as_sources(batch)


def test_as_sources_refuses_nothing_and_other_things(image: torch.Tensor) -> None:
    with pytest.raises(DatasetMismatch, match="a batch of 0 images: allowed are 1 and more"):
        as_sources([])
    with pytest.raises(TypeError, match="image 1 of the batch is a Tensor: allowed is an ImageSource; wrap"):
        as_sources([TensorSource(image), image])  # type: ignore[list-item]
