"""What is shown on a narrow terminal: less, and nothing that is cut."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from profiles import PROFILES
from rich.console import Console
from rich.table import Table

from streamcnn.cli.profiling import print_table
from streamcnn.cli.terminal import fits
from streamcnn.cli.training_progress import TrainingProgress

MIB = 2**20
UPDATE = {"epoch": 3, "loss": 0.1234, "measured_bytes": 500 * MIB, "megapixels_per_second": 0.065}


def terminal(width: int) -> tuple[Console, io.StringIO]:
    """A terminal without colours, and what is written on it."""
    written = io.StringIO()
    return Console(file=written, width=width, force_terminal=True, color_system=None), written


def plain(written: io.StringIO) -> str:
    """What was written without what moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()).replace("\r", "\n")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_profile_is_never_cut(width: int) -> None:
    console, written = terminal(width)
    print_table(PROFILES, console)
    text = plain(written)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert ("tile 128: fits" in text) == (width == 60)  # lines where a table has no room
    for word in ("recomputation", "does not fit", "not run", "80.0 MiB"):
        assert word in " ".join(text.split())


def progress_line(width: int) -> str:
    """What a training run shows after an update."""
    console, written = terminal(width)
    trainer: Any = SimpleNamespace(
        settings=SimpleNamespace(epochs=10), updates_per_epoch=12345, progress=SimpleNamespace(update=4321)
    )
    with TrainingProgress(trainer, 600 * MIB, console):
        trainer.listener("update", UPDATE)
    return next(line for line in plain(written).splitlines() if line.startswith("epoch 4"))


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (120, ["4321/123450", "-:--:--", "83% of 600 MiB", "0.065 megapixels/s"]),
        (80, ["4321/123450", "-:--:--", "83% of 600 MiB"]),
        (60, ["4321/123450", "83% of 600 MiB"]),
        (40, ["4321/123450"]),
    ],
)
def test_the_progress_of_a_run_leaves_out_what_has_no_room(width: int, parts: list[str]) -> None:
    line = progress_line(width)
    assert "…" not in line
    assert len(line) <= width
    assert line.startswith("epoch 4, loss 0.123 ")
    every = ["4321/123450", "-:--:--", "83% of 600 MiB", "0.065 megapixels/s"]
    assert [part for part in every if part in line] == parts


def test_what_fits_is_told_by_what_it_would_take() -> None:
    table = Table("a heading of 23 letters")
    assert fits(table, terminal(80)[0])
    assert not fits(table, terminal(20)[0])
