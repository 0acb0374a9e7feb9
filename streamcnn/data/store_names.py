"""Names of images in a store, derived from their paths so that two paths never have the same name.

Characters that not every system allows in a folder's name are written as %XX for each byte, as in a URL.
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
"""Largest folder name in bytes; systems allow 255, and a suffix is added while an image is written."""
_KEPT = 140
_HASH_DIGITS = 32
_FEW_DIGITS = 8


def store_name(relative: str, *, ending: bool = False, as_they_are: bool = False) -> str:
    """The name of the image at a path with forward slashes, with or without its ending.

    With ``as_they_are``, parts that are valid visible file names on this system are not encoded.
    """
    path = PurePosixPath(relative) if ending else PurePosixPath(relative).with_suffix("")
    return "/".join(part if as_they_are and _is_inside(part) else _encoded(part) for part in path.parts)


def older_name(relative: str) -> str:
    """The name in older stores, which several paths may share."""
    name = PurePosixPath(relative).with_suffix("").as_posix()
    return "/".join(re.sub(r"^[^A-Za-z0-9_]|[^A-Za-z0-9_.() -]", "_", part) for part in name.split("/"))


def distinct_names(relatives: Sequence[str], *, as_they_are: bool = False) -> list[str]:
    """The names of images at these paths; those that would share a name get their endings.

    Names that differ only in case are the same folder on many disks, and count as equal here. ``as_they_are``
    is for `store_name`.
    """
    names = [store_name(relative, as_they_are=as_they_are) for relative in relatives]
    with_endings = [store_name(relative, ending=True, as_they_are=as_they_are) for relative in relatives]
    while True:
        longer = _with_others(names, with_endings)
        if longer == names:
            break
        names = longer
    counts = Counter(names)  # equal paths below two folders have one name, and are refused elsewhere
    unlike = _with_others(names, [unlike_name(relative) for relative in relatives])
    return [name if counts[name] > 1 else other for name, other in zip(names, unlike, strict=True)]


def _with_others(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Each name, replaced by the one in ``others`` if a second name equals it up to case."""
    counts = Counter(name.casefold() for name in names)
    return [other if counts[name.casefold()] > 1 else name for name, other in zip(names, others, strict=True)]


def unlike_name(relative: str) -> str:
    """The name of an image if another's differs from it only in case: a hash distinguishes them."""
    digits = hashlib.sha256(os.fsencode(relative)).hexdigest()[:_FEW_DIGITS]
    return f"{store_name(relative, ending=True)}%.{digits}"


def _is_inside(part: str) -> bool:
    """Whether a part of a path is a valid name of a visible file."""
    try:
        is_short = len(part.encode()) <= _LONGEST
    except UnicodeEncodeError:  # bytes that are not UTF-8
        return False
    return is_short and part.isprintable() and part[0] not in "./"


def _encoded(part: str) -> str:
    content = os.fsencode(part)
    text = _NOT_FIRST.sub(lambda found: b"%%%02X" % found[0][0], content).decode("ascii")
    if len(text) <= _LONGEST:
        return text
    # "%." encodes no byte, so that a truncated name cannot equal another name.
    kept = re.sub("%[0-9A-F]?$", "", text[:_KEPT])
    return f"{kept}%.{hashlib.sha256(content).hexdigest()[:_HASH_DIGITS]}"
