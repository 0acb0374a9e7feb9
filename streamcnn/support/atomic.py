"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, content: str | bytes, *, flush: bool = False, concurrent: bool = False) -> None:
    """Write a file under another name and rename it: whoever reads it has the old one or the new one.

    Parameters
    ----------
    path
        What to write; its folder is there.
    content
        Text is written as UTF-8.
    flush
        Have the bytes on the disk before they get their name, so that a crash of the machine loses neither.
    concurrent
        Whether others may write the file at the same time. One that is killed then leaves its part behind,
        which otherwise the next one overwrites.

    Raises
    ------
    OSError
        If it cannot be written; the file is then as it was.
    """
    infix = f".{secrets.token_hex(4)}" if concurrent else ""
    temporary = path.with_name(f".{path.name}{infix}.partial")
    try:
        with open_new(temporary) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush_files(path: Path) -> None:
    """Have all bytes of a file, or of those in a folder, on the disk before it gets its name."""
    for each in (path, *path.rglob("*")):
        if each.is_file():
            with each.open("rb") as file:
                os.fsync(file.fileno())


def open_new(path: Path) -> BinaryIO:
    """A new file to write bytes to, in the place of what was there; a link there is replaced, not followed.

    Raises
    ------
    OSError
        If it cannot be made.
    """
    path.unlink(missing_ok=True)
    return path.open("xb")
