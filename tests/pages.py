"""Run the code blocks of the README and of the docs as they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_page(name: str, defined: dict[str, Any] | None = None, without: str | None = None) -> dict[str, Any]:
    """Run a page's Python blocks one after the other; the names that they define.

    Parameters
    ----------
    name
        Path of the page from the repository's root.
    defined
        Names that the page takes for granted.
    without
        Blocks that contain this text are compiled but not run.
    """
    names = dict(defined or {})
    for code in _blocks(ROOT / name, without):
        exec(code, names)
    return names


def _blocks(path: Path, without: str | None) -> Iterator[Any]:
    text = path.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        # Its own lines, so that an error names the line of the page.
        before = "\n" * text.count("\n", 0, block.start(1))
        code = compile(before + block[1], str(path), "exec")
        if without is None or without not in block[1]:
            yield code
