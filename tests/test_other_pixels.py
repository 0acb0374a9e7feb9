"""Images of other channels, types or ranges than a run was trained on are refused, unless they are meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segmentation_runs import FACTORY, IGNORED, a_config, write_factories, write_pairs
from training_runs import Images, fresh_model

from streamcnn import TensorSource
from streamcnn.errors import DatasetMismatch
from streamcnn.training import RunConfig, SegmentationLoss, Trainer, TrainSettings, make_trainer

Run = Callable[..., tuple[int, str, str]]

FACTORIES = """
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
"""
TRUST = "--trust=other_pixels_nets:small"
SIZE = (40, 36)
BYTES = np.random.default_rng(0).integers(0, 256, (3, *SIZE)).astype("u1")


def write(folder: Path, pixels: np.ndarray) -> Path:
    """Images of two classes, and the first of them."""
    for shift, split in enumerate(("train", "val", "test")):
        for name, add in (("dark", 0), ("bright", 1)):
            path = folder / split / name / "a.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.roll(pixels, 2 * shift + add, 1))
    return folder / "test/dark/a.npy"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run that was trained on bytes."""
    folder = tmp_path_factory.mktemp("place")
    write(folder / "images", BYTES)
    (folder / "other_pixels_nets.py").write_text(FACTORIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        config = RunConfig(
            model="other_pixels_nets:small",
            data=str(folder / "images"),
            validation_split="val",
            tile=(20, 20),
            settings=TrainSettings(epochs=1),
        )
        make_trainer(config, folder / "run").run()
        yield folder


OTHERS = [
    (BYTES.astype("u2"), "holds uint16 up to 65535, and training images held uint8 up to 255"),
    (BYTES.astype("f4"), "holds float32, and training images held uint8 up to 255"),
    (BYTES > 100, "holds bool up to 1, and training images held uint8 up to 255"),
    (BYTES[:1], "has 1 channel, and training images had 3"),
]


@pytest.mark.parametrize(("pixels", "said"), OTHERS, ids=["uint16", "float32", "bool", "grey"])
def test_other_pixels_are_refused_by_every_command(
    run: Run, place: Path, tmp_path: Path, pixels: Any, said: str
) -> None:
    image = write(tmp_path / "other", pixels)
    out = tmp_path / "out"
    for command in (
        ("predict", place / "run", image),
        ("evaluate", place / "run", f"--data={tmp_path / 'other'}"),
        ("explain", place / "run", image, f"--out={out}"),
    ):
        status, printed, err = run(*command, TRUST)
        assert (status, printed, err.count("\n")) == (1, "", 1)
        assert "/a.npy" in err
        assert f"{said}: " in err
        assert "or give --other-pixels" in err
        if len(pixels) == 3:
            assert run(*command, TRUST, "--other-pixels")[0] == 0


def test_pixels_as_in_training_are_taken(run: Run, place: Path) -> None:
    assert run("predict", place / "run", place / "images/test", TRUST)[::2] == (0, "")
    assert run("evaluate", place / "run", TRUST)[::2] == (0, "")


def test_a_run_from_before_types_were_kept_knows_its_channels(run: Run, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    values = json.loads((tmp_path / "run/run.json").read_text())
    assert (values.pop("dtype"), values.pop("largest")) == ("uint8", 255)
    (tmp_path / "run/run.json").write_text(json.dumps(values))
    deep = write(tmp_path / "deep", BYTES.astype("u2"))
    assert run("predict", tmp_path / "run", deep, TRUST)[0] == 0
    grey = write(tmp_path / "grey", BYTES[:1])
    status, _, err = run("predict", tmp_path / "run", grey, TRUST)
    assert (status, "has 1 channel, and training images had 3" in err) == (1, True)


def test_maps_of_other_pixels_are_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_factories(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    loss = SegmentationLoss(ignore_index=IGNORED)
    config = a_config(write_pairs(tmp_path), loss=loss, settings={"epochs": 1})
    make_trainer(config, tmp_path / "run").run()
    np.save(tmp_path / "a.npy", BYTES[:1].astype("u2"))
    arguments = ("predict", tmp_path / "run", tmp_path / "a.npy", f"--output={tmp_path / 'maps'}")
    status, _, err = run(*arguments, f"--trust={FACTORY}")
    assert (status, "a.npy holds uint16 up to 65535" in err) == (1, True)
    assert not (tmp_path / "maps").exists()
    assert run(*arguments, f"--trust={FACTORY}", "--other-pixels")[0] == 0


def test_training_and_validation_images_have_pixels_of_one_kind(tmp_path: Path) -> None:
    class Deep(Images):
        def __getitem__(self, position: int) -> tuple[TensorSource, int]:
            return TensorSource(torch.zeros(1, *SIZE, dtype=torch.uint16)), self.labels[position]

    trainer = Trainer(fresh_model(), Images(4), Deep(4), TrainSettings(epochs=1), tmp_path)
    with pytest.raises(
        DatasetMismatch,
        match="have 1 channel of float32, and validation images 1 channel of uint16 up to 65535: write both",
    ):
        trainer.run()
    assert not list(tmp_path.glob("checkpoints/*"))
