"""The folder of a profile: its lines, figures and page, written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from streamcnn.profiling.figures import write_figures
from streamcnn.profiling.page import describe, render_page
from streamcnn.profiling.tile_profile import TileProfile
from streamcnn.support.disk import writing


def write_results(
    profiles: Sequence[TileProfile], model: str, shape: tuple[int, int, int, int], folder: Path
) -> None:
    """Write profile.jsonl, report.html and the figures; files of these names are replaced.

    Raises
    ------
    ValueError
        If there is no profile.
    MissingExtra
        If matplotlib is not installed.
    CannotWrite
        If there is no room, or the folder may not be written to.
    """
    page = render_page(profiles, model, shape)
    make_folder(folder)
    # Inside the folder, so that renaming stays on one file system.
    with writing(folder), tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as name:
        unfinished = Path(name)
        lines = "".join(f"{profile.to_json()}\n" for profile in profiles)
        (unfinished / "profile.jsonl").write_text(lines, encoding="utf-8")
        (unfinished / "report.html").write_text(page, encoding="utf-8")
        write_figures(profiles, describe(profiles, model, shape), unfinished)
        for path in sorted(unfinished.iterdir()):
            os.replace(path, folder / path.name)


def make_folder(folder: Path) -> None:
    """Create the folder for the results, so that a folder that cannot be written fails before measuring.

    Raises
    ------
    CannotWrite
        If it cannot be created.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
