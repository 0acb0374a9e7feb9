"""Text of files, paths and options on its way to a terminal or a page: nothing acts on it."""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from hostile import make_run
from profiles import PROFILES, REFUSED, SHAPE, made
from rich.console import Console
from typer.testing import CliRunner

from streamcnn.cli import command_line, models, overfitting, profiling, verifying
from streamcnn.cli.overfitting import DemoSettings, run_demo
from streamcnn.data.sources import ZarrSource
from streamcnn.profiling.figures import write_figures
from streamcnn.profiling.page import render_page
from streamcnn.runtime.obstacles import Obstacle
from streamcnn.support.html import html_page
from streamcnn.support.text import as_text, html_text
from streamcnn.training.checkpoints import CheckpointFolder

Run = Callable[..., tuple[int, str, str]]

EVIL = "a[/bold]\x1b[31m\u202eb"
SHOWN = r"a[/bold]\x1b[31m\u202eb"


def assert_harmless(text: str) -> None:
    """What was given is there, as it is written and with nothing that a terminal acts on."""
    assert SHOWN in text
    assert not re.search("[\x1b\u202e]", text)


def shown(show: Callable[[Console], object]) -> str:
    """What a terminal of rich is told, without colours of its own."""
    out = io.StringIO()
    show(Console(file=out, width=1000, force_terminal=True, color_system=None))
    return out.getvalue()


def test_text_for_rich_is_no_markup() -> None:
    assert_harmless(shown(lambda console: console.print(as_text(EVIL))))
    assert str(as_text("a\nb")) == "a\nb"


def test_the_demo_shows_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        """Stands for the streamed model, of which nothing is asked but what the demo prints."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def plan(self, shape: tuple[int, ...]) -> Any:
            return SimpleNamespace(tile=(9, 9), plain_bytes=1, explain=lambda: f"plan {EVIL}")

    monkeypatch.setattr(overfitting, "StreamingModel", Model)
    monkeypatch.setattr(overfitting, "train", lambda *_: ((1.0,), None))
    monkeypatch.setattr(overfitting, "predict", lambda model, images: (0,))
    settings = DemoSettings(size=64, num_images=1, epochs=1, output=tmp_path / EVIL)
    text = shown(lambda console: run_demo(settings, console))
    assert_harmless(text)
    for line in (f"pixels in {tmp_path / SHOWN}", f"plan {SHOWN}", f"figure: {tmp_path / SHOWN}"):
        assert line in text


def test_ultramnist_shows_any_folder(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamcnn.data import ultramnist

    load = ultramnist.load_digits

    def with_note(source: str | None) -> Any:
        import dataclasses

        return dataclasses.replace(load("uci"), notes=(f"note {EVIL}",))

    monkeypatch.setattr(ultramnist, "load_digits", with_note)
    store = tmp_path / EVIL
    status, out, _ = run("ultramnist", "generate", store, "--train", 1, "--test", 0, "--size", 64)
    assert status == 0
    assert_harmless(out)
    assert f"note {SHOWN}\n" in out
    assert f"{tmp_path / SHOWN}: 1 training and 0 test images" in out
    picture = tmp_path / EVIL / "p.png"
    status, out, _ = run("ultramnist", "preview", store, "--output", picture, "--edge", 32)
    assert (status, out) == (0, f"{tmp_path / SHOWN}/p.png: 1 image of split train\n")


def test_train_and_predict_show_any_folder(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / EVIL
    folder.mkdir(parents=True)
    made_run = make_run(folder)
    data, trust = folder / "images", ("--trust", "hostile_factories:small")
    options = ("--out", folder / "other", "--epochs", 1, "--validation-split", "val")
    for arguments in (
        ("predict", made_run, data / "val/dark/a.png", *trust),
        ("predict", made_run, data / "val/dark/b.png", *trust),
        ("train", "hostile_factories:small", data, *options),
        ("info", data / "val/dark/b.png"),
        ("convert", data / "val/dark", folder / "\x1b.txt" / "store", "--labels", folder / "none.csv"),
    ):
        _, out, err = run(*arguments)
        assert_harmless(out + err)


def test_a_profile_s_table_shows_any_verdict() -> None:
    refused = made(512, **{**REFUSED, "refusal": EVIL})
    text = shown(lambda console: console.print(profiling.profile_table([refused])))
    assert "[/bold]" in text or "no" in text
    assert not re.search("[\x1b\u202e]", text)
    assert not re.search("[\x1b\u202e]", shown(lambda c: c.print(as_text(profiling.profile_line(refused)))))


def test_a_profile_s_page_and_figures_show_any_model(tmp_path: Path) -> None:
    name = f"<script>$\\frac{{{EVIL}"
    page = render_page([*PROFILES, made(64, explanation=name)], name, SHAPE)
    assert_harmless(page)
    assert page.count("<script") == render_page(PROFILES, "resnet18", SHAPE).count("<script")
    assert page.count("&lt;script&gt;$\\frac{a[/bold]") >= 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fonts without such characters
        write_figures(PROFILES, "$\\frac{", tmp_path)


def test_a_page_s_title_is_text() -> None:
    page = html_page(f"</title>{EVIL}", "", "")
    assert f"<title>&lt;/title&gt;{SHOWN}</title>" in page
    assert html_text("\"'") == "&quot;&#x27;"


def test_a_plan_is_shown_as_text(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    import streamcnn

    explained = SimpleNamespace(explain=lambda: f"one\n{EVIL}", validate=lambda: None)
    streamed = SimpleNamespace(plan=lambda shape: explained)
    monkeypatch.setattr(models, "load", lambda *_, **__: None)
    monkeypatch.setattr(streamcnn, "StreamingModel", lambda *_, **__: streamed)
    status, out, _ = run("plan", "any")
    assert (status, out) == (0, f"one\n{SHOWN}\n")


def test_obstacles_are_shown_as_text() -> None:
    stopped = Obstacle("aten.any", EVIL, "write another", EVIL, EVIL, 1, 8)
    assert_harmless(shown(lambda c: c.print(verifying._table((stopped,)))))


def test_a_warning_of_an_image_is_text(tmp_path: Path) -> None:
    path = tmp_path / EVIL
    array = zarr.create_array(path, shape=(3, 1200, 1300), chunks=(3, 1200, 1300), dtype="u1")
    array[:] = 1
    with pytest.warns(UserWarning, match="chunks of 4680000 bytes") as caught:
        ZarrSource(path, cache_bytes=1000)
    assert_harmless(str(caught[0].message))


def test_a_warning_of_a_checkpoint_is_text(tmp_path: Path) -> None:
    folder = tmp_path / EVIL
    folder.mkdir(parents=True)
    checkpoints = CheckpointFolder(folder / "checkpoints")
    checkpoints.save({"a": 1}, 1)
    checkpoints.save({"a": 2}, 2).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="going on from save-000001") as caught:
        assert checkpoints.newest() == {"a": 1}
    assert_harmless(str(caught[0].message))


def test_what_libraries_log_of_a_file_is_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tifffile's warnings go to standard error where nothing handles them."""
    import logging

    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((9, 9), np.uint8), tile=(16, 16))
    monkeypatch.setattr(command_line, "app", lambda: print("run", file=sys.stderr))
    assert logging.lastResort is not None
    monkeypatch.setattr(logging.lastResort, "formatter", None)
    with pytest.raises(SystemExit):
        command_line.run()
    record = logging.LogRecord("tifffile", logging.WARNING, "", 0, f"{EVIL}\n%s", ("\x07",), None)
    logging.lastResort.handle(record)
    assert capsys.readouterr().err == f"run\n{SHOWN}\n\\x07\n"


@pytest.mark.parametrize(
    "arguments",
    [[EVIL], ["info", "a", EVIL], ["info", f"--{EVIL}"], ["demo", "--size", EVIL], ["plan", EVIL]],
    ids=json.dumps,
)
def test_wrong_usage_is_text(arguments: list[str]) -> None:
    result = CliRunner().invoke(command_line.app, arguments)
    assert result.exit_code == 2
    assert "\x1b" not in result.output
