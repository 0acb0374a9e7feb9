"""Names of images in a store: made of their paths, so that two paths never have one name.

Characters that a folder's name cannot have on every system are written as %XX for each byte, as in a URL.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

_NOT_FIRST = re.compile(rb"^[^A-Za-z0-9_]|[^A-Za-z0-9_.() -]")
_LONGEST = 180
"""Bytes of a folder's name; systems allow 255, and a name has something added while it is written."""
_KEPT = 140
_HASH_DIGITS = 32


def store_name(relative: str, *, ending: bool = False) -> str:
    """The name of the image at a path, which has forward slashes, with or without its ending."""
    path = PurePosixPath(relative) if ending else PurePosixPath(relative).with_suffix("")
    return "/".join(_encoded(part) for part in path.parts)


def older_name(relative: str) -> str:
    """The name that stores of before have, which several paths may share."""
    name = PurePosixPath(relative).with_suffix("").as_posix()
    return "/".join(re.sub(r"^[^A-Za-z0-9_]|[^A-Za-z0-9_.() -]", "_", part) for part in name.split("/"))


def distinct_names(relatives: Sequence[str]) -> list[str]:
    """The names of images at these paths, with the endings of those that would share one without."""
    names = [store_name(relative) for relative in relatives]
    while True:
        counts = Counter(names)
        longer = [
            store_name(relative, ending=True) if counts[name] > 1 else name
            for relative, name in zip(relatives, names, strict=True)
        ]
        if longer == names:
            return names
        names = longer


def _encoded(part: str) -> str:
    content = os.fsencode(part)
    text = _NOT_FIRST.sub(lambda found: b"%%%02X" % found[0][0], content).decode("ascii")
    if len(text) <= _LONGEST:
        return text
    # "%." is no byte, so that a name which was cut is no other's.
    kept = re.sub("%[0-9A-F]?$", "", text[:_KEPT])
    return f"{kept}%.{hashlib.sha256(content).hexdigest()[:_HASH_DIGITS]}"
