"""What a run writes down as it goes: JSON lines, and events for TensorBoard if that is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from streamcnn.data.label_range import require_labels
from streamcnn.errors import RunMismatch
from streamcnn.support.disk import writing
from streamcnn.support.documents import conform, parse_json, read_within, require_within, size_within
from streamcnn.support.extras import require

LOG = "log.jsonl"
EVENTS = "events"
_MOST_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class _Update:
    """The fields that every line of an update has."""

    update: int
    seconds: float
    megapixels_per_second: float
    measured_bytes: int | None
    projected_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The fields that every line of a classifier's epoch has."""

    epoch: int
    loss: float
    accuracy: float
    validation_loss: float
    validation_accuracy: float
    predictions: tuple[int, ...]

    def __post_init__(self) -> None:
        require_labels(self.predictions, "predictions")


@dataclass(frozen=True, slots=True)
class _SegmentationEpoch:
    """The fields that every line of a segmentation's epoch has."""

    epoch: int
    loss: float
    validation_loss: float
    validation_mean_iou: float
    validation_mean_dice: float
    validation_accuracy: float
    num_images: int
    overlaps: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    """Of each class; see `streamcnn.metrics.class_overlaps`."""

    def __post_init__(self) -> None:
        if len({len(row) for row in self.overlaps}) > 1 or not all(
            0 <= n < 2**63 for r in self.overlaps for n in r
        ):
            raise ValueError("overlaps: allowed are three rows of numbers of pixels, one for each class")


_LINES: dict[str, type[Any]] = {"update": _Update, "epoch": _Epoch}


class RunLog:
    """The log of a run, open for appending.

    Parameters
    ----------
    folder
        The run's folder, which exists.
    nbytes
        Length of the log when the checkpoint was written; later lines, of updates that will be made again,
        are cut off.
    update
        The number of updates before the checkpoint.
    events
        Whether to write TensorBoard events.

    Raises
    ------
    MissingExtra
        If TensorBoard is wanted and not installed.
    RunMismatch
        If the log is shorter than ``nbytes``, or a link that leads out of the folder.
    CannotWrite
        If the log may not be written to, or the disk is full; also from later calls.
    """

    def __init__(self, folder: Path, *, nbytes: int = 0, update: int = 0, events: bool = False) -> None:
        path = folder / LOG
        # Lines are cut off, and events written, so neither may be a link to something else.
        for place in (path, folder / EVENTS):
            require_within(folder, place, error=RunMismatch)
        present = size_within(folder, path, error=RunMismatch) if path.exists() else 0
        if present < nbytes:
            raise RunMismatch(
                f"{path} has {present} bytes, and had {nbytes} when the newest checkpoint was written: put "
                "it back, or begin another run in another folder"
            )
        self._path, self._events, self._nbytes = path, folder / EVENTS, nbytes
        board = require("torch.utils.tensorboard", extra="train") if events else None
        self._writer: Any = None
        with ExitStack() as opened:
            with writing(path):
                # Without a buffer a line that cannot be written fails here, and not again when it is closed.
                self._file = opened.enter_context(path.open("ab", buffering=0))
                self._file.truncate(nbytes)
            if board is not None:
                with writing(self._events):
                    self._writer = board.SummaryWriter(str(self._events), purge_step=update)
            opened.pop_all()

    def write(self, kind: str, values: Mapping[str, Any], update: int) -> None:
        """Append a line of ``values``; numbers among them become events too, named ``kind/name``."""
        line = json.dumps({"kind": kind, "update": update, **values}, allow_nan=True)
        self._append(line.encode() + b"\n")
        if self._writer is not None:
            with writing(self._events):
                for name, value in values.items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool):
                        self._writer.add_scalar(f"{kind}/{name}", value, update)

    def _append(self, line: bytes) -> None:
        """Append a line; if that fails, leave no part of it."""
        with writing(self._path, needed=len(line)):
            try:
                left = line
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                self._file.truncate(self._nbytes)
                raise
        self._nbytes += len(line)

    def flush(self) -> int:
        """Flush all lines to the disk, and return their length in bytes."""
        with writing(self._path):
            os.fsync(self._file.fileno())
        if self._writer is not None:
            with writing(self._events):
                self._writer.flush()
        return self._nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._writer is not None:
            with writing(self._events):
                self._writer.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's log, in order.

    Raises
    ------
    RunMismatch
        If there is no log, or a line is not a JSON object with a kind.
    """
    path = folder / LOG
    try:
        content = read_within(folder, path, error=RunMismatch, most_bytes=_MOST_BYTES)
    except FileNotFoundError:
        raise RunMismatch(f"{folder} has no {LOG}: give the folder that `streamcnn train` wrote") from None
    return [_line(line, f"{path}, line {at}") for at, line in enumerate(content.splitlines(), 1)]


def _line(content: bytes, where: str) -> dict[str, Any]:
    # A loss may be no number.
    found = parse_json(content, where, error=RunMismatch, finite=False)
    if not isinstance(found, dict) or found.get("kind") not in tuple(_LINES):
        raise RunMismatch(f"{where} is no update and no epoch: put back what `streamcnn train` wrote")
    kind = _SegmentationEpoch if "overlaps" in found else _LINES[found["kind"]]
    known: dict[str, Any] = {name: found[name] for name in kind.__slots__ if name in found}
    conform(kind, known, where, error=RunMismatch)
    return found
