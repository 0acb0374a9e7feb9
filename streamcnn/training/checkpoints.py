"""Checkpoints that a crash at any moment leaves usable.

A file is written under a temporary name, flushed to the disk and renamed, so under its own name it is whole;
its digest lies beside it in the format of ``sha256sum -c``. No name is used twice, so a file never meets
another one's digest. The two newest are kept, so that there is one to fall back to where a disk has damaged
the other, and the best, which a file of its own names.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from streamcnn.errors import DamagedCheckpoint, RunMismatch, StreamError
from streamcnn.support.atomic import open_new, replace_file
from streamcnn.support.disk import writing
from streamcnn.support.documents import read_within, require_within, size_within
from streamcnn.support.text import printable

BEST = "best.txt"
"""Names the best checkpoint."""
KEPT = 2
"""Checkpoints kept besides the best."""
_NAME = re.compile(r"save-([0-9]{1,18})-update-([0-9]{1,18})\.pt")
_TEMPORARY = ".partial"
_DIGEST = ".sha256"
_MARKER_BYTES = 2**12
_DIGEST_BYTES = 2**12
_DAMAGED = ".damaged"
"""Added to the name of a checkpoint that was passed over, which then counts no more."""


class CheckpointFolder:
    """The checkpoints of one run.

    Parameters
    ----------
    folder
        Created with the first checkpoint. Files of other names in it are left alone.

    Raises
    ------
    RunMismatch
        If the folder is a link that leads out of the folder above it.
    """

    def __init__(self, folder: Path) -> None:
        require_within(folder.parent, folder, error=RunMismatch)
        self.folder = folder

    def next_name(self, update: int) -> str:
        """What the next checkpoint will be called, if it is saved after so many updates."""
        serial = 1 + max((_serial(path) for path in self.paths()), default=0)
        return f"save-{serial:06d}-update-{update:08d}.pt"

    def save(self, state: Mapping[str, Any], update: int) -> Path:
        """Write ``state``, as it is after so many updates, and remove what is not kept any more.

        Parameters
        ----------
        state
            Tensors, numbers, texts, and lists, tuples and dicts of them.

        Raises
        ------
        CannotWrite
            If there is no room, or the folder may not be written to; earlier checkpoints are as they were.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path, before = self.folder / self.next_name(update), self.paths()
        kept = f"The checkpoint before it, {before[0].name}, is as it was" if before else ""
        with writing(path, needed=tensor_bytes(state), kept=kept):
            self._write(state, path)
            best = self.best()
            for old in self.paths()[KEPT:]:
                if old != best:
                    old.unlink()
                    _digest_path(old).unlink(missing_ok=True)
            self._remove_leftovers()
        return path

    def _write(self, state: Mapping[str, Any], path: Path) -> None:
        """Write a checkpoint and its digest, or nothing."""
        temporary = path.with_name(path.name + _TEMPORARY)
        try:
            with open_new(temporary) as file:
                _save(state, file)
            _flush(temporary)
            # The digest first: whatever has the final name has one.
            replace_file(_digest_path(path), f"{_digest(temporary)}  {path.name}\n", flush=True)
            _flush(self.folder)
            os.replace(temporary, path)
            _flush(self.folder)
        except BaseException:
            temporary.unlink(missing_ok=True)
            if not path.exists():
                _digest_path(path).unlink(missing_ok=True)
            raise

    def _remove_leftovers(self) -> None:
        """Remove what processes left that were killed while they saved."""
        for left in self.folder.glob(f"save-*{_TEMPORARY}"):
            left.unlink()
        for digest in self.folder.glob(f"save-*.pt{_DIGEST}"):
            if not digest.with_suffix("").exists():
                digest.unlink()

    def mark_best(self, name: str | None) -> None:
        """Keep the checkpoint of that name as the best, instead of the one before; None marks none.

        Raises
        ------
        CannotWrite
            If the folder may not be written to, or there is no room.
        """
        with writing(self.folder / BEST):
            if name is None:
                (self.folder / BEST).unlink(missing_ok=True)
                return
            replace_file(self.folder / BEST, f"{name}\n", flush=True)
            _flush(self.folder)

    def best(self) -> Path | None:
        """The best checkpoint; None if none was marked.

        Raises
        ------
        DamagedCheckpoint
            If what was marked is no checkpoint's name.
        """
        marker = self.folder / BEST
        try:
            with _reading(marker):
                content = read_within(self.folder, marker, error=DamagedCheckpoint, most_bytes=_MARKER_BYTES)
        except FileNotFoundError:
            return None
        name = content.decode(errors="backslashreplace").strip()
        if not is_checkpoint_name(name):
            raise DamagedCheckpoint(
                f"{marker} names {name!r}: allowed are checkpoints beside it, such as "
                "'save-000001-update-00000010.pt'; train the run on"
            )
        return self.folder / name

    def paths(self) -> list[Path]:
        """The checkpoints that are there, the newest first, the best among them.

        Raises
        ------
        DamagedCheckpoint
            If the folder cannot be read, or is none.
        """
        try:
            with _reading(self.folder):
                found = list(self.folder.iterdir())
        except FileNotFoundError:
            return []
        return sorted((p for p in found if _NAME.fullmatch(p.name)), key=_serial, reverse=True)

    def newest(self) -> dict[str, Any] | None:
        """What the newest intact checkpoint holds; None where there is none at all.

        A damaged one is passed over with a warning, and renamed, so that it is never taken for one to keep.

        Raises
        ------
        DamagedCheckpoint
            If there are checkpoints and all are damaged.
        """
        damaged: dict[Path, str] = {}
        for path in self.paths():
            try:
                state = load_checkpoint(path)
            except DamagedCheckpoint as error:
                damaged[path] = str(error)
                continue
            for bad, text in damaged.items():
                warnings.warn(f"{printable(text)}; going on from {path.name}, the one before", stacklevel=2)
                with writing(self.folder):
                    bad.rename(bad.with_name(bad.name + _DAMAGED))
            return state
        if damaged:
            raise DamagedCheckpoint(
                f"no checkpoint in {self.folder} can be used: {'; '.join(damaged.values())}. Begin a new run"
            )
        return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, tensors on the CPU.

    Raises
    ------
    DamagedCheckpoint
        If its digest is missing or another one, or it is no archive of tensors and plain values. Code that it
        names is never run.
    FileNotFoundError
        If it is not there.
    """
    with _reading(path):
        expected = _expected_digest(path)
        size_within(path.parent, path, error=DamagedCheckpoint)
        found = _digest(path)
    if found != expected:
        raise DamagedCheckpoint(f"{path} is damaged: its bytes are not those that were written")
    _require_plain_archive(path)
    try:
        with warnings.catch_warnings():
            # PyTorch 2.14 tells of sparse tensors, which are refused below.
            warnings.filterwarnings("ignore", "Validating sparse tensor", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # what is made to look like a checkpoint fails in any way
        raise DamagedCheckpoint(f"{path} is no checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise DamagedCheckpoint(f"{path} holds a {type(state).__name__}: allowed is a dict of what was saved")
    _require_plain_tensors(state, path)
    return state


def tensor_bytes(state: object) -> int:
    """Bytes of all tensors in a state, those that share memory counted once."""
    found: dict[int, int] = {}

    def count(part: object) -> None:
        if isinstance(part, torch.Tensor):
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(part, Mapping):
            for value in part.values():
                count(value)
        elif isinstance(part, (list, tuple)):
            for value in part:
                count(value)

    count(state)
    return sum(found.values())


class _Target:
    """A file for `torch.save`, whose own error does not say why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save(state: Mapping[str, Any], file: BinaryIO) -> None:
    """Write ``state``; an `OSError` stays what it is."""
    target = _Target(file)
    try:
        torch.save(dict(state), target)  # type: ignore[arg-type]
    except RuntimeError:
        if target.error is None:
            raise
        raise target.error from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of an error in reading what could not be read; that it is not there, whoever asked says."""
    try:
        yield
    except (StreamError, FileNotFoundError):
        raise
    except OSError as error:
        raise DamagedCheckpoint(
            f"{path} cannot be read: {error.strerror}: see that it is what `streamcnn train` wrote, and that "
            "you may read it"
        ) from error


def is_checkpoint_name(name: str) -> bool:
    """Whether a checkpoint may be called so; such a name leads nowhere else."""
    return _NAME.fullmatch(name) is not None


def _expected_digest(path: Path) -> str:
    """The digest beside a checkpoint."""
    beside = _digest_path(path)
    try:
        content = read_within(path.parent, beside, error=DamagedCheckpoint, most_bytes=_DIGEST_BYTES)
        return content.decode("ascii", errors="replace").split()[0]
    except (FileNotFoundError, IndexError):
        raise DamagedCheckpoint(f"{path} has no digest beside it") from None


def _require_plain_archive(path: Path) -> None:
    """Refuse an archive whose tensors take more memory than the file has bytes, or that is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise DamagedCheckpoint(f"{path} is no checkpoint: {error}") from error
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise DamagedCheckpoint(f"{path} holds packed or overlapping entries: no checkpoint is written so")


def _require_plain_tensors(state: Mapping[str, Any], path: Path) -> None:
    """Refuse tensors whose elements are not the bytes in the file.

    PyTorch reads indices of sparse tensors without looking whether they lie inside, and uses them so.
    """
    known: set[int] = set()
    todo: list[Any] = [state]
    while todo:
        each = todo.pop()
        if isinstance(each, torch.Tensor):
            if each.layout != torch.strided or each.device.type != "cpu" or each.is_quantized:
                raise DamagedCheckpoint(
                    f"{path} holds a tensor of layout {each.layout} and type {each.dtype} on {each.device}: "
                    "allowed are dense tensors; no checkpoint is written so"
                )
        elif isinstance(each, Mapping | list | tuple | set) and id(each) not in known:
            known.add(id(each))
            todo += [*each.keys(), *each.values()] if isinstance(each, Mapping) else each


def _flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + _DIGEST)


def _serial(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
