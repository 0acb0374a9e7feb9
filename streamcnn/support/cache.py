"""The user's cache folder: what is measured or built once for a machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where this package keeps such things, as the XDG specification has it; it need not exist.

    Raises
    ------
    RuntimeError
        If there is no home folder, and ``XDG_CACHE_HOME`` names no other place.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "streamcnn"
