"""Errors about one image of many name its file: in training, evaluation and prediction, in batches too."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hostile import FACTORY, make_run
from PIL import Image
from torch.utils.data import DataLoader

from streamcnn.data.dataset import collate
from streamcnn.data.file_dataset import open_dataset
from streamcnn.errors import CorruptImage, StreamError, TrainingDiverged
from streamcnn.training import RunConfig, TrainSettings, make_trainer
from streamcnn.training.checkpoint_file import load_checkpoint
from streamcnn.training.checkpoints import CheckpointFolder

Run = Callable[..., tuple[int, str, str]]
TRUST = f"--trust={FACTORY}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("named"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two images of two classes, among which a test puts a bad one."""
    for name in ("bright", "dark"):
        (tmp_path / "images" / name).mkdir(parents=True)
        write(tmp_path / "images" / name / "a.png", (16, 12, 3))
    return tmp_path / "images"


def write(path: Path, shape: tuple[int, ...]) -> None:
    Image.fromarray(np.full(shape, 200, np.uint8)).save(path)


def not_a_number(path: Path, value: float = np.nan) -> None:
    pixels = np.zeros((16, 12, 3), np.float32)
    pixels[3, 4, 1] = value
    tifffile.imwrite(path, pixels, photometric="rgb")


def truncated(path: Path) -> None:
    write(path, (16, 12, 3))
    path.write_bytes(path.read_bytes()[:-30])


BAD: list[tuple[str, Callable[[Path], None], str]] = [
    ("bad.tif", not_a_number, r"\(PATH\) is nan for the model in channel 1 at row 3, column 4"),
    ("bad.tif", lambda path: not_a_number(path, -np.inf), r"\(PATH\) is -inf for the model"),
    ("bad.png", truncated, "cannot read rows .* of PATH: image file is truncated"),
]


@pytest.mark.parametrize(("name", "make", "text"), BAD)
def test_one_bad_image_in_a_folder_is_named(
    made: Path, images: Path, run: Run, name: str, make: Callable[[Path], None], text: str
) -> None:
    path = images / "dark" / name
    make(path)
    wanted = text.replace("PATH", re.escape(str(path)))
    # Floats among images of bytes are refused for that, unless they are meant.
    status, out, err = run("predict", made, images, TRUST, "--other-pixels")
    assert (status, re.search(wanted, err) is not None) == (1, True), err
    assert [line.partition(": ")[0] for line in out.splitlines()] == [
        str(images / "bright" / "a.png"),
        str(images / "dark" / "a.png"),
    ]
    if path.suffix == ".tif":
        # Among images of bytes it would be refused for its values' range.
        for folder in ("bright", "dark"):
            (images / folder / "a.png").unlink()
            tifffile.imwrite(
                images / folder / "a.tif", np.full((16, 12, 3), len(folder), np.float32), photometric="rgb"
            )
    status, out, err = run("evaluate", made, f"--data={images}", "--split=train", TRUST, "--other-pixels")
    assert (status, out, re.search(wanted, err) is not None) == (1, "", True), err
    assert err.endswith(" (classification, image 2)\n")


@pytest.mark.parametrize(("name", "make", "text"), BAD[2:])
def test_one_bad_image_in_a_batch_that_is_trained_on_is_named(
    tmp_path: Path, made: Path, images: Path, name: str, make: Callable[[Path], None], text: str
) -> None:
    path = images / "dark" / name
    make(path)
    with pytest.raises(CorruptImage, match=text.replace("PATH", re.escape(str(path)))) as caught:
        train(tmp_path, images, "train")
    assert re.search(r" \(update 1 of epoch 1, images .*\b2[,)]", str(caught.value)), caught.value


def train(folder: Path, images: Path, validation: str) -> None:
    config = RunConfig(
        model=FACTORY,
        data=str(images),
        validation_split=validation,
        tile=(16, 12),
        settings=TrainSettings(epochs=1, batch_size=3),
    )
    make_trainer(config, folder / "run").run()


def test_a_loss_that_is_no_number_names_the_image_it_is_of(tmp_path: Path, made: Path, images: Path) -> None:
    for name in ("bright", "dark"):
        (images / name / "a.png").unlink()
        not_a_number(images / name / "a.tif", 1.0)
    path = images / "dark" / "b.tif"
    # Each is a number, and sums of them are none.
    pixels = np.random.default_rng(0).choice([-1.6e38, 1.6e38], (16, 12, 3)).astype(np.float32)
    tifffile.imwrite(path, pixels, photometric="rgb")
    with pytest.raises(TrainingDiverged) as caught:
        train(tmp_path, images, "train")
    found = str(caught.value)
    assert re.match(
        r"the loss of update 1 is nan, as the model gives NaN or infinity for image 2 "
        rf"\({re.escape(str(path))}\): see that",
        found,
    ), found


def test_an_image_that_the_model_does_not_take_is_named(made: Path, images: Path, run: Run) -> None:
    path = images / "dark" / "grey.png"
    write(path, (16, 12))
    status, _, err = run("predict", made, images, TRUST, "--other-pixels")
    assert (status, f"(prediction, image 2 ({path}))\n" in err) == (1, True), err


def test_an_answer_that_is_no_number_is_no_answer(tmp_path: Path, images: Path, run: Run) -> None:
    (tmp_path / "made").mkdir()
    folder = make_run(tmp_path / "made")
    checkpoints = CheckpointFolder(folder / "checkpoints")
    best = checkpoints.best()
    assert best is not None
    state = load_checkpoint(best)
    state["model"]["0.bias"].fill_(torch.nan)
    checkpoints.mark_best(checkpoints.save(state, 1).name)
    status, out, err = run("predict", folder, images, TRUST)
    named = f"the model gives NaN or infinity for image 0 ({images / 'bright' / 'a.png'}): see that"
    assert (status, out, named in err) == (1, "", True), err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_gone_is_named_by_worker_processes(images: Path, workers: int) -> None:
    data = open_dataset(images)
    path = images / "dark" / "a.png"
    path.unlink()
    loader = DataLoader(data, batch_size=2, collate_fn=collate, num_workers=workers)
    with pytest.raises(StreamError, match=re.escape(str(path))):
        list(loader)
