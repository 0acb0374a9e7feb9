"""The page on segmentation runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "segmentation.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    defined: dict[str, Any] = {}
    text = PAGE.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        # Its own lines, so that an error names the line of the page.
        before = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(before + block[1], str(PAGE), "exec"), defined)
    assert defined["part"].shape == (1, 100, 150)
    assert all(parameter.grad is not None for parameter in defined["net"].parameters())
