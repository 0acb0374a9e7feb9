"""The commands evaluate and predict in several processes, compared with one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from process_groups import TORCHRUN, prepare_commands, write_class_folders
from segmentation_runs import FACTORY, write_factories, write_pairs
from torch import distributed as dist

from streamcnn.data.sources import open_image
from streamcnn.geometry.regions import Region

Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package here")

CLASSIFIER = """
from torch import nn

def small():
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(features, nn.Linear(4, 2))
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare_commands(tmp_path, monkeypatch)
    return tmp_path


def in_two(*arguments: object) -> tuple[int, list[str], list[str]]:
    """Exit status of a command in two processes, its lines, and what it says itself on standard error."""
    command = [*TORCHRUN, "-m", "streamcnn", *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200)
    said = [line for line in found.stderr.splitlines() if line.startswith("streamcnn: ")]
    return found.returncode, found.stdout.splitlines(), said


def assert_evaluated_alike(run: Run, folder: Path, trust: str) -> None:
    """Evaluate a run in one process and in two."""
    command = ("evaluate", folder, trust, "--json")
    alone = json.loads(run(*command)[1])
    status, lines, said = in_two(*command)
    assert (status, said, len(lines)) == (0, [], 1)
    together = json.loads(lines[0])
    assert together.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
    assert together == alone


def test_a_classifier_is_evaluated_and_predicts_as_in_one_process(workplace: Path, run: Run) -> None:
    (workplace / "shared_nets.py").write_text(CLASSIFIER)
    write_class_folders(workplace / "images", ("train", "test"))
    data, folder, trust = workplace / "images", workplace / "run", "--trust=shared_nets:small"
    options = ["--tile=20", "--epochs=1", "--validation-share=0.4"]
    assert run("train", "shared_nets:small", data, f"--out={folder}", *options)[0] == 0

    assert_evaluated_alike(run, folder, trust)

    command = ("predict", folder, data / "test", trust, "--json", "--device=cpu")
    _, out, _ = run(*command)
    status, lines, said = in_two(*command)
    assert (status, said) == (0, [])
    assert predictions(lines) == predictions(out.splitlines())


def predictions(lines: list[str]) -> dict[str, Any]:
    """What was printed of each image, in whichever order."""
    found = {values["image"]: values for values in map(json.loads, lines)}
    assert len(found) == len(lines)
    return {
        name: {**values, "probability": pytest.approx(values["probability"], rel=1e-5)}
        for name, values in found.items()
    }


def test_a_segmentation_is_evaluated_and_its_maps_are_written_as_in_one_process(
    workplace: Path, run: Run
) -> None:
    write_pairs(workplace)
    write_factories(workplace)
    folder, trust = workplace / "run", f"--trust={FACTORY}"
    options = ["--task=segmentation", "--validation-split=val", "--ignore-index=255", "--tile=40"]
    assert run("train", FACTORY, workplace / "scenes.csv", f"--out={folder}", *options, "--epochs=1")[0] == 0

    assert_evaluated_alike(run, folder, trust)

    images = workplace / "images"
    tifffile.imwrite(images / "0.tif", np.zeros((72, 64, 3), np.uint8), photometric="rgb")
    command = ("predict", folder, images, trust)
    status, lines, said = in_two(*command, f"--output={workplace / 'together'}")
    assert status == 1
    assert len(said) == 1, said
    assert f"{images / '0.tif'} has 3 channels, and training images had 1" in said[0]
    # The other process, which has every second image, has done its part.
    (images / "0.tif").unlink()
    assert run(*command, f"--output={workplace / 'alone'}")[0] == 0
    assert len(lines) == 4
    for seed in (1, 3, 5, 7):
        maps = [open_image(workplace / name / f"{seed}.zarr") for name in ("together", "alone")]
        first, second = (each.read(Region.whole((72, 64))) for each in maps)
        assert (first == second).all()
