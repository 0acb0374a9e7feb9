"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, content: str | bytes, *, flush: bool = False, concurrent: bool = False) -> None:
    """Write a file under another name and rename it, so that readers see the old or the new content.

    Parameters
    ----------
    path
        The file to write; its folder exists.
    content
        Bytes, or text, which is written as UTF-8.
    flush
        Flush the bytes to the disk before the renaming, so that a crash of the machine leaves one of the two.
    concurrent
        Whether other processes may write the file at the same time. A killed process then leaves its
        temporary file behind, which otherwise the next one overwrites.

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
    """Flush a file, or all files in a folder, to the disk, for instance before a renaming."""
    for each in (path, *path.rglob("*")):
        if each.is_file():
            with each.open("rb") as file:
                os.fsync(file.fileno())


def open_new(path: Path) -> BinaryIO:
    """Open a new file for writing bytes, in place of any old one; a link is replaced, not followed.

    Raises
    ------
    OSError
        If it cannot be created.
    """
    path.unlink(missing_ok=True)
    return path.open("xb")
