"""Paths that nothing can lie at: too long a name, as from a variable that holds something else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from streamcnn.data.file_dataset import open_dataset
from streamcnn.data.sources import open_image
from streamcnn.data.tile_store import TileStore
from streamcnn.errors import StreamError

Run = Callable[..., tuple[int, str, str]]

LONG = "x" * 300

DOORS = [
    ["info", LONG],
    ["info", f"{LONG}.tif"],
    ["info", f"file:///{LONG}"],
    ["info", f"s:{LONG}"],
    ["convert", LONG, "out"],
    ["convert", "images", LONG],
    ["convert", "images", "out", "--labels", LONG],
    ["train", "resnet18", LONG, "--out", "run"],
    ["train", "resnet18", "images", "--out", LONG],
    ["evaluate", LONG],
    ["predict", LONG, "images"],
    ["plan", "resnet18", "--image", LONG],
    ["profile", "resnet18", "--size", "64", "--output", LONG],
    ["demo", "--size", "64", "--output", LONG],
    ["ultramnist", "preview", LONG],
    ["ultramnist", "generate", LONG, "--digits", "uci"],
]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two classes; paths are relative to where it lies."""
    for kind in ("dark", "light"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (64, 64)).save(tmp_path / "images" / kind / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "images"


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("arguments", DOORS, ids=lambda given: " ".join(given).replace(LONG, "LONG"))
def test_a_long_name_is_refused_in_one_line(arguments: list[str], run: Run, tmp_path: Path) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("streamcnn: error: cannot ") or "cannot be read" in err
    assert err.count("\n") == 1
    assert "File name too long" in err
    assert os.listdir(tmp_path) == ["images"]


@pytest.mark.parametrize("name", [LONG, "a\0b"], ids=["too long", "zero"])
@pytest.mark.parametrize("use", [open_image, open_dataset, TileStore])
def test_a_name_that_cannot_be_is_an_error_of_the_package(use: Callable[[str], object], name: str) -> None:
    with pytest.raises(StreamError, match="cannot look at"):
        use(name)


@pytest.mark.usefixtures("images")
def test_a_table_that_names_what_cannot_be_is_told_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(f"image,label\nimages/dark/0.png,0\n{LONG},1\n")
    with pytest.raises(StreamError, match=r"table\.csv, line 3: cannot look at .*File name too long"):
        open_dataset(tmp_path / "table.csv")


def test_links_in_a_circle_are_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    status, _, err = run("info", tmp_path / "circle")
    assert (status, err.count("\n")) == (1, 1)
    assert "Too many levels of symbolic links" in err


@pytest.mark.usefixtures("images")
def test_a_name_that_is_too_long_only_in_another_spelling_is_found(tmp_path: Path) -> None:
    name = f"{'é' * 120}.png"  # 244 bytes as it is, 364 with accents of their own
    Image.new("L", (64, 64)).save(tmp_path / name)
    (tmp_path / "table.csv").write_text(f"image,label\n{name},0\nimages/dark/0.png,1\n", encoding="utf-8")
    assert len(open_dataset(tmp_path / "table.csv")) == 2
