"""The commands explain and view, and what the first one writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from streamcnn import StreamingModel, TensorSource, ZarrSource
from streamcnn.attribution import LayerGradCam, Saliency, explanation
from streamcnn.attribution.explanation import tile_borders
from streamcnn.attribution.heat_map import HeatMap, colour_table, coloured, heat_map, strongest
from streamcnn.attribution.methods import METHODS
from streamcnn.attribution.pyramid import TILE, write_heat_pyramid, write_image_pyramid
from streamcnn.cli.explaining import MethodName
from streamcnn.data.sources import open_image
from streamcnn.geometry.regions import Region
from streamcnn.training import load_run
from streamcnn.training.config import RunConfig
from streamcnn.training.runs import make_trainer
from streamcnn.training.settings import TrainSettings

Run = Callable[..., tuple[int, str, str]]

FACTORIES = """
import torch
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )

class WithNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 4, 3, stride=3), nn.Linear(5, 2)

    def forward(self, x, numbers):
        return self.head(torch.cat((self.features(x).relu().mean((2, 3)), numbers), 1))
"""
SIZE = (45, 70)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images, a run of one update, and one of a model that takes numbers."""
    folder = tmp_path_factory.mktemp("place")
    draw = np.random.default_rng(0)
    rows = ["image,label,split,side"]
    for split in ("train", "val"):
        for index in range(4):
            name = "<bright>" if index % 2 else "dark"
            path = folder / "images" / split / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (*SIZE, 3)).astype(np.uint8)).save(path)
            rows.append(f"{path.relative_to(folder)},{name},{split},{index}")
    (folder / "table.csv").write_text("\n".join([*rows, ""]))
    (folder / "explained_nets.py").write_text(FACTORIES)
    common: dict[str, Any] = {
        "validation_split": "val",
        "tile": (20, 24),
        "settings": TrainSettings(epochs=1),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        images, table = str(folder / "images"), str(folder / "table.csv")
        make_trainer(RunConfig(model="explained_nets:small", data=images, **common), folder / "run").run()
        with_numbers = RunConfig(model="explained_nets:WithNumbers", data=table, inputs=("side",), **common)
        make_trainer(with_numbers, folder / "run-numbers").run()
        yield folder


def explain(run: Run, place: Path, out: Path, *options: object) -> tuple[int, str, str]:
    image = place / "images/val/dark/0.png"
    return run("explain", place / "run", image, "--out", out, "--trust=explained_nets:small", *options)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_from_image_to_page(run: Run, place: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    few = [f"--{name}=2" for name in METHODS[method].options if name != "noise"]
    status, printed, _ = explain(run, place, out, f"--method={method}", "--target=<bright>", *few)
    assert status == 0
    assert f"{method} of <bright>\npage: {out / 'index.html'}\n" in printed
    facts = json.loads((out / "explanation.json").read_text())
    expected_layer = "2" if METHODS[method].of_layer else None
    assert (facts["method"], facts["layer"], facts["target"]) == (method, expected_layer, 0)
    assert facts["target_name"] == "<bright>"
    assert facts["shape"] == [3, *SIZE]
    assert sum(share for _, share in facts["predictions"]) == pytest.approx(1)
    wanted = {"smoothgrad": {"samples": 2, "noise": 0.3}, "integrated-gradients": {"steps": 2}}
    assert facts["options"] == wanted.get(method, {})

    page = (out / "index.html").read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    image, heat = data["layers"]
    assert (image["height"], image["width"]) == SIZE
    assert data["grid"] == {"rows": facts["tile_rows"], "cols": facts["tile_cols"]}
    assert "<h1>&lt;bright&gt;</h1>" in page
    assert "http" not in page.replace("http-equiv", "")
    with Image.open(out / "overlay.png") as overlay:
        assert overlay.size == SIZE[::-1]
    for layer in (image, heat):
        files = out / f"{layer['name']}_files"
        assert {path.name for path in files.iterdir()} == {str(each) for each in range(layer["last"] + 1)}
        with Image.open(files / str(layer["last"]) / f"0_0.{layer['ending']}") as tile:
            assert tile.size == (layer["width"], layer["height"])
        assert f'Width="{layer["width"]}"' in (out / f"{layer['name']}.dzi").read_text()

    source = open_image(out / "heatmap.ome.zarr")
    channels = 1 if METHODS[method].of_layer else 3
    assert source.shape == (channels, heat["height"], heat["width"])
    assert source.read(Region.whole(source.shape[1:])).abs().max() > 0


def test_the_array_is_the_attribution_and_covers_the_image(run: Run, place: Path, tmp_path: Path) -> None:
    trained = load_run(place / "run", trust=["explained_nets:small"])
    image = [open_image(place / "images/val/dark/0.png")]
    expected = {
        "grad-cam": LayerGradCam(trained.model, "0").attribute(image, 1, relu_attributions=True),
        "gradient": Saliency(trained.model).attribute(image, 1),
    }
    for method, value in expected.items():
        layer = ["--layer=0"] if method == "grad-cam" else []
        out = tmp_path / method
        assert explain(run, place, out, f"--method={method}", "--target=1", *layer)[0] == 0
        source = ZarrSource(out / "heatmap.ome.zarr")
        torch.testing.assert_close(source.read(Region.whole(source.shape[1:])), value[0])
        metadata = json.loads((out / "heatmap.ome.zarr/zarr.json").read_text())["attributes"]["ome"]
        first, second = metadata["multiscales"][0]["datasets"][0]["coordinateTransformations"]
        assert metadata["version"] == "0.5"
        for axis, extent in enumerate(SIZE, 1):
            step, middle = first["scale"][axis], second["translation"][axis]
            # From the outer edge of the first pixel to that of the last; centres of pixels are whole numbers.
            assert middle - step / 2 == pytest.approx(-0.5)
            assert step * source.shape[axis] == pytest.approx(extent)


def test_the_predicted_class_is_explained_by_default(run: Run, place: Path, tmp_path: Path) -> None:
    assert explain(run, place, tmp_path / "out")[0] == 0
    facts = json.loads((tmp_path / "out/explanation.json").read_text())
    assert facts["target_name"] == facts["predictions"][0][0]
    _, answer, _ = run(
        "predict", place / "run", place / "images/val/dark/0.png", "--trust=explained_nets:small", "--json"
    )
    assert json.loads(answer)["class"] == facts["target_name"]


def test_numbers_beside_the_image_come_from_a_table(run: Run, place: Path, tmp_path: Path) -> None:
    table = place / "one.csv"
    table.write_text("image,side\nimages/val/dark/0.png,2\n")
    arguments = ("explain", place / "run-numbers", "--trust=explained_nets:WithNumbers", "--method=grad-cam")
    status, printed, err = run(*arguments, table, "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "grad-cam of" in printed
    status, _, err = run(*arguments, place / "images/val/dark/0.png", "--out", tmp_path / "other")
    assert (status, "takes inputs besides images" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (["--layer=3x"], 2, "--layer: the model calls no layer '3x': allowed are such as '3'"),
        (["--layer=5"], 2, "--layer: layer '5' returns a tensor of shape (1, 2): allowed are layers that"),
        (["--method=gradient", "--layer=0"], 2, "--layer: gradient explains by pixels"),
        (["--samples=5"], 2, "--samples: grad-cam takes neither samples, noise nor steps: leave it out"),
        (["--method=smoothgrad", "--steps=5"], 2, "--steps: smoothgrad takes --samples and --noise: leave"),
        (["--target=2"], 2, "--target: no class '2': allowed are '<bright>', 'dark', and numbers up to 1"),
        (["--target=grey"], 2, "--target: no class 'grey'"),
        (["--colours=gaudy"], 2, "--colours: matplotlib has no colour map 'gaudy'"),
        (["--budget=2MB"], 1, "the budget for everything is 1.91 MiB"),
        (["--level=1"], 1, "level"),
    ],
)
def test_what_cannot_be_explained_is_said_before_anything_is_written(
    run: Run, place: Path, tmp_path: Path, options: list[str], status: int, text: str
) -> None:
    found, _, err = explain(run, place, tmp_path / "out", *options)
    assert (found, text in err) == (status, True), err
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(run: Run, place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for out, text in (("out", "is there already"), ("none/out", "is no folder: make it first")):
        status, _, err = explain(run, place, tmp_path / out)
        assert (status, text in err) == (1, True)
    several = run(
        "explain", place / "run", place / "images", "--out", tmp_path / "new", "--trust=explained_nets:small"
    )
    assert (several[0], "holds several images: allowed is one" in several[2]) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_left_of_an_explanation_that_fails(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(explanation, "render_page", fail)
    status, _, err = explain(run, place, tmp_path / "out")
    assert (status, "cannot write" in err) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_command_and_library_have_the_same_methods() -> None:
    assert [each.value for each in MethodName] == list(METHODS)


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """However the block ends: a server that is waited for would never end by itself."""
    try:
        yield
    finally:
        process.kill()


def test_view_serves_the_page_to_this_machine_alone(tmp_path: Path, run: Run) -> None:
    status, _, err = run("view", tmp_path)
    assert (status, "has no index.html" in err) == (2, True)
    (tmp_path / "index.html").write_text("a page")
    command = [
        sys.executable,
        "-c",
        # Whoever runs the tests in the background ignores interrupts, and so would what they start.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from streamcnn.cli import main; main()",
        "view",
        str(tmp_path),
        "--port=0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ended(process):
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        with urlopen(address) as answer:
            assert answer.read() == b"a page"
        port = address.rstrip("/").rpartition(":")[2]
        status, _, err = run("view", tmp_path, f"--port={port}")
        assert (status, f"--port: {port} cannot be used" in err) == (2, True)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 128 + signal.SIGINT


def test_colours_are_transparent_at_zero_and_opaque_at_the_limit() -> None:
    values = torch.tensor([[-9.0, -2.0, 0.0, 1.0, 2.0, 9.0]])
    signed = coloured(values, 2.0, colour_table(None, is_signed=True))
    assert signed[0, :, 3].tolist() == pytest.approx([255, 255, 0, 127, 255, 255], abs=1)
    assert signed[0, 1, :3].tolist() == [0, 0, 255]
    assert signed[0, 4, :3].tolist() == [255, 0, 0]
    unsigned = coloured(values, 2.0, colour_table("inferno", is_signed=False))
    assert unsigned[0, :, 3].tolist() == pytest.approx([0, 0, 0, 127, 255, 255], abs=1)


def test_a_heat_map_sums_channels_and_is_halved_down_to_one() -> None:
    heat = heat_map(torch.arange(30.0, dtype=torch.float64).view(1, 2, 3, 5), (30, 25), is_signed=True)
    assert heat.values.tolist()[0] == [15, 17, 19, 21, 23]
    assert heat.pixel == (10, 5)
    assert [tuple(each.shape) for each in heat.halvings()] == [(3, 5), (2, 3), (1, 2), (1, 1)]
    assert heat.halvings()[1][1, 2] == heat.values[2, 4]
    assert strongest(torch.zeros(3, 3)) == 1
    assert strongest(-torch.ones(3, 3)) == 1


def read(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_pyramids_hold_every_pixel_once_at_every_level(tmp_path: Path) -> None:
    size = TILE + 30, 2 * TILE + 100
    pixels = torch.randint(0, 256, (3, size[0] // 40 + 1, size[1] // 40 + 1), dtype=torch.uint8)
    pixels = pixels.repeat_interleave(40, 1).repeat_interleave(40, 2)[:, : size[0], : size[1]].contiguous()
    source = TensorSource(pixels)
    pyramid = write_image_pyramid(tmp_path, "image", source)
    assert source.bytes_read == pixels.nbytes
    assert pyramid.last == 11
    for level in (11, 10, 8, 0):
        height, width = pyramid.size_of(level)
        whole = np.zeros((height, width, 3))
        for path in (tmp_path / "image_files" / str(level)).iterdir():
            col, row = (int(part) * TILE for part in path.stem.split("_"))
            tile = read(path)
            whole[row : row + tile.shape[0], col : col + tile.shape[1]] = tile
        expected = pixels.double()
        for _ in range(11 - level):
            expected = torch.nn.functional.avg_pool2d(expected, 2, ceil_mode=True)
        assert np.abs(whole - expected.permute(1, 2, 0).numpy()).mean() < 8  # JPEG's loss
    values = torch.rand(size[0], size[1])
    heat = write_heat_pyramid(
        tmp_path, "heatmap", HeatMap(values, size, False), colour_table(None, is_signed=False)
    )
    tile = read(tmp_path / "heatmap_files" / str(heat.last) / "2_1.png")
    part = values[TILE:, 2 * TILE :]
    expected_tile = coloured(part.clone(), strongest(values), colour_table(None, is_signed=False))
    assert np.array_equal(tile, expected_tile)


def test_borders_of_tiles_are_where_the_plan_cuts() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3, stride=2, padding=1), torch.nn.AdaptiveAvgPool2d(1))
    model = StreamingModel(net, tile=(40, 60))
    assert tile_borders(model.plan((1, 3, 80, 180))) == ((), ())  # on the whole image
    model.resident_tail = False
    assert tile_borders(model.plan((1, 3, 80, 180))) == ((40,), (60, 120))
