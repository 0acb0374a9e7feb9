"""Runs that somebody made to do harm: no code of theirs runs, no other file is touched, one clear error."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import FACTORY, change_json, make_run

from streamcnn.errors import DamagedCheckpoint, RunMismatch, StreamError, UntrustedModel
from streamcnn.training import RunConfig, TrainSettings, load_run, make_trainer, read_log
from streamcnn.training.checkpoint_file import load_checkpoint
from streamcnn.training.checkpoints import CheckpointFolder
from streamcnn.training.config import RUN
from streamcnn.training.runs import read_run

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A run that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def load(folder: Path) -> Any:
    return load_run(folder, trust=[FACTORY])


def test_a_run_is_loaded_if_its_factory_is_trusted(folder: Path, run: Run) -> None:
    assert load(folder).classes == ("bright", "dark")
    image = folder.parent / "a.png"
    shutil.copy(next((Path(read_run(folder).data)).rglob("*.png")), image)
    status, out, _ = run("predict", folder, image, "--trust", "other:factory", "--trust", FACTORY)
    assert (status, f"{image}: " in out) == (0, True)
    for command in (("predict", folder, image), ("evaluate", folder, "--trust", "hostile_factories")):
        status, out, err = run(*command)
        assert (status, out) == (1, "")
        assert err == (
            f"streamcnn: error: {folder}/run.json names the factory '{FACTORY}', which is code that would be "
            "run: allowed are timm models and factories that you trust; if this one is yours, add --trust "
            f"'{FACTORY}', in Python trust=['{FACTORY}']\n"
        )


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_run_that_names_code_does_not_run_it(folder: Path, run: Run, command: str) -> None:
    touched = folder.parent / "touched"

    def change(found: Any) -> None:
        found.update(model="os:system", model_options={"command": f"touch {touched}"})

    change_json(folder / RUN, change)
    status, _, err = run(command, folder, *([folder] if command == "predict" else []))
    assert (status, "names the factory 'os:system'" in err, touched.exists()) == (1, True, False)
    with pytest.raises(UntrustedModel):
        load_run(folder)


def test_options_that_name_files_and_addresses_are_not_heeded(
    made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    seen: list[dict[str, Any]] = []

    def create(name: str, **kwargs: Any) -> Any:
        seen.append(kwargs)
        raise RuntimeError("seen")

    monkeypatch.setattr(timm, "create_model", create)

    def change(found: Any) -> None:
        found.update(
            model="resnet18",
            model_options={
                "pretrained": True,
                "checkpoint_path": "/tmp/evil.pt",
                "pretrained_cfg": {"file": "/tmp/evil.pt"},
                "pretrained_cfg_overlay": {"url": "http://evil"},
                "cache_dir": "/tmp",
                "drop_rate": 0.5,
            },
        )

    change_json(folder / RUN, change)
    with pytest.raises(RunMismatch, match=r"run\.json: resnet18 cannot be made with .*RuntimeError: seen"):
        load_run(folder)
    assert seen == [{"num_classes": 2, "in_chans": 3, "drop_rate": 0.5}]


def test_a_timm_model_of_any_size_is_compared_before_memory_is_taken(folder: Path) -> None:
    pytest.importorskip("timm")
    change_json(folder / RUN, lambda found: found.update(model="resnet18", num_classes=10**9))
    with pytest.raises(
        DamagedCheckpoint, match=r"is of another model than the run's: 0.bias is \[4\] there and missing in"
    ):
        load_run(folder)


def test_a_factory_s_model_of_any_size_is_compared_before_memory_is_taken(folder: Path) -> None:
    change_json(folder / RUN, lambda found: found.update(model_options={"width": 10**12}))
    with pytest.raises(
        DamagedCheckpoint, match=r"of another model than the run's: 0.bias is \[4\] there and"
    ):
        load(folder)


def test_a_factory_that_looks_at_its_weights_is_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hostile_factories

    plain = hostile_factories.small

    def looking() -> torch.nn.Module:
        net = plain()
        assert net[0].weight.abs().sum().item() >= 0  # fails where there are no numbers
        return net

    monkeypatch.setattr(hostile_factories, "small", looking)
    assert load(folder).classes == ("bright", "dark")


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else 1


CRAFTED: list[tuple[dict[str, Any], str]] = [
    ({"model": 3}, "model is 3: allowed is a valid string"),
    ({"model_options": [1]}, r"model_options is \[1\]: allowed is an object"),
    ({"model_options": {"a": 1}}, r"cannot be called with a=1"),
    ({"model_options": nested(50)}, "model_options is nested more than 32 times"),
    ({"data": None}, "data is None: allowed is a valid string"),
    ({"inputs": "ab"}, "inputs is 'ab': allowed is a valid array"),
    ({"inputs": ["image"]}, r"inputs=\('image',\): allowed are names of columns"),
    ({"validation_share": "x"}, "validation_share is 'x': allowed is a valid number"),
    ({"validation_share": 2}, "validation_share=2.0: allowed are shares between 0 and 1"),
    ({"budget": "1GB"}, "budget is '1GB': allowed is a valid integer"),
    ({"budget": -1}, "budget=-1: allowed are 1 byte and more"),
    ({"budget": True}, "budget is True: allowed is a valid integer"),
    ({"tile": [1, 2, 3]}, r"tile is \[1, 2, 3\]: allowed is|tile"),
    ({"tile": [0, 4]}, r"tile=\(0, 4\): allowed are heights and widths of 1 pixel and more"),
    ({"tile": "ab"}, "tile is 'ab': allowed is a valid array"),
    ({"device": "tpu!"}, "device='tpu!': allowed are cpu and cuda"),
    ({"normalise": {"mean": 0, "std": 0}}, "normalise: std=0.0: allowed are positive numbers"),
    ({"normalise": None}, "normalise is None: allowed is an object"),
    ({"augmentation": {"gains": [1]}}, "augmentation.gains"),
    ({"settings": {"epochs": "3"}}, "settings.epochs is '3': allowed is a valid integer"),
    ({"settings": {"epochs": 1.5}}, "settings.epochs is 1.5: allowed is a valid integer"),
    ({"settings": {"learning_rat": 1}}, "settings.learning_rat is not known here: leave it out"),
    ({"settings": {"optimizer": "Optimizer"}}, "settings: optimizer='Optimizer': allowed are ASGD"),
    ({"settings": {"optimizer_options": {"betas": 3}}}, "settings: optimizer='Adam' with optimizer_options"),
    ({"settings": {"seed": 10**30}}, "settings: seed=10{30}: allowed are"),
    ({"settings": 3}, "settings is 3: allowed is an object"),
    ({"num_classes": 0}, "num_classes=0: allowed are 1 and more"),
    ({"num_classes": None}, "num_classes is None: allowed is a valid integer"),
    ({"num_channels": "3"}, "num_channels is '3': allowed is a valid integer"),
    ({"classes": "ab"}, "classes is 'ab': allowed is a valid array"),
    ({"classes": [1, 2]}, "classes.0 is 1: allowed is a valid string"),
    ({"classes": ["a", "b", "c"]}, "classes: 3 names for num_classes=2"),
]


@pytest.mark.parametrize(("values", "text"), CRAFTED)
def test_a_crafted_run_file_is_one_clear_error(folder: Path, values: dict[str, Any], text: str) -> None:
    change_json(folder / RUN, lambda found: found.update(values))
    with pytest.raises(RunMismatch, match=rf"run\.json: .*{text}"):
        load(folder)


@pytest.mark.parametrize("field", ["model", "data", "num_classes", "num_channels", "classes"])
def test_a_missing_field_is_named(folder: Path, field: str) -> None:
    change_json(folder / RUN, lambda found: found.pop(field))
    with pytest.raises(RunMismatch, match=rf"run\.json: {field} is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"model": "a", "model": "b"}', "the key 'model' comes twice"),
        (b'{"validation_share": NaN}', "NaN is no finite number"),
        (b'{"validation_share": 1e999}', "1e999 is no finite number"),
        (b'{"budget": ' + b"9" * 5000 + b"}", "is no valid JSON"),
        (b'{"model": "\xff"}', "is no valid JSON"),
        (b"[]", "holds a list: allowed is an object"),
        (b" " * (2**24 + 1), "has 16777217 bytes: allowed are 16777216 at most"),
    ],
)
def test_json_that_is_none_is_one_clear_error(folder: Path, content: bytes, text: str) -> None:
    (folder / RUN).write_bytes(content)
    with pytest.raises(RunMismatch, match=re.escape(text)):
        load(folder)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(folder: Path) -> None:
    (folder / RUN).unlink()
    os.mkfifo(folder / RUN)
    with pytest.raises(RunMismatch, match=r"run\.json is no regular file"):
        load(folder)


# --- checkpoints -----------------------------------------------------------------------------------------


def rewrite(path: Path, content: bytes) -> None:
    """Another content with its digest: whoever can write the one can write the other."""
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")


class _Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def best(folder: Path) -> Path:
    path = CheckpointFolder(folder / "checkpoints").best()
    assert path is not None
    return path


def test_a_checkpoint_that_names_code_does_not_run_it(folder: Path) -> None:
    evil = _Evil(f"touch {folder / 'touched'}")
    for content in (saved({"model": evil}), pickle.dumps(evil)):
        rewrite(best(folder), content)
        with pytest.raises(DamagedCheckpoint, match="is no checkpoint"):
            load(folder)
    assert not (folder / "touched").exists()


def test_an_archive_that_unpacks_to_more_is_refused(folder: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**20))
    rewrite(best(folder), file.getvalue())
    with pytest.raises(DamagedCheckpoint, match="holds packed or overlapping entries"):
        load(folder)


UNCHECKED: dict[str, Any] = {"check_invariants": False}
# From 2.14 on PyTorch looks at the indices itself.
SPARSE = "torch.sparse_coo .*: allowed are dense tensors|size is inconsistent with indices"
STATES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda s: s.pop("progress"), "progress is missing"),
    (lambda s: s["progress"].pop("update"), "progress.update is missing"),
    (lambda s: s["progress"].pop("best_score"), "progress.best_score is missing"),
    (
        lambda s: s["model"].update({"0.bias": torch.sparse_coo_tensor([[10**9]], [1.0], (4,), **UNCHECKED)}),
        SPARSE,
    ),
    (
        lambda s: s["model"].update({"0.bias": torch.zeros(4, device="meta")}),
        "holds a tensor of layout torch.strided .* on meta: allowed are dense tensors",
    ),
    (
        lambda s: s["optimizer"].update(a=[{1: (torch.sparse_coo_tensor([[9]], [1.0], (4,), **UNCHECKED),)}]),
        SPARSE,
    ),
    (lambda s: s.update(progress=3), "progress is 3: allowed is an object"),
    (lambda s: s["progress"].update(update="x"), "progress.update is 'x': allowed is a valid integer"),
    (lambda s: s["progress"].update(update=-1), "progress: update=-1: allowed are 0 and more"),
    (lambda s: s["progress"].update(best="../../x"), "progress: best='../../x': allowed are names of"),
    (lambda s: s["progress"].update(best_score=float("nan")), "progress: best_score=nan: allowed are"),
    (lambda s: s.update(format="x"), "format is 'x': allowed is a valid integer"),
    (lambda s: s.update(model=[]), "model is a list: allowed is a dict"),
    (lambda s: s["model"].update({"0.weight": 3}), "model.0.weight is a int: allowed is a tensor"),
    (lambda s: s["model"].pop("0.weight"), r"of another model than the run's: 0.weight is missing"),
    (
        lambda s: s["model"].update({"0.weight": torch.zeros(1)}),
        r"0.weight is \[1\] there and \[4, 3, 3, 3\] in the model",
    ),
    (lambda s: s.update(log_bytes=None), "log_bytes is None: allowed is a valid integer"),
    (lambda s: s["sampler"].update(position=99), "sampler: position=99: allowed are 0 to length=2"),
    (lambda s: s.update(identity=torch.zeros(1)), "holds what JSON has not"),
    (lambda s: s.update(random=None), "random is a NoneType: allowed is a dict"),
]


@pytest.mark.parametrize(("change", "text"), STATES)
def test_a_crafted_checkpoint_is_one_clear_error(
    folder: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    state = load_checkpoint(best(folder))
    change(state)
    rewrite(best(folder), saved(state))
    with pytest.raises(DamagedCheckpoint, match=text):
        load(folder)


@pytest.mark.parametrize("content", [saved([1]), saved({1: 2}), b"", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_state_is_one_clear_error(folder: Path, content: bytes) -> None:
    rewrite(best(folder), content)
    with pytest.raises(DamagedCheckpoint, match=r"save-.*(is no checkpoint|holds a)"):
        load(folder)


def config_of(folder: Path) -> RunConfig:
    config = read_run(folder)
    settings = config.settings.to_dict()
    return RunConfig(
        model=config.model,
        data=config.data,
        validation_split="val",
        tile=config.tile,
        settings=TrainSettings(**{**settings, "epochs": 2}),
    )


def test_states_that_pytorch_does_not_take_are_one_clear_error(folder: Path) -> None:
    checkpoints = CheckpointFolder(folder / "checkpoints")
    for change in (
        lambda s: s["random"].update(python=(3, (1, 2), None)),
        lambda s: s["optimizer"].pop("param_groups"),
        lambda s: s["random"].pop("torch"),
        # What loading does not look at.
        lambda s: s["optimizer"]["param_groups"][0].pop("betas"),
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(2)),
        lambda s: s["optimizer"]["param_groups"][0].update(capturable=True),
    ):
        state = load_checkpoint(best(folder))
        change(state)
        checkpoints.save(state, 1)
        with pytest.raises(DamagedCheckpoint, match="holds states that cannot be resumed from"):
            make_trainer(config_of(folder), folder).run()


@pytest.mark.parametrize("name", ["checkpoint", "digest", "best.txt", "log.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_no_part_of_a_run(folder: Path, name: str, kind: str) -> None:
    places = {"checkpoint": best(folder), "digest": best(folder).with_name(f"{best(folder).name}.sha256")}
    places |= {"best.txt": folder / "checkpoints/best.txt", "log.jsonl": folder / "log.jsonl"}
    path = places[name]
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    text = rf"{path.name}( leads to /dev/zero| is no regular file)"
    if name == "log.jsonl":
        with pytest.raises(RunMismatch, match=text):
            read_log(folder)
        with pytest.raises(RunMismatch, match=text):
            make_trainer(config_of(folder), folder).run()
    else:
        with pytest.raises(DamagedCheckpoint, match=text):
            load(folder)


# --- links -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../../x", "/etc/passwd", "a\0b", "save-1-update-1.pt/../../x", ""])
def test_a_marker_that_names_another_file_is_refused(folder: Path, name: str) -> None:
    (folder / "checkpoints" / "best.txt").write_text(name)
    with pytest.raises(DamagedCheckpoint, match=r"best\.txt names .*: allowed are checkpoints beside it"):
        load(folder)


@pytest.mark.parametrize("name", ["log.jsonl", "checkpoints", "events"])
def test_links_out_of_a_run_are_not_written_through(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if name == "log.jsonl":
        outside.write_text("precious " * 1000)
    else:
        outside.mkdir()
        (outside / "precious").write_text("")
    place = folder / name
    shutil.rmtree(place, ignore_errors=True)
    place.unlink(missing_ok=True)
    place.symlink_to(outside)
    with pytest.raises(RunMismatch, match=rf"{name} leads to .*outside: allowed are files and links inside"):
        make_trainer(config_of(folder), folder).run()
    if name == "log.jsonl":
        assert outside.read_text() == "precious " * 1000
    else:
        assert [path.name for path in outside.iterdir()] == ["precious"]


def test_links_in_the_place_of_temporary_files_are_replaced(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    checkpoints = CheckpointFolder(folder / "checkpoints")
    name = checkpoints.next_name(7)
    (folder / "checkpoints" / f"{name}.partial").symlink_to(outside)
    (folder / "checkpoints" / f".{name}.sha256.partial").symlink_to(outside)
    assert checkpoints.save({"a": 1}, 7).name == name
    assert outside.read_text() == "precious"
    assert load_checkpoint(folder / "checkpoints" / name) == {"a": 1}


@pytest.mark.parametrize("name", ["run.json", "checkpoints/best.txt", "log.jsonl"])
def test_links_out_of_a_run_are_not_read(folder: Path, tmp_path: Path, name: str) -> None:
    moved = shutil.move(folder / name, tmp_path / "outside")
    (folder / name).symlink_to(moved)
    with pytest.raises(StreamError, match="outside: allowed are files and links inside"):
        read_log(folder) if name == "log.jsonl" else load(folder)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"{}", "line 1 is no update and no epoch"),
        (b"[]", "line 1 is no update and no epoch"),
        (b'{"kind": ["update"]}', "line 1 is no update and no epoch"),
        (b'{"kind": {}}', "line 1 is no update and no epoch"),
        (b'{"kind": "epoch", "epoch": 0}', "line 1: loss is missing"),
        (b'{"kind": "update", "update": "x"}', "line 1: update is 'x': allowed is a valid integer"),
        (b"\xff", "line 1 is no valid JSON"),
    ],
)
def test_a_crafted_log_is_one_clear_error(folder: Path, line: bytes, text: str) -> None:
    (folder / "log.jsonl").write_bytes(line + b"\n")
    with pytest.raises(RunMismatch, match=text):
        read_log(folder)


def test_predictions_of_classes_without_number_are_refused(folder: Path) -> None:
    line = '{"kind": "epoch", "epoch": 0, "loss": 1, "accuracy": 1, "validation_loss": NaN, '
    line += '"validation_accuracy": 1, "predictions": [1000000000]}\n'
    (folder / "log.jsonl").write_text(line)
    with pytest.raises(RunMismatch, match="line 1: predictions have 1000000000: allowed are 0 to 65535"):
        read_log(folder)
