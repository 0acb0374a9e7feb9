"""The contents of a checkpoint besides tensors, and their validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from streamcnn.ceiling.refusals import is_out_of_memory
from streamcnn.errors import DamagedCheckpoint, RunMismatch, StreamError
from streamcnn.support.documents import conform, require_flat
from streamcnn.training.progress import Progress, require_count

FORMAT = 2
"""Of a checkpoint's contents."""
_FIRST = 1
"""The format of versions that had no task but classification."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A sampler's position."""

    length: int
    seed: int
    epoch: int
    position: int

    def __post_init__(self) -> None:
        for name in ("length", "epoch", "position"):
            require_count(name, getattr(self, name))
        if self.position > self.length:
            raise ValueError(f"position={self.position}: allowed are 0 to length={self.length}")


@dataclass(frozen=True, slots=True)
class _Facts:
    """The fields of a checkpoint other than tensors and PyTorch's states."""

    format: int
    versions: Mapping[str, str]
    identity: Mapping[str, Any]
    progress: Progress
    sampler: _Place
    plan: str | None
    log_bytes: int

    def __post_init__(self) -> None:
        require_count("log_bytes", self.log_bytes)
        require_flat("identity", self.identity)


def require_state(state: Mapping[str, Any], where: Path) -> None:
    """Make sure that ``state`` has the fields that a trainer saves; shapes are checked on loading them.

    Raises
    ------
    DamagedCheckpoint
        If a field is missing or of another type; the text names the checkpoint and the field.
    RunMismatch
        If the checkpoint has a format that this version does not read.
    """
    if isinstance(state.get("format"), int) and state["format"] not in (_FIRST, FORMAT):
        raise RunMismatch(
            f"{where} has checkpoints of format {state['format']}, this version writes {FORMAT}: go on with "
            f"the version that wrote them ({state.get('versions')})"
        )
    names = tuple(_Facts.__slots__)
    facts = {name: state[name] for name in names if name in state}
    if isinstance(state.get("progress"), dict):
        facts["progress"] = progress_of(state)
    conform(_Facts, facts, where, error=DamagedCheckpoint)
    for name in ("update", "best_score"):
        if name not in facts["progress"]:
            raise DamagedCheckpoint(f"{where}: progress.{name} is missing")
    for name in ("model", "averaged"):
        if name == "model" or state.get(name) is not None:
            _require_tensors(name, state.get(name), where)
    for name in ("optimizer", "scaler", "random"):
        _require_mapping(name, state.get(name), where)
    if state.get("schedule") is not None:
        _require_mapping("schedule", state["schedule"], where)


def progress_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The progress of a saved run, as the fields of `Progress` by name."""
    found = dict(state["progress"])
    if state.get("format") == _FIRST:
        if "best_accuracy" in found:
            found["best_score"] = found.pop("best_accuracy")
        found["sums"] = {"accuracy": found.pop("num_right", 0)}
    return found


_NOT_THEIRS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that damaged states raise when they are loaded or first used."""


@contextmanager
def restoring(where: Path) -> Iterator[None]:
    """Turn the errors that PyTorch, NumPy and Python raise on damaged states into `DamagedCheckpoint`."""
    try:
        yield
    except StreamError:
        raise
    except _NOT_THEIRS as error:
        if is_out_of_memory(error):
            raise
        raise DamagedCheckpoint(
            f"the newest checkpoint in {where} holds states that cannot be resumed from "
            f"({type(error).__name__}: {error}): begin another run in another folder"
        ) from error


def _require_tensors(name: str, found: object, where: Path) -> None:
    _require_mapping(name, found, where)
    assert isinstance(found, dict)
    wrong = [
        key
        for key, value in found.items()
        if not isinstance(value, Tensor) and not key.endswith("_extra_state")
    ]
    if wrong:
        raise DamagedCheckpoint(
            f"{where}: {name}.{wrong[0]} is a {type(found[wrong[0]]).__name__}: allowed is a tensor"
        )


def _require_mapping(name: str, found: object, where: Path) -> None:
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise DamagedCheckpoint(
            f"{where}: {name} is a {type(found).__name__}: allowed is a dict with names as keys"
        )
