"""Which line of the user's code a recorded call comes from."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<number>\d+), in .*\n    (?P<code>.*)$', re.MULTILINE)
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def line_of(stack_trace: str | None) -> str:
    """The innermost line outside of PyTorch and this package, as ``file.py:12: code``; empty if unknown.

    Parameters
    ----------
    stack_trace
        As Python prints it, the innermost call last; None where none was recorded.
    """
    for frame in reversed([*_FRAME.finditer(stack_trace or "")]):
        if not frame["file"].startswith(_NOT_THE_USERS):
            return f"{Path(frame['file']).name}:{frame['number']}: {frame['code'].strip()}"
    return ""
