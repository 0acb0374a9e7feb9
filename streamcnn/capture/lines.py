"""The user's code, and the line of it that made a recorded call."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

TORCH_FOLDER = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<number>\d+), in .*\n    (?P<code>.*)$', re.MULTILINE)
_NOT_THE_USERS = (TORCH_FOLDER, str(Path(__file__).parents[1]))
_MOST_LETTERS = 100
"""Letters of a line of code in a message."""


def is_users(file: str) -> bool:
    """Whether a file of Python code is neither PyTorch's nor this package's."""
    return not file.startswith(_NOT_THE_USERS)


def called_by_user() -> bool:
    """Whether the code that has called this package is neither PyTorch's nor this package's."""
    frame = sys._getframe()
    while frame.f_code.co_filename.startswith(_NOT_THE_USERS[1]) and frame.f_back is not None:
        frame = frame.f_back
    return is_users(frame.f_code.co_filename)


def shortened(code: str | None) -> str:
    """A line of code without indentation, cut at the end if it is long."""
    code = (code or "").strip()
    return code if len(code) <= _MOST_LETTERS else f"{code[:_MOST_LETTERS].rstrip()} …"


def line_of(stack_trace: str | None) -> str:
    """The innermost line of the user's code, as ``file.py:12: code``; empty if unknown.

    Parameters
    ----------
    stack_trace
        As Python prints it, the innermost call last; None where none was recorded.
    """
    for frame in reversed([*_FRAME.finditer(stack_trace or "")]):
        if is_users(frame["file"]):
            return f"{Path(frame['file']).name}:{frame['number']}: {shortened(frame['code'])}"
    return ""
