"""The user's cache folder, for data that is measured or built once for each machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The package's cache folder, by the XDG specification; it need not exist.

    Raises
    ------
    RuntimeError
        If there is no home folder, and ``XDG_CACHE_HOME`` is not set.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "streamcnn"
