"""Names of a segmentation's classes: what they may be, where they are kept, and where they are shown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tifffile
import torch
import zarr
from hostile import change_json, make_run
from segmentation_runs import FACTORY, IGNORED, a_config, draw_pair, importable_place

from streamcnn.data.mask_dataset import MaskDataset
from streamcnn.errors import DatasetMismatch, RunMismatch
from streamcnn.metrics import SegmentationScore
from streamcnn.training import Segmentation, SegmentationLoss, load_run, make_trainer, write_report
from streamcnn.training.checkpoints import CheckpointFolder
from streamcnn.training.class_names import class_label, class_lines
from streamcnn.training.config import RUN
from streamcnn.training.report import render_report
from streamcnn.training.runs import read_run

Run = Callable[..., tuple[int, str, str]]
TRUST = f"--trust={FACTORY}"
NAMES = ("ground", "bright", "very bright")
EVIL = ("ground", "<script>[bold]a[/bold]</script>\x1b[31m\u202e\n\"'&", "ein Drüsengewebe 腺")
LOSS = SegmentationLoss(ignore_index=IGNORED)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return importable_place(tmp_path_factory.mktemp("named"))


def named(place: Path, out: Path, names: str | None = ",".join(NAMES), *options: str) -> list[str]:
    """The command that trains for an epoch, unless the options say otherwise."""
    settings = ("--ignore-index=255", "--validation-split=val", "--epochs=1", "--tile=40")
    given = () if names is None else (f"--class-names={names}",)
    data = str(place / "scenes.csv")
    return ["train", FACTORY, data, f"--out={out}", "--task=segmentation", *settings, *given, *options]


@pytest.fixture(scope="module")
def made(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of an epoch, one of which has names."""
    found = {}
    for what, names in (("named", NAMES), ("numbered", None)):
        found[what] = tmp_path_factory.mktemp(what)
        config = a_config(place / "scenes.csv", loss=LOSS, class_names=names, settings={"epochs": 1})
        make_trainer(config, found[what]).run()
        write_report(found[what])
    return found


# --- what they may be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ((), r"class_names=\(\): allowed is a name for each class; name all classes from 0 on, or leave"),
        (("a", " ", "c"), "class_names: class 1 is called ' ': allowed is text in UTF-8 that is not blank"),
        (("a", "b", "a"), "the classes 0 and 2 are both called 'a': allowed are names of which no two are"),
        (("a", "b\udcff"), r"class 1 is called 'b\\udcff': allowed is text in UTF-8"),
        (("a", 1), "class 1 is called 1: allowed is text in UTF-8"),
    ],
)
def test_names_that_are_none_are_refused(names: Any, text: str) -> None:
    for make in (lambda: Segmentation(names=names), lambda: a_config(Path("/data"), class_names=names)):
        with pytest.raises(ValueError, match=text):
            make()


@pytest.mark.parametrize(
    ("names", "status", "text"),
    [
        ("", 2, "class_names=(): allowed is a name for each class"),
        ("a,,c", 2, "class_names: class 1 is called '': allowed is text"),
        ("a,b, a", 2, "the classes 0 and 2 are both called 'a'"),
        (
            "a,b",
            1,
            "there are 2 class_names ('a', 'b'), and the model tells 3 classes apart: allowed is one for "
            "each; name all classes from 0 on, or leave class_names out; on the command line a comma ends a "
            "name",
        ),
        ("skin, fat,muscle,bone", 1, "there are 4 class_names ('skin', 'fat', 'muscle', 'bone'), and the"),
    ],
)
def test_wrong_names_are_one_error_and_nothing_is_written(
    place: Path, tmp_path: Path, run: Run, names: str, status: int, text: str
) -> None:
    found, out, err = run(*named(place, tmp_path / "run", names))
    assert (found, out, text in err) == (status, "", True), err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_classifiers_classes_are_called_as_they_are(tmp_path: Path, run: Run) -> None:
    make_run(tmp_path)
    options = (f"--out={tmp_path / 'other'}", "--validation-split=val", "--class-names=a,b")
    status, _, err = run("train", "hostile_factories:small", tmp_path / "images", *options)
    assert status == 2
    assert "class_names: allowed for the task segmentation, and this is classification: take that" in err
    assert "or leave them out; a classifier's classes are called as its folders or the labels in its" in err
    assert not (tmp_path / "other").exists()


def test_one_channel_has_two_names(place: Path, tmp_path: Path) -> None:
    for seed in range(2):
        image, mask = draw_pair(seed)
        for name, pixels in (("images", image), ("masks", (mask == 1).astype("uint8"))):
            (tmp_path / name).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / name / f"{seed}.tif", pixels)
    changes: dict[str, Any] = {
        "masks": str(tmp_path / "masks"),
        "model_options": {"classes": 1},
        "validation_split": None,
        "validation_share": 0.5,
        "settings": {"epochs": 1},
    }
    with pytest.raises(DatasetMismatch, match=r"are 1 class_names \('a'\), and the model tells 2 classes"):
        make_trainer(a_config(tmp_path / "images", class_names=("a",), **changes), tmp_path / "run").run()
    make_trainer(a_config(tmp_path / "images", class_names=("a", "b"), **changes), tmp_path / "run").run()
    assert load_run(tmp_path / "run", trust=[FACTORY]).classes == ("a", "b")


# --- where they are kept ------------------------------------------------------------------------------


def test_a_run_keeps_its_names(made: dict[str, Path]) -> None:
    for what, names in (("named", NAMES), ("numbered", None)):
        assert read_run(made[what]).class_names == names
        assert load_run(made[what], trust=[FACTORY]).classes == names


def test_a_run_goes_on_with_its_names_or_with_none_given(place: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "run"
    assert run(*named(place, folder))[0] == 0
    for epochs, names in ((2, None), (3, " ground,bright, very bright")):
        status, out, err = run(*named(place, folder, names, f"--epochs={epochs}"))
        assert (status, err) == (0, "")
        assert f" updates in {epochs} epochs" in out
        assert "\n  2 very bright: IoU " in out
        assert load_run(folder, trust=[FACTORY]).classes == NAMES
    status, _, err = run(*named(place, folder, "ground,dark,very bright", "--epochs=4"))
    assert status == 1
    assert "was ['ground', 'bright', 'very bright'] and is ['ground', 'dark', 'very bright']. Go on" in err
    assert load_run(folder, trust=[FACTORY]).classes == NAMES


def test_a_run_without_names_goes_on_without(
    place: Path, tmp_path: Path, made: dict[str, Path], run: Run
) -> None:
    """As runs from before there were names."""
    folder = Path(shutil.copytree(made["numbered"], tmp_path / "run"))
    change_json(folder / RUN, lambda found: found.pop("class_names"))
    checkpoints = CheckpointFolder(folder / "checkpoints")
    state = checkpoints.newest()
    assert state is not None
    assert state["identity"].pop("class_names") is None
    checkpoints.save(state, state["progress"]["update"])
    assert read_run(folder).class_names is None
    config = a_config(place / "scenes.csv", loss=LOSS, settings={"epochs": 2})
    assert make_trainer(config, folder).run().num_epochs == 2
    with pytest.raises(RunMismatch, match=r"class_names was None and is \['a', 'b', 'c'\]"):
        make_trainer(a_config(place / "scenes.csv", loss=LOSS, class_names=("a", "b", "c")), folder).run()


def test_names_that_someone_has_changed_are_one_error(
    place: Path, tmp_path: Path, made: dict[str, Path]
) -> None:
    folder = Path(shutil.copytree(made["named"], tmp_path / "run"))
    config = a_config(place / "scenes.csv", loss=LOSS, settings={"epochs": 2})
    for names, text in (
        (["a", "a", "b"], r"run\.json: .*the classes 0 and 1 are both called 'a'"),
        (["a", 1, []], r"run\.json: .*class_names"),
        (["a", "\udcff", "b"], r"run\.json"),
    ):
        change_json(folder / RUN, lambda found, names=names: found.update(class_names=names))
        for use in (lambda: load_run(folder, trust=[FACTORY]), lambda: make_trainer(config, folder)):
            with pytest.raises(RunMismatch, match=text):
                use()
    # Names that are none at all are those of no run that can go on.
    change_json(folder / RUN, lambda found: found.update(class_names={"a": 1}))
    with pytest.raises(RunMismatch, match=r"class_names was \['ground', .* and is None"):
        make_trainer(config, folder).run()


# --- where they are shown -----------------------------------------------------------------------------


def test_scores_have_names_where_there_are_some() -> None:
    score = SegmentationScore(torch.tensor([[3, 0, 1], [4, 0, 2], [4, 0, 3]]))
    assert class_lines(score, None) == ["  0: IoU 60.0%, Dice 75.0%", "  2: IoU 25.0%, Dice 40.0%"]
    lines = class_lines(score, EVIL)
    assert [line.split(":")[0] for line in lines] == ["  0 ground", "  2 ein Drüsengewebe 腺"]
    # Fewer than classes, in a file that someone has changed.
    assert class_label(1, ("ground",)) == "1"
    (line,) = class_lines(SegmentationScore(torch.tensor([[0, 1], [0, 1], [0, 1]])), EVIL)
    assert line == r"""  1 <script>[bold]a[/bold]</script>\x1b[31m\u202e\n"'&: IoU 100.0%, Dice 100.0%"""


def test_commands_show_names(place: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "run"
    status, out, _ = run(*named(place, folder, ",".join(EVIL)))
    assert status == 0
    assert r"""1 <script>[bold]a[/bold]</script>\x1b[31m\u202e\n"'&: IoU """ in out
    assert not re.search("[\x1b\u202e]", out)
    trained = [line for line in out.splitlines() if line.startswith("  ")]
    status, out, _ = run("evaluate", TRUST, folder, "--split=val")
    assert (status, out.splitlines()[1:]) == (0, trained)
    assert out.splitlines()[1].startswith("  0 ground: IoU ")
    status, out, _ = run("evaluate", TRUST, folder, "--json")
    found = json.loads(out)
    assert found["class_names"] == [EVIL[0], EVIL[1], EVIL[2]]
    assert len(found["iou"]) == 3


@pytest.mark.parametrize(("what", "names"), [("named", list(NAMES)), ("numbered", None)])
def test_maps_have_names(
    place: Path, tmp_path: Path, made: dict[str, Path], run: Run, what: str, names: list[str] | None
) -> None:
    maps = tmp_path / "maps"
    status, out, _ = run("evaluate", TRUST, made[what], "--json")
    assert json.loads(out)["class_names"] == names
    command = ("predict", TRUST, made[what], place / "images" / "0.tif", f"--output={maps}", "--json")
    for options in ((), ("--map=softmax", "--overwrite"), ("--format=tif",)):
        status, out, _ = run(*command, *options)
        found = json.loads(out)
        assert (status, found["class_names"], set(found)) == (0, names, {"image", "map", "class_names"})
        if "--format=tif" in options:
            continue
        attributes = dict(zarr.open_group(found["map"]).attrs)
        assert attributes.get("class_names") == names
        assert set(attributes) == ({"ome", "class_names"} if names else {"ome"})


def test_the_page_shows_names(made: dict[str, Path]) -> None:
    page = (made["named"] / "report.html").read_text()
    assert '<th scope="col" class="name">name</th><th scope="col">IoU</th>' in page
    for label, name in enumerate(NAMES):
        cells = rf'<th scope="row">{label}</th><td>[^/]*(</span>)?</td><td class="name">{name}</td>'
        assert re.search(cells, page)
        assert f" {label} {name}</span>" in page
    # The row of means has as many cells as the others.
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    assert [len(re.findall("<t[dh]", row)) for row in rows] == [6] * 5
    numbered = (made["numbered"] / "report.html").read_text()
    assert not re.search('class="(name|legend)"', numbered)
    assert [len(re.findall("<t[dh]", row)) for row in re.findall(r"<tr>(.*?)</tr>", numbered)] == [5] * 5


def test_any_name_is_text_on_the_page(place: Path) -> None:
    config = a_config(place / "scenes.csv", loss=LOSS, class_names=EVIL)
    update = {"kind": "update", "update": 1, "seconds": 1.0, "megapixels_per_second": 1.0}
    scores = {f"validation_{name}": 0.5 for name in ("loss", "mean_iou", "mean_dice", "accuracy")}
    epoch = {"kind": "epoch", "epoch": 0, "loss": 1.0, **scores, "overlaps": [[3, 1, 1]] * 3, "num_images": 2}
    lines = [{**update, "measured_bytes": None, "projected_bytes": None}, epoch]
    page = render_report(config, lines, MaskDataset(place / "scenes.csv", split="val"))
    shown = r"&lt;script&gt;[bold]a[/bold]&lt;/script&gt;\x1b[31m\u202e" + "\n&quot;&#x27;&amp;<"
    # In the table and by the pictures; among the settings it is as Python writes it.
    assert page.count(shown) == 2
    assert "<script" not in page
    assert not re.search("[\x1b\u202e]", page)
