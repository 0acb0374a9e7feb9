"""The code of the README and of the docs runs as it is written, on images that are made here."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn import functional as F

from streamcnn import StreamingModel
from streamcnn.data.convert import convert
from streamcnn.data.image_files import find_images
from tests.pages import run_page
from tests.source_contract import channels_last, write_ome, write_pyramid

HAS_CAPTUM = importlib.util.find_spec("captum") is not None


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pages find their files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Net(nn.Sequential):
    """A net of two classes with a layer of the name that the pages give one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer4 = nn.Conv2d(3, 4, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(4, 2)


def pixels(size: int, seed: int = 0) -> NDArray[np.uint8]:
    """A random image (3, size, size)."""
    return np.random.default_rng(seed).integers(256, size=(3, size, size), dtype=np.uint8)


def write_slide(path: Path, sizes: Sequence[int], series: int = 1) -> None:
    """A TIFF of so many images, each with levels of those sizes."""
    with tifffile.TiffWriter(path) as file:
        for _ in range(series):
            for number, size in enumerate(sizes):
                file.write(
                    channels_last(pixels(size)),
                    subifds=len(sizes) - 1 if number == 0 else None,
                    subfiletype=int(number > 0),
                    tile=(64, 64),
                    photometric="rgb",
                    compression="zlib",
                )


def write_table(path: Path, names: Sequence[str]) -> None:
    """A table of images with classes in turn."""
    path.write_text("image,label\n" + "".join(f"{name},{at % 2}\n" for at, name in enumerate(names)))


# A small disk is told of when the large image is planned.
@pytest.mark.filterwarnings("ignore:.* has room for")
def test_the_readme(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_slide(folder / "slide.svs", [96])
    found = run_page("README.md")
    assert found["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in found["net"].parameters())
    assert "16000" in capsys.readouterr().out


def test_explaining(folder: Path) -> None:
    write_slide(folder / "slide.svs", [32])
    found = run_page("docs/explain.md", {"net": Net()})
    assert found["cam"].shape == (1, 1, 30, 30)
    assert found["smooth"].shape == found["path"].shape == (1, 3, 32, 32)


def test_images(folder: Path) -> None:
    write_slide(folder / "scan.tif", [1600, 800, 400], series=2)
    write_table(folder / "slides.csv", ["scan.tif"])
    write_pyramid(folder / "slide.svs", [pixels(256), pixels(128)])
    np.save(folder / "scan.npy", pixels(64))
    Image.fromarray(channels_last(pixels(64))).save(folder / "photo.jpg")
    tifffile.imwrite(folder / "pages.tif", pixels(64), photometric="minisblack")
    zarr.create_array(folder / "scan.zarr", data=pixels(64), chunks=(3, 32, 32))
    write_ome(folder, "0.5", "cyx", [pixels(64), pixels(32)]).rename(folder / "scan.ome.zarr")
    found = run_page("docs/images.md")
    assert found["tile"].shape == (3, 512, 512)
    assert found["images"][0][0].shape == (3, 400, 400)
    assert found["half"].shape == (3, 32, 32)
    assert found["slide"].shape == (3, 128, 128)


def test_other_libraries(folder: Path) -> None:
    for number in range(4):
        np.save(folder / f"{number}.npy", pixels(32, number))
    slides = [(f"{number}.npy", number % 2) for number in range(4)]
    model = StreamingModel(Net(), tile=16, preprocess=lambda tile: tile / 255)
    given = {"slides": slides, "torch": torch, "F": F, "model": model, "image": torch.rand(1, 3, 32, 32)}
    found = run_page("docs/other_libraries.md", given, without=None if HAS_CAPTUM else "captum")
    assert found["loss"].isfinite()


def test_profiling() -> None:
    given = {"StreamingModel": StreamingModel, "net": Net(), "budget": "1GiB", "shape": (1, 3, 64, 64)}
    model = run_page("docs/profiling.md", given)["model"]
    assert model.plan((1, 3, 64, 64)).fits


def test_segmentation() -> None:
    found = run_page("docs/segmentation.md")
    assert found["part"].shape == (1, 100, 150)
    assert all(parameter.grad is not None for parameter in found["net"].parameters())


def test_speed() -> None:
    assert isinstance(
        run_page("docs/speed.md", {"StreamingModel": StreamingModel, "net": Net()})["model"], nn.Module
    )


def test_the_tile_store(folder: Path) -> None:
    names = [f"{number}.npy" for number in range(10)]
    for number, name in enumerate(names):
        np.save(folder / name, pixels(32, number))
    write_table(folder / "labels.csv", names)
    list(
        convert(
            find_images([folder / name for name in names]), folder / "store", labels=folder / "labels.csv"
        )
    )
    model = StreamingModel(Net(), preprocess=lambda tile: tile / 255)
    found = run_page("docs/tile_store.md", {"model": model})
    assert len(found["validation"]) == 1
    assert found["loss"].isfinite()


def test_training(folder: Path) -> None:
    for split in ("train", "val"):
        for label in ("mild", "severe"):
            (folder / "images" / split / label).mkdir(parents=True)
            np.save(folder / "images" / split / label / "a.npy", pixels(32, len(split) + len(label)))
    found = run_page("docs/training.md", {"net": Net()}, without="torchrun")
    assert found["trainer"].progress.epoch == found["settings"].epochs


def test_ultramnist() -> None:
    found = run_page("docs/ultramnist.md")
    assert found["image"].pixels.shape == (1, 4000, 4000)
