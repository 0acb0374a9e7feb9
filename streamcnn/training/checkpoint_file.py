"""One checkpoint: a file of tensors and plain values, and its digest beside it in ``sha256sum -c``'s format.

A file is written under a temporary name, flushed to the disk and renamed, so a file with its final name is
complete. A checkpoint is not trusted, as anybody who can write to the folder may have made it: loading runs
none of its code, and takes no more memory than the file has bytes.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from streamcnn.errors import DamagedCheckpoint, StreamError
from streamcnn.support.atomic import open_new, replace_file
from streamcnn.support.documents import read_within, size_within

TEMPORARY = ".partial"
"""Added to the name of a checkpoint while it is written."""
DIGEST = ".sha256"
"""Added to its name for that of its digest."""
_DIGEST_BYTES = 2**12


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint and its digest; if that fails, write neither.

    Parameters
    ----------
    state
        Tensors, numbers, texts, and lists, tuples and dicts of them.
    path
        A name that no checkpoint of the folder had before, so that it never meets another one's digest.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open_new(temporary) as file:
            _save(state, file)
        flush(temporary)
        # The digest first: whatever has the final name has one.
        replace_file(digest_path(path), f"{_digest(temporary)}  {path.name}\n", flush=True)
        flush(path.parent)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        if not path.exists():
            digest_path(path).unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, tensors on the CPU.

    Raises
    ------
    DamagedCheckpoint
        If its digest is missing or does not match, or the file is not an archive of tensors and plain values.
        Code that it names is never run.
    FileNotFoundError
        If there is no such file.
    """
    with reading(path):
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
    """Bytes of all tensors in a state; memory that several tensors share counts once."""
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
    """A file for `torch.save` that remembers why a write failed, which torch's own error does not say."""

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
    """Write ``state``; a failed write raises the `OSError` itself, not torch's error about it."""
    target = _Target(file)
    try:
        torch.save(dict(state), target)  # type: ignore[arg-type]
    except RuntimeError:
        if target.error is None:
            raise
        raise target.error from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file in an error in reading it; `FileNotFoundError` is left to the caller."""
    try:
        yield
    except (StreamError, FileNotFoundError):
        raise
    except OSError as error:
        raise DamagedCheckpoint(
            f"{path} cannot be read: {error.strerror}: see that it is what `streamcnn train` wrote, and that "
            "you may read it"
        ) from error


def _expected_digest(path: Path) -> str:
    """The digest beside a checkpoint."""
    beside = digest_path(path)
    try:
        content = read_within(path.parent, beside, error=DamagedCheckpoint, most_bytes=_DIGEST_BYTES)
        return content.decode("ascii", errors="replace").split()[0]
    except (FileNotFoundError, IndexError):
        raise DamagedCheckpoint(f"{path} has no digest beside it") from None


def _require_plain_archive(path: Path) -> None:
    """Refuse a file that is no archive, or whose tensors take more memory than the file has bytes."""
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

    PyTorch checks the bounds of a sparse tensor's indices neither on reading nor on use.
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


def flush(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk, to survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_path(path: Path) -> Path:
    return path.with_name(path.name + DIGEST)
