"""Small JSON files by which the processes of a row know what the ones before have found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streamcnn.support.atomic import replace_file


def read_json(path: Path) -> dict[str, Any]:
    """What was written to a file; nothing if it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a file at once, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(value))
