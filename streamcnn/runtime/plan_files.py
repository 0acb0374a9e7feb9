"""Plans on disk, in the user's cache folder, so that no process repeats another one's search.

A plan is a function of the captured graph, the spec, the machine and the code that plans. A digest of all of
these is the file's name, so a process that would make the same plan finds it. The file is read by its schema,
and used only if it is for the program to which the graph is traced here: the graph only names the user's own
operators, whose computation may have changed since. Any other file is replaced.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import streamcnn
from streamcnn.errors import StreamError
from streamcnn.graph.program import Program
from streamcnn.graph.registry import all_are_built_in
from streamcnn.plan.plan import Plan
from streamcnn.support.atomic import replace_file
from streamcnn.support.cache import cache_folder
from streamcnn.support.documents import read_regular

if TYPE_CHECKING:
    from pydantic import TypeAdapter

VARIABLE = "STREAMCNN_PLANS"
"""Environment variable: a folder to keep plans in, or "off" for none."""
_SUFFIX = ".plan"
_NAMES = f"{'[0-9a-f]' * 64}{_SUFFIX}"
"""Pattern of the files' names, since the user may have other files in the same folder."""
_MOST_FILES = 512
"""The number of most recently used files that are kept: 30 to 150 kB each for a network of the usual size."""
_ABANDONED = 3600.0
"""Seconds after which a partial file counts as left by a killed writer: writing takes milliseconds."""
_ROOMS = ("capture", "geometry", "graph", "plan", "planning")
"""The code that plans depend on."""


@dataclass(frozen=True, slots=True)
class KeptPlan:
    """The content of a plan's file."""

    tail: str | None
    """The captured call with which the program's tail begins; None for no tail."""
    program: str
    """A digest of the program."""
    plan: Plan
    kept_bytes: tuple[tuple[str, int, int], ...] | None
    """``Plan.kept_bytes`` as JSON can hold it: kind and level of a part, and bytes."""

    @classmethod
    def of(cls, tail: str | None, program: Program, plan: Plan) -> KeptPlan:
        """The content to write for a plan."""
        parts = plan.kept_bytes
        pairs = None if parts is None else tuple((*part, nbytes) for part, nbytes in parts.items())
        return cls(tail, _outline(program), replace(plan, kept_bytes=None), pairs)

    def restored(self, program: Program) -> Plan:
        """The plan that was written.

        Raises
        ------
        _NoPlan
            If the plan is for another program.
        """
        if self.program != _outline(program):
            raise _NoPlan
        pairs = self.kept_bytes
        parts = None if pairs is None else {(kind, level): nbytes for kind, level, nbytes in pairs}
        return replace(self.plan, kept_bytes=parts)


class PlanFile:
    """The file of one plan, which need not exist yet.

    Parameters
    ----------
    *settings
        All that the plan depends on, beside the code and PyTorch.
    """

    def __init__(self, *settings: Any) -> None:
        folder = _folder()
        self._path = None if folder is None else folder / f"{_digest(settings)}{_SUFFIX}"

    def read(self, program_with: Callable[[str | None], Program]) -> tuple[Program, Plan] | None:
        """The program and the plan; ``program_with`` makes the program with a given tail.

        None if no plan was kept, or the file holds something else.
        """
        if self._path is None:
            return None
        from pydantic import ValidationError

        try:
            content = zlib.decompress(read_regular(self._path, error=_NoPlan))
            found = _adapter().validate_json(content)
            program = program_with(found.tail)
            plan = found.restored(program)
        except (OSError, zlib.error, ValidationError, LookupError, _NoPlan):
            # A tail that is not in the graph is a LookupError.
            return None
        with suppress(OSError):
            os.utime(self._path)
        return program, plan

    def write(self, tail: str | None, program: Program, plan: Plan) -> None:
        """Keep a plan on disk; if that fails, a warning says so."""
        if self._path is None:
            return
        content = zlib.compress(_adapter().dump_json(KeptPlan.of(tail, program, plan)), level=1)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, content, concurrent=True)
            _remove_oldest(self._path.parent)
        except OSError as error:
            warnings.warn(
                f"cannot keep plans in {self._path.parent} ({error.strerror}): other processes make them "
                f"anew; name another folder in the environment variable {VARIABLE}, or set it to off",
                stacklevel=2,
            )


class _NoPlan(StreamError):
    """The file does not hold the plan, so it is made."""


def _folder() -> Path | None:
    """The folder of plans; None if none are kept, or if they depend on rules that the digest leaves out."""
    choice = os.environ.get(VARIABLE, "")
    if choice == "off" or not all_are_built_in():
        return None
    if choice:
        return Path(choice).expanduser()
    try:
        return cache_folder() / "plans"
    except RuntimeError:
        return None  # There is no home folder.


def _remove_oldest(folder: Path) -> None:
    """Remove all but the most recently used files, and partial files whose writers were killed."""
    oldest = [path for _, path in _by_age(folder, _NAMES)[:-_MOST_FILES]]
    before = time.time() - _ABANDONED
    abandoned = [path for changed, path in _by_age(folder, f".{_NAMES}.*.partial") if changed < before]
    for path in (*oldest, *abandoned):
        path.unlink(missing_ok=True)


def _by_age(folder: Path, names: str) -> list[tuple[float, Path]]:
    """Files whose names match a pattern, the oldest first, each with its time of modification."""
    files = []
    for path in folder.glob(names):
        with suppress(FileNotFoundError):
            files.append((path.stat().st_mtime, path))
    return sorted(files)


def _digest(settings: tuple[Any, ...]) -> str:
    libraries = (torch.__version__, torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)
    text = "\n".join((_code(), str(libraries), *map(_text, settings)))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _code() -> str:
    """A digest of the code that plans."""
    root = Path(streamcnn.__file__).parent
    found = hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in (root / room).rglob("*.py")):
        found.update(f"{path.relative_to(root)}\n".encode())
        found.update(path.read_bytes())
    found.update(Path(__file__).read_bytes())
    return found.hexdigest()


def _outline(program: Program) -> str:
    """A digest of the parts of a program on which a plan depends: its nodes and their rules."""
    found = hashlib.sha256()
    for node in program.nodes.values():
        reads = (node.operands, node.local, node.reduction)
        found.update(f"{node.name} {node.kind} {node.spec} {node.axes} {node.grad} {reads}\n".encode())
    return found.hexdigest()


def _text(value: Any) -> str:
    """A value as text that is the same in every process; sets are sorted."""
    return "".join(_words(value))


def _words(value: Any) -> Iterator[str]:
    if is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, dict):
        yield f"{{{','.join(f'{_text(key)}:{_text(each)}' for key, each in value.items())}}}"
    elif isinstance(value, (set, frozenset)):
        yield f"{{{','.join(sorted(map(_text, value)))}}}"
    elif isinstance(value, (list, tuple)):
        yield f"[{','.join(map(_text, value))}]"
    else:
        yield repr(value)


@cache
def _adapter() -> TypeAdapter[KeptPlan]:
    from pydantic import TypeAdapter

    return TypeAdapter(KeptPlan)
