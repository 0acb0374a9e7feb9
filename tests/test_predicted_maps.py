"""Maps that a model gives, written to files: ``StreamingModel.predict_to``."""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import zarr
from torch import Tensor, nn

from streamcnn import DatasetMismatch, StreamingModel, TensorSource, UnsupportedModel
from streamcnn.data.map_files import write_map
from streamcnn.data.sources import open_image
from streamcnn.data.sources.placement import Placement
from streamcnn.errors import CannotWrite
from streamcnn.execution.maps import Maps
from streamcnn.geometry.regions import Region

SIZE = (1100, 613)


def make_net(classes: int = 4, stride: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=stride),
        nn.BatchNorm2d(6),
        nn.Dropout2d(),
        nn.Tanh(),
        nn.Conv2d(6, classes, 3, padding=1),
    )


def an_image(size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(5))


def expected(net: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = copy.deepcopy(net).eval()(image)[0]
    return result


def read(path: Path) -> Tensor:
    source = open_image(path)
    return source.read(Region.whole(source.shape[1:]))


@pytest.mark.parametrize("ending", ["ome.zarr", "zarr", "tif", "tiff"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_are_those_of_plain_pytorch(tmp_path: Path, ending: str, dtype: torch.dtype) -> None:
    net = make_net()
    model = StreamingModel(net, tile=256)
    path = model.predict_to(an_image(), tmp_path / f"map.{ending}", dtype=dtype)
    found = read(path)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected(net, an_image()), rtol=0, atol=2e-3)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ["zarr", "tif"])
@pytest.mark.parametrize("classes", [1, 4, 300])
def test_classes_are_the_largest_channels(tmp_path: Path, ending: str, classes: int) -> None:
    net, image = make_net(classes), an_image((150, 130))
    StreamingModel(net, tile=64).predict_to(image, tmp_path / f"map.{ending}", output="classes")
    found, scores = read(tmp_path / f"map.{ending}"), expected(net, image)
    assert found.dtype == (torch.uint16 if classes > 256 else torch.uint8)
    truth = scores > 0 if classes == 1 else scores.argmax(0, keepdim=True)
    assert (found.int() == truth.int()).float().mean() > 0.999


@pytest.mark.parametrize("ending", ["zarr", "tif"])
@pytest.mark.parametrize(("channels", "edge"), [(16, 512), (17, 256), (300, 64)])
def test_pieces_of_many_channels_are_smaller(tmp_path: Path, ending: str, channels: int, edge: int) -> None:
    path, pixels = tmp_path / f"map.{ending}", torch.rand(channels, 70, 90)
    write_map(path, TensorSource(pixels), Placement((70, 90)))
    assert torch.equal(read(path), pixels)
    if ending == "zarr":
        assert zarr.open_array(path / "0").chunks == (channels, edge, edge)
    else:
        with tifffile.TiffFile(path) as file:
            assert file.pages[0].tile == (edge, edge)


def test_probabilities_are_bytes(tmp_path: Path) -> None:
    net, image = make_net(), an_image((150, 130))
    model = StreamingModel(net, tile=64)
    for output, chances in (
        ("softmax", expected(net, image).softmax(0)),
        ("sigmoid", expected(net, image).sigmoid()),
    ):
        path = model.predict_to(image, tmp_path / f"{output}.zarr", output=output)
        found = read(path)
        assert found.dtype == torch.uint8
        assert (found.float() - chances * 255).abs().max() < 0.51


def test_a_softmax_of_one_channel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="is 1 everywhere: take sigmoid"):
        StreamingModel(make_net(1), tile=64).predict_to(an_image(), tmp_path / "map.zarr", output="softmax")
    assert not list(tmp_path.iterdir())


def test_the_module_evaluates_and_is_as_it_was(tmp_path: Path) -> None:
    net = make_net().train()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    StreamingModel(net, tile=256).predict_to(an_image(), tmp_path / "map.zarr")
    assert [module.training for module in net.modules()] == [True, True, False, True, True, True]
    for name, state in net.state_dict().items():
        assert torch.equal(state, before[name])


def test_the_map_is_never_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Maps, name: str) -> Tensor:
        raise AssertionError(f"{name} is read whole")

    monkeypatch.setattr(Maps, "read_whole", refused)
    size, budget = (2048, 2048), 100 * 2**20
    model = StreamingModel(make_net(classes=16), budget=budget)
    assert not model.eval().plan((1, 3, *size)).fits
    model.predict_to(TensorSource(torch.zeros(3, *size)), tmp_path / "map.zarr")
    report = model.last_report
    assert report is not None
    assert report.measured_bytes is not None
    assert report.measured_bytes <= budget < 16 * 4 * size[0] * size[1]


def test_one_of_several_results_and_further_inputs(tmp_path: Path) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, x: Tensor, factor: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
            scores = self.net(x)
            return {"out": scores * factor * mask[:, None], "mean": scores.mean((2, 3))}

    net, image, factor = Several(), an_image((90, 80)), torch.tensor(2.0)
    mask = torch.randint(2, (1, 90, 80))
    model = StreamingModel(net, tile=32)
    more: dict[str, Any] = {"inputs": (factor,), "named_inputs": {"mask": TensorSource(mask)}}
    model.predict_to(image, tmp_path / "map.tif", key="out", **more)
    with torch.no_grad():
        whole = net.eval()(image, factor, mask=mask)["out"][0]
    torch.testing.assert_close(read(tmp_path / "map.tif"), whole)
    with pytest.raises(UnsupportedModel, match="key= says which"):
        model.predict_to(image, tmp_path / "other.tif", **more)
    with pytest.raises(UnsupportedModel, match=r"result has shape \(1, \d\): allowed is a map"):
        model.predict_to(image, tmp_path / "other.tif", key="mean", **more)
    with pytest.raises(UnsupportedModel, match=r"is a dict, which has no key='logits': it has 'out', 'mean'"):
        model.predict_to(image, tmp_path / "other.tif", key="logits", **more)


def test_a_result_that_is_one_tensor_has_no_key(tmp_path: Path) -> None:
    for key in ("out", 0):
        with pytest.raises(UnsupportedModel, match=rf"one tensor, and key={key!r} is given: leave key= out"):
            StreamingModel(make_net(), tile=32).predict_to(an_image((90, 80)), tmp_path / "map.tif", key=key)


def test_a_result_of_an_operator_without_a_rule_is_written_too(tmp_path: Path) -> None:
    class Bounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.renorm(2, 3, 9.0)

    model = StreamingModel(nn.Sequential(nn.Conv2d(3, 2, 3), Bounded()), tile=32)
    model.predict_to(an_image((90, 80)), tmp_path / "map.zarr")
    torch.testing.assert_close(read(tmp_path / "map.zarr"), expected(model.net, an_image((90, 80))))


def test_classes_may_have_names_of_any_text_but_in_tiff_files(tmp_path: Path) -> None:
    """Tifffile takes a description that holds the word scanimage for one of another format."""
    names = ("ground", "</OME>\n\u202e", "scanimage.SI. 腺", "\"'&")
    model, image = StreamingModel(make_net()), an_image((90, 80))
    model.predict_to(image, tmp_path / "map.zarr", output="classes", class_names=names)
    attributes = zarr.open_group(tmp_path / "map.zarr").attrs.asdict()
    assert attributes["class_names"] == list(names)
    model.predict_to(image, tmp_path / "plain.zarr", output="classes")
    assert list(zarr.open_group(tmp_path / "plain.zarr").attrs) == ["ome"]
    model.predict_to(image, tmp_path / "map.tif", output="classes", class_names=names)
    with tifffile.TiffFile(tmp_path / "map.tif") as file:
        assert not file.is_scanimage
    for path in ("map.zarr", "map.tif"):
        assert torch.equal(read(tmp_path / path), read(tmp_path / "plain.zarr"))


# --- where pixels lie ---------------------------------------------------------------------------------


def test_the_size_of_a_pixel_goes_from_one_ome_zarr_to_another(tmp_path: Path) -> None:
    axes = [
        {"name": "c", "type": "channel"},
        *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx"),
    ]
    scale = [{"type": "scale", "scale": [1.0, 0.25, 0.5]}]
    multiscale = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    group = zarr.create_group(
        tmp_path / "in.zarr", attributes={"ome": {"version": "0.5", "multiscales": [multiscale]}}
    )
    group.create_array("0", data=an_image((90, 80))[0].numpy(), chunks=(3, 64, 64))
    source = open_image(tmp_path / "in.zarr")
    assert source.placement == Placement((90, 80), (0.25, 0.5), "micrometer")
    model = StreamingModel(make_net(stride=2), tile=32)
    model.predict_to(source, tmp_path / "map.zarr")
    assert open_image(tmp_path / "map.zarr").placement == Placement((45, 40), (0.5, 1.0), "micrometer")
    model.predict_to(source, tmp_path / "map.tif")
    with tifffile.TiffFile(tmp_path / "map.tif") as file:
        assert file.is_bigtiff
        assert file.pages[0].tilewidth == file.pages[0].tilelength == 512
        assert file.pages[0].resolution == pytest.approx((10_000, 20_000))


def test_the_size_of_a_pixel_of_an_ome_tiff_is_known(tmp_path: Path) -> None:
    metadata = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25}
    tifffile.imwrite(
        tmp_path / "in.ome.tif", np.zeros((3, 90, 80), np.uint8), metadata=metadata, photometric="minisblack"
    )
    assert open_image(tmp_path / "in.ome.tif").placement == Placement((90, 80), (0.25, 0.5), "micrometer")


KEYS = (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32633)
GEO = [
    (33550, 12, 3, (10.0, 20.0, 0.0), True),
    (33922, 12, 6, (4.0, 2.0, 0.0, 500_000.0, 6_000_000.0, 0.0), True),
    (34735, 3, 12, KEYS, True),
    (34737, 2, 7, "WGS 84|", True),
]


def a_geotiff(path: Path, tags: list[Any]) -> Path:
    pixels = an_image((90, 80))[0].numpy()
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="separate", extratags=tags)
    return path


def test_geotiff_tags_are_those_of_the_maps_own_pixels(tmp_path: Path) -> None:
    source = open_image(a_geotiff(tmp_path / "in.tif", GEO))
    for stride in (1, 2):
        path = StreamingModel(make_net(stride=stride), tile=32).predict_to(
            source, tmp_path / f"map{stride}.tif"
        )
        with tifffile.TiffFile(path) as file:
            tags = {code: file.pages[0].tags[code].value for code, *_ in GEO}
        assert tags[33550] == (10.0 * stride, 20.0 * stride, 0.0)
        assert tags[33922] == (4.0 / stride, 2.0 / stride, 0.0, 500_000.0, 6_000_000.0, 0.0)
        assert tags[34735] == KEYS
        assert tags[34737] == "WGS 84|"


def test_coordinates_of_centres_move_with_the_size_of_a_pixel(tmp_path: Path) -> None:
    keys = (1, 1, 0, 1, 1025, 0, 1, 2)
    matrix = (10.0, 0.0, 0.0, 500.0, 0.0, -20.0, 0.0, 900.0, *(0.0,) * 7, 1.0)
    tags = [(34264, 12, 16, matrix, True), (34735, 3, 8, keys, True), GEO[1]]
    found = open_image(a_geotiff(tmp_path / "in.tif", tags)).placement.of_map((45, 40))
    values = {code: value for code, *_, value in found.tags}
    # The first pixel of the map has its centre between the first two of the image.
    assert values[34264][:8] == (20.0, 0.0, 0.0, 505.0, 0.0, -40.0, 0.0, 890.0)
    assert values[33922][:2] == (1.75, 0.75)


# --- faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["zarr", "tif"])
def test_what_is_there_is_not_overwritten_unless_told(tmp_path: Path, ending: str) -> None:
    path, image = tmp_path / f"map.{ending}", an_image((90, 80))
    model, other = StreamingModel(make_net(), tile=32), StreamingModel(make_net(classes=2), tile=32)
    model.predict_to(image, path)
    with pytest.raises(CannotWrite, match="there already; pass overwrite=True"):
        other.predict_to(image, path)
    assert read(path).shape[0] == 4
    other.predict_to(image, path, overwrite=True)
    assert read(path).shape[0] == 2
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_what_is_no_map_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "map.zarr").mkdir()
    (tmp_path / "map.zarr" / "notes.txt").write_text("mine")
    with pytest.raises(CannotWrite, match="no map of this format"):
        StreamingModel(make_net()).predict_to(an_image((90, 80)), tmp_path / "map.zarr", overwrite=True)
    assert (tmp_path / "map.zarr" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("map.png", {}, ValueError, r"ends in '\.png': allowed are \.zarr, \.tif, \.tiff"),
        ("nowhere/map.zarr", {}, CannotWrite, "there is no folder"),
        ("map.zarr", {"output": "labels"}, ValueError, "output='labels': allowed are 'values', 'classes'"),
        ("map.zarr", {"dtype": torch.float64}, ValueError, "allowed are torch.float32 and torch.float16"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_computed(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = StreamingModel(make_net())
    with pytest.raises(error, match=text):
        model.predict_to(an_image((90, 80)), tmp_path / name, **options)
    assert model.last_report is None


def test_a_batch_is_refused(tmp_path: Path) -> None:
    model = StreamingModel(make_net(), tile=32)
    with pytest.raises(DatasetMismatch, match="a map of one image is written, and 2 are given"):
        model.predict_to(an_image((90, 80)).repeat(2, 1, 1, 1), tmp_path / "map.zarr")
    assert model.last_report is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["zarr", "tif"])
def test_nothing_is_left_where_the_disk_is_full(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, image = tmp_path / f"map.{ending}", an_image((1100, 80))
    model = StreamingModel(make_net(), tile=256)
    model.predict_to(image, path)
    before = read(path)
    calls = []

    def full(*_: Any) -> None:
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("streamcnn.data.map_files.flush_files", full)
    with pytest.raises(CannotWrite, match=r"the disk at .* is full"):
        model.predict_to(image, path, overwrite=True)
    assert calls
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert torch.equal(read(path), before)
