"""The commands train, evaluate, predict and explain of segmentation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tifffile
import zarr
from segmentation_runs import FACTORY, draw_pair, write_factories, write_pairs

from streamcnn.cli.arguments import parse_numbers
from streamcnn.data.sources import open_image
from streamcnn.geometry.regions import Region
from streamcnn.training import SegmentationLoss, load_run
from streamcnn.training.runs import read_run

Run = Callable[..., tuple[int, str, str]]
TRUST = f"--trust={FACTORY}"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_pairs(tmp_path)
    write_factories(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def arguments(workplace: Path, data: str = "scenes.csv", **changes: Any) -> list[str]:
    options = {"validation-split": "val", "epochs": 1, "tile": 40, "learning-rate": 0.05, "ignore-index": 255}
    flat = [f"--{name}={value}" for name, value in {**options, **changes}.items() if value is not None]
    out = f"--out={workplace / 'run'}"
    return ["train", FACTORY, str(workplace / data), out, "--task=segmentation", *flat]


def test_a_segmentation_is_trained_evaluated_and_its_maps_are_written(workplace: Path, run: Run) -> None:
    changes = {"loss": "cross_entropy+dice", "class-weights": "1,2,2", "loss-option": "smooth=1", "epochs": 4}
    status, out, err = run(*arguments(workplace, **changes))
    assert (status, err) == (0, "")
    assert "epoch 4: loss 0." in out
    assert ", mean IoU " in out
    assert "16 updates in 4 epochs; best validation mean IoU " in out
    folder = workplace / "run"
    assert read_run(folder).loss == SegmentationLoss(
        name="cross_entropy+dice", ignore_index=255, class_weights=(1, 2, 2), options={"smooth": 1}
    )
    assert "<h2>Scores of each class</h2>" in (folder / "report.html").read_text()

    status, out, _ = run("evaluate", TRUST, folder)
    lines = out.splitlines()
    assert (status, lines[0].startswith("mean IoU ")) == (0, True)
    assert [line.split(":")[0] for line in lines[1:]] == ["  0", "  1", "  2"]
    status, out, _ = run("evaluate", TRUST, folder, "--json", "--split=val")
    found = json.loads(out)
    assert found["mean_iou"] == pytest.approx(load_run(folder, trust=[FACTORY]).validation_score)
    assert (found["num_images"], len(found["iou"]), len(found["dice"])) == (2, 3, 3)

    maps = workplace / "maps"
    command = ("predict", TRUST, folder, workplace / "images", f"--output={maps}")
    status, out, err = run(*command, "--json")
    assert (status, err) == (0, "")
    written = [Path(json.loads(line)["map"]) for line in out.splitlines()]
    assert written == [maps / f"{seed}.zarr" for seed in range(8)]
    classes = open_image(written[0]).read(Region.whole((72, 64)))[0].numpy()
    _, mask = draw_pair(0)
    assert float((classes == mask)[2:].mean()) > 0.8
    status, _, err = run(*command)
    assert (status, "there is something already; give another --output, or --overwrite" in err) == (1, True)
    status, out, _ = run(*command, "--overwrite", "--format=tif", "--map=softmax")
    assert (status, out.splitlines()[0]) == (0, f"{workplace / 'images' / '0.tif'}: {maps / '0.tif'}")
    assert tifffile.imread(maps / "0.tif").shape == (72, 64, 3)


def test_the_plan_of_a_segmentation_never_has_the_map_of_scores_whole(workplace: Path, run: Run) -> None:
    options = [FACTORY, "--size=20000", "--channels=1", "--budget=100MiB"]
    status, _, err = run("plan", *options)
    assert status == 1
    assert "stream it with model.streamed_loss, as --task segmentation does. Or: raise budget=" in err
    status, out, err = run("plan", *options, "--task=segmentation", "--loss=cross_entropy+dice")
    assert (status, err) == (0, "")
    assert "\nfits in 100 MiB with tiles of " in out


def test_the_plan_of_a_segmentation_of_an_image_is_that_of_training(workplace: Path, run: Run) -> None:
    image = f"--image={workplace / 'images' / '0.tif'}"
    assert run("plan", FACTORY, image, "--tile=40", "--task=segmentation")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss=dice"], "--loss: is of a segmentation: add --task segmentation"),
        (["--task=segmentation", "--loss=focal"], "--loss: loss='focal': allowed are cross_entropy, dice"),
        (["--task=segmentation", "--card"], "--card: plans no losses"),
    ],
)
def test_options_of_a_plan_that_contradict_each_other(
    options: list[str], message: str, workplace: Path, run: Run
) -> None:
    status, _, err = run("plan", FACTORY, "--size=64", *options)
    assert (status, message in err) == (2, True)


def test_masks_may_lie_in_a_folder_with_splits(workplace: Path, run: Run) -> None:
    for seed, split in enumerate(("train", "train", "val", "test")):
        for name in ("images", "masks"):
            place = workplace / "split" / name / split / f"{seed}.tif"
            place.parent.mkdir(parents=True, exist_ok=True)
            (workplace / name / f"{seed}.tif").rename(place)
    masks = workplace / "split" / "masks"
    status, _, err = run(*arguments(workplace, "split/images", masks=masks))
    assert (status, err) == (0, "")
    folder = workplace / "run"
    for options in ((), (f"--data={workplace / 'split' / 'images'}", f"--masks={masks}")):
        status, out, _ = run("evaluate", TRUST, folder, *options, "--json")
        assert (status, json.loads(out)["num_images"]) == (0, 1)
    # A table names its masks itself.
    rest = workplace / "rest.csv"
    rest.write_text("image,mask\nimages/4.tif,masks/4.tif\n")
    status, out, _ = run("evaluate", TRUST, folder, f"--data={rest}", "--split=train", "--json")
    assert (status, json.loads(out)["num_images"]) == (0, 1)
    (workplace / "some.csv").write_text("image\nsplit/images/val/2.tif\nimages/4.tif\n")
    status, out, _ = run("predict", TRUST, folder, workplace / "some.csv", f"--output={workplace / 'maps'}")
    assert status == 0
    assert (workplace / "maps" / "split" / "images" / "val" / "2.zarr").is_dir()
    assert (workplace / "maps" / "images" / "4.zarr").is_dir()


def test_masks_of_background_alone_may_have_no_chunk(workplace: Path, run: Run) -> None:
    """zarr writes none by default, as if they had been lost."""
    rows = (workplace / "scenes.csv").read_text()
    for seed in (0, 2, 3):  # of each split
        zarr.create_array(workplace / f"masks/{seed}.zarr", shape=(72, 64), chunks=(32, 32), dtype="u1")
        rows = rows.replace(f"masks/{seed}.tif", f"masks/{seed}.zarr")
    (workplace / "scenes.csv").write_text(rows)
    status, _, err = run(*arguments(workplace))
    assert (status, "0.zarr has none of its 6 chunks" in err, "empty_masks" in err) == (1, True, True)
    assert not (workplace / "run").exists()
    assert run(*arguments(workplace), "--empty-masks")[::2] == (0, "")
    # The run keeps it.
    status, out, _ = run("evaluate", TRUST, workplace / "run", "--json")
    assert (status, json.loads(out)["num_images"]) == (0, 2)
    values = json.loads((workplace / "run/run.json").read_text())
    assert values.pop("empty_masks") is True
    (workplace / "run/run.json").write_text(json.dumps(values))
    assert run("evaluate", TRUST, workplace / "run")[0] == 1
    assert run("evaluate", TRUST, workplace / "run", "--empty-masks")[0] == 0


def test_maps_are_called_as_their_images_and_lie_in_the_folder(workplace: Path, run: Run) -> None:
    assert run(*arguments(workplace))[0] == 0
    names = ["Schnitt ü+1.tif", "切片.tif", "a.b.tif"]
    for seed, name in enumerate(names):
        (workplace / "images" / f"{seed}.tif").rename(workplace / "images" / name)
    (workplace / "images" / "3.tif").rename(workplace / "elsewhere.tif")
    inside = workplace / "inside"
    inside.mkdir()
    (inside / "table.csv").write_text(f"image\n../elsewhere.tif\n{workplace}/images/4.tif\n")
    maps, given = workplace / "maps", (workplace / "images", inside / "table.csv")
    for place, of in zip((maps / "folder", maps / "table"), given, strict=True):
        assert run("predict", TRUST, workplace / "run", of, f"--output={place}", "--format=tif")[0] == 0
    assert {path.name for path in (maps / "folder").iterdir()} == {
        *names,
        *(f"{k}.tif" for k in (4, 5, 6, 7)),
    }
    found = [path for path in (maps / "table").rglob("*.tif") if path.name in ("elsewhere.tif", "4.tif")]
    assert len(found) == 2
    # So they can be the masks of these images.
    masks = f"--masks={maps / 'folder'}"
    status, out, _ = run(
        "evaluate", TRUST, workplace / "run", f"--data={given[0]}", masks, "--split=train", "--json"
    )
    assert (status, json.loads(out)["mean_iou"]) == (0, 1.0)


def test_masks_of_other_classes_are_named_by_evaluate(workplace: Path, run: Run) -> None:
    one_channel = {"model-option": "classes=1", "loss": "dice"}
    for path in (workplace / "masks").iterdir():
        mask = tifffile.imread(path)
        tifffile.imwrite(path, mask.clip(0, 1) if path.name != "3.tif" else mask)
    rest = workplace / "rest.csv"
    rest.write_text(
        "".join(f"{line}\n" for line in (workplace / "scenes.csv").read_text().split() if "/3" not in line)
    )
    assert run(*arguments(workplace, "rest.csv", **one_channel))[0] == 0
    status, _, err = run("evaluate", TRUST, workplace / "run", f"--data={workplace / 'scenes.csv'}")
    assert (status, "masks hold the classes 2 (mask" in err) == (1, True)


def test_the_same_command_goes_on_and_another_loss_does_not(workplace: Path, run: Run) -> None:
    assert run(*arguments(workplace))[0] == 0
    status, out, _ = run(*arguments(workplace, epochs=2))
    assert (status, "8 updates in 2 epochs" in out) == (0, True)
    status, _, err = run(*arguments(workplace, epochs=2, loss="dice"))
    assert (status, "loss was 'cross_entropy' and is 'dice'" in err) == (1, True)


@pytest.mark.parametrize(
    ("changes", "expected", "message"),
    [
        ({"loss": "hinge"}, 2, "loss='hinge': allowed are cross_entropy, dice, tversky"),
        ({"class-weights": "1,x"}, 2, "--class-weights: cannot read '1,x' as numbers"),
        ({"inputs": "age"}, 2, "allowed for the task classification; a model of maps gets the image"),
        ({"masks": "/somewhere"}, 1, "is a table, whose column mask names the masks"),
        ({"ignore-index": None}, 1, "masks hold the classes 255 (mask "),
        ({"model-option": "classes=2"}, 1, "masks hold the classes 2 (mask "),
        (
            {"validation-split": None, "validation-share": 0.99},
            2,
            "of 4 images leaves 0 to train on and 4 to validate by",
        ),
    ],
)
def test_wrong_usage_leaves_nothing(
    workplace: Path, run: Run, changes: dict[str, Any], expected: int, message: str
) -> None:
    status, _, err = run(*arguments(workplace, **changes))
    assert (status, message in err) == (expected, True), err
    assert len(err.splitlines()) == 1
    assert not (workplace / "run").exists()


def test_what_is_of_the_other_task_is_refused(workplace: Path, run: Run) -> None:
    assert run(*arguments(workplace))[0] == 0
    image, folder = workplace / "images" / "0.tif", workplace / "run"
    status, _, err = run("predict", TRUST, folder, image)
    assert (status, "--output: the run is of a segmentation: give the folder" in err) == (2, True)
    status, _, err = run("explain", TRUST, folder, image, f"--out={workplace / 'why'}")
    assert (status, "is of the task segmentation: allowed are classifiers" in err) == (2, True)
    assert not (workplace / "why").exists()


def test_maps_and_masks_are_none_of_a_classifiers(tmp_path: Path, run: Run) -> None:
    from hostile import FACTORY as CLASSIFIER
    from hostile import make_run

    folder = make_run(tmp_path)
    trust = f"--trust={CLASSIFIER}"
    status, _, err = run("predict", trust, folder, tmp_path / "images", "--output=x", "--format=tif")
    assert (status, "--output, --format: the run is of a classifier" in err) == (2, True)
    status, _, err = run("evaluate", trust, folder, "--masks=x")
    assert (status, "masks: allowed for the task segmentation" in err) == (2, True)


def test_numbers_are_read_one_by_one() -> None:
    assert parse_numbers("1,2.5, 0") == (1.0, 2.5, 0.0)
    assert parse_numbers(None) is None
