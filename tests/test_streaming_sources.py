"""What a streamed model reads, where it keeps maps, and what it reports; the same every time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_cases import (
    SHAPE,
    TILE,
    TOLERANCE,
    assert_identical,
    error_of,
    everything,
    loss_of,
    make_image,
    make_net,
    streamed_and_plain,
)
from torch import Tensor

from streamcnn import StreamingModel, TensorSource, ZarrSource
from streamcnn.ceiling.device import HostCeiling
from streamcnn.data.sources import ImageSource, write_zarr_image
from streamcnn.geometry.regions import Region
from streamcnn.plan.plan import Phase
from streamcnn.plan.storage import Tier

# --- determinism -----------------------------------------------------------------------------------------


def test_the_same_pass_twice_is_the_same_bit_for_bit() -> None:
    image = make_image().float()
    model, other = (streamed_and_plain()[0].float() for _ in range(2))
    first = everything(model, image)
    assert_identical(everything(other, image), first)
    # In train mode the running statistics differ by now; they are not read.
    assert_identical(everything(model, image), first)


def test_tiles_do_not_change_the_result() -> None:
    reference = everything(make_net(), make_image())
    for tile in (11, (16, 9), 200):
        model = StreamingModel(make_net(), tile=tile)
        largest = max(float(value.norm()) for value in reference.values())
        for name, value in everything(model, make_image()).items():
            assert error_of(value, reference[name], largest) <= TOLERANCE, (tile, name)


# --- sources ---------------------------------------------------------------------------------------------


class Counted(ImageSource):
    """Notes the regions that are asked for."""

    def __init__(self, tensor: Tensor) -> None:
        channels, height, width = tensor.shape
        super().__init__((channels, height, width), tensor.dtype)
        self.tensor = tensor
        self.regions: list[Region] = []

    def _read(self, region: Region) -> Tensor:
        self.regions.append(region)
        rows, cols = region
        return self.tensor[:, rows.start : rows.stop, cols.start : cols.stop]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, SHAPE, generator=generator, dtype=torch.uint8)


def normalized(tile: Tensor) -> Tensor:
    return tile.double() / 255 - 0.5


def test_sources_of_all_kinds_give_what_the_tensor_gives(pixels: Tensor, tmp_path: Path) -> None:
    for index, image in enumerate(pixels):
        write_zarr_image(tmp_path / f"{index}.zarr", image, chunk=16)
    tensors = [TensorSource(image) for image in pixels]
    zarrs = [ZarrSource(tmp_path / f"{index}.zarr") for index in range(2)]
    reference = everything(streamed_and_plain()[0], normalized(pixels))
    model, _ = streamed_and_plain(preprocess=normalized)
    for image in (pixels, tensors, zarrs, [tensors[0], zarrs[1]]):
        assert_identical(everything(model, image), reference)
    single = everything(model, pixels[1:])
    for source in (tensors[1], zarrs[1]):
        assert_identical(everything(model, source), single)


def test_a_float_source_needs_no_preprocess() -> None:
    sources = [TensorSource(image) for image in make_image()]
    assert_identical(
        everything(streamed_and_plain()[0], sources), everything(streamed_and_plain()[0], make_image())
    )


def test_preprocess_may_change_the_number_of_channels() -> None:
    model = StreamingModel(make_net(), tile=TILE, preprocess=lambda tile: tile.expand(-1, 3, -1, -1) / 2)
    grey = make_image(0, (2, 1, 37, 45))
    reference = everything(make_net(), grey.expand(-1, 3, -1, -1) / 2)
    for name, value in everything(model, grey).items():
        assert error_of(value, reference[name], 1e3) <= TOLERANCE, name


def test_a_source_is_never_read_as_a_whole() -> None:
    height, width = 120, 131
    source = Counted(make_image(0, (3, height, width)).float())
    model = StreamingModel(make_net().float(), tile=TILE)
    everything(model, source)
    halo = max(max(phase.halo) for phase in model.plan((1, 3, height, width), torch.float32).phases)
    assert halo <= 8
    assert max(region.rows.size for region in source.regions) <= TILE + halo
    assert max(region.cols.size for region in source.regions) <= TILE + halo
    # Once forward, once backward, with a halo of one pixel around each tile.
    whole = 3 * height * width * 4
    assert 2 * whole <= source.bytes_read <= 2 * whole * 1.4


# --- stores ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_disk")
def test_maps_on_disk_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, twin = streamed_and_plain(spill=tmp_path)
    stores = model.plan(SHAPE).stores.values()
    assert {store.tier for store in stores} == {store.gradient_tier for store in stores} == {Tier.DISK}
    found = everything(model, make_image())
    monkeypatch.undo()
    in_memory = StreamingModel(twin, tile=TILE)
    in_memory.resident_tail = False
    assert {store.tier for store in in_memory.plan(SHAPE).stores.values()} == {Tier.MEMORY}
    expected = everything(in_memory, make_image())
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        # Not bit for bit: tiles read from disk are contiguous, those in memory are views.
        assert error_of(found[name], value, largest * 1e3) <= 1e-12, name


@pytest.mark.usefixtures("on_disk")
def test_the_folder_lasts_from_forward_to_backward_and_no_longer(tmp_path: Path) -> None:
    model, _ = streamed_and_plain(spill=tmp_path)
    output = model(make_image())
    (folder,) = tmp_path.iterdir()
    assert list(folder.rglob("c.*"))
    loss_of(output).backward()
    assert not folder.exists()
    # What is left is for the next pass.
    model.release()
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("on_disk")
def test_the_folder_goes_when_the_output_is_dropped(tmp_path: Path) -> None:
    model, _ = streamed_and_plain(spill=tmp_path)
    outputs = [model(make_image(seed)) for seed in range(2)]
    assert len(list(tmp_path.iterdir())) == 2
    outputs.pop()
    assert len(list(tmp_path.iterdir())) == 1
    outputs.pop()
    assert not list(tmp_path.iterdir())
    assert tmp_path.is_dir()


@pytest.mark.usefixtures("on_disk")
def test_inference_leaves_no_folder(tmp_path: Path) -> None:
    model, plain = streamed_and_plain(spill=tmp_path)
    with torch.no_grad():
        assert error_of(model(make_image()), plain(make_image())) <= TOLERANCE
    model.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("on_disk")
def test_without_a_spill_folder_the_systems_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", os.fspath(tmp_path))
    model, _ = streamed_and_plain()
    output = model(make_image())
    assert len(list(tmp_path.iterdir())) == 1
    loss_of(output).backward()
    model.release()
    assert not list(tmp_path.iterdir())


# --- the report ------------------------------------------------------------------------------------------


def test_code_is_looked_for_after_the_first_step_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bool] = []
    monkeypatch.setattr(HostCeiling, "check", lambda _, *, compiled: looks.append(compiled))
    sizes: dict[Any, set[Any]] = {}
    shape_of = Phase.shape

    def noted(phase: Phase, direction: str, row: int, col: int) -> Any:
        shape = shape_of(phase, direction, row, col)
        needed = tuple(phase.needed(row, col, name).size for name in (*phase.nodes, *phase.inputs))
        sizes.setdefault(shape, set()).add(needed)
        return shape

    monkeypatch.setattr(Phase, "shape", noted)
    model = StreamingModel(make_net(), tile=9)
    model(make_image()).sum().backward()
    # Tiles of a shape need as many positions of every map, and others do not.
    assert all(len(found) == 1 for found in sizes.values())
    assert len({(*shape[:3], *found) for shape, found in sizes.items()}) == len(sizes)
    assert model.last_report is not None
    num_tiles = sum(phase.num_tiles for phase in model.last_report.phases)
    num_segments = len(looks) - num_tiles
    assert num_segments > 0
    assert sum(looks) == len(sizes) + num_segments < len(looks) / 2
    looks.clear()
    model(make_image()).sum().backward()
    assert looks == [False] * (num_tiles + num_segments)


def test_the_report_grows_from_forward_to_backward() -> None:
    model, _ = streamed_and_plain(budget="1GB")
    assert model.last_report is None
    output = model(make_image())
    forward = model.last_report
    assert forward is not None
    plan = model.plan(SHAPE)
    assert forward.budget == plan.budget == 10**9
    assert forward.projected_bytes == plan.projected_bytes
    assert [phase.direction for phase in forward.phases] == ["forward"] * len(plan.phases)
    assert [phase.num_tiles for phase in forward.phases] == [phase.num_tiles for phase in plan.phases]
    written = sum(store.nbytes for store in plan.stores.values())
    assert sum(phase.bytes_written for phase in forward.phases) == written
    loss_of(output).backward()
    report = model.last_report
    assert report is not None
    assert report.phases[: len(plan.phases)] == forward.phases
    backward = report.phases[len(plan.phases) :]
    assert [phase.level for phase in backward] == [phase.level for phase in reversed(plan.phases)]
    assert {phase.direction for phase in backward} == {"backward"}
    assert report.seconds > forward.seconds > 0
    assert report.bytes_moved > forward.bytes_moved >= written
    if report.measured_bytes is not None:
        assert report.reading in ("VmHWM", "VmRSS, sampled")
        assert report.measured_bytes <= report.budget
    text = report.explain()
    assert "budget 954 MiB" in text
    assert f"({report.reading})" in text
    assert text.count("tiles") == len(report.phases)
    assert text.count("backward") == len(plan.phases)
