"""Writing of a tile store image by image; being killed at any moment loses at most one image.

An image is written under a hidden name, flushed, renamed, and only then added to the journal. A restarted
writer continues with the images that the journal lacks. Readers see nothing before ``finish``.
"""

from __future__ import annotations

import glob
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

from filelock import FileLock, Timeout

from streamcnn.data.sources import ImageSource, largest_of
from streamcnn.data.tile_store.arrays import record_files, write_image
from streamcnn.data.tile_store.format import (
    COMPLETE,
    DTYPES,
    IMAGES,
    JOURNAL,
    LOCK,
    MOST_BYTES,
    NAME,
    Head,
    ImageRecord,
    parse_head,
    parse_record,
    read_complete,
    read_manifest,
    require_known_label,
    write_manifest,
)
from streamcnn.errors import CorruptImage, DatasetMismatch, StreamError
from streamcnn.support.atomic import flush_files, replace_file
from streamcnn.support.disk import writing
from streamcnn.support.documents import read_within, require_within


class TileStoreWriter:
    """Creates or extends a store; a context manager that holds the folder's lock.

    Parameters
    ----------
    folder
        Folder of the store; created if missing.
    head
        Description of the store. Existing images must have the same kind and provenance; the names of their
        labels are kept.

    Raises
    ------
    DatasetMismatch
        If the folder holds a store with another head, or something that is not a store.
    CorruptImage
        If existing content is damaged, or is a link that leads out of the folder.
    StreamError
        If another process writes to the folder.
    CannotWrite
        If there is no room, or the folder may not be written to; also from later calls.
    """

    def __init__(self, folder: str | Path, head: Head) -> None:
        self.folder = Path(folder)
        self.head = head
        self.records: dict[str, ImageRecord] = {}
        self._lock: FileLock | None = None
        self._journal: IO[str] | None = None

    def __enter__(self) -> Self:
        with _told(self.folder):
            _refuse_foreign(self.folder)
            for name in (IMAGES, JOURNAL, LOCK, COMPLETE):
                require_within(self.folder, self.folder / name, error=CorruptImage)
            (self.folder / IMAGES).mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
        try:
            self._resume()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def add(self, record: ImageRecord) -> None:
        """Add an image that ``write_image_folder`` has written, or an image's new label."""
        assert self._journal is not None
        with _told(self.folder / JOURNAL):
            self._journal.write(f"{record.to_json()}\n")
            self._journal.flush()
        self.records[record.name] = record

    def set_classes(self, classes: tuple[str, ...] | None) -> None:
        """Set the names of labels; existing names stay."""
        known = self.head.classes or ()
        assert (classes or ())[: len(known)] == known
        self.head = replace(self.head, classes=classes)
        self._open_journal()

    def finish(self, order: Sequence[str] | None = None) -> None:
        """Make the images visible to readers, in the ``order`` of these names (default: as added)."""
        names = list(self.records) if order is None else order
        with _told(self.folder / COMPLETE):
            write_manifest(self.folder, self.head, (self.records[name] for name in names))
            (self.folder / JOURNAL).unlink()

    def _resume(self) -> None:
        """Read existing images, and resume from the journal."""
        path = self.folder / JOURNAL
        complete = read_complete(self.folder)
        if complete is not None:
            head, self.records = read_manifest(*complete)
            self._go_on_with(head)
        whole = _whole_lines(path)
        if whole:
            head = parse_head(whole[0], path)
            self._go_on_with(head)
            for record in (parse_record(line, path) for line in whole[1:]):
                require_known_label(record, head, path)
                self.records[record.name] = record
        self._open_journal()

    def _go_on_with(self, found: Head) -> None:
        """Refuse to mix images of different kind or provenance; keep the names of labels."""
        there, wanted = (_flat({"kind": h.kind, "provenance": h.provenance}) for h in (found, self.head))
        differences = [
            f"{key} is {there.get(key)!r}, asked for is {wanted.get(key)!r}"
            for key in sorted(there.keys() | wanted.keys())
            if there.get(key) != wanted.get(key)
        ]
        if differences:
            raise DatasetMismatch(
                f"{self.folder} holds a store that was made otherwise: {'; '.join(differences)}; give "
                "another folder, or the settings that it was made with"
            )
        self.head = replace(self.head, classes=found.classes)

    def _open_journal(self) -> None:
        """Open the journal after its last complete line, with the present head."""
        self._close_journal()
        path = self.folder / JOURNAL
        with _told(path):
            lines = (self.head.to_json(), *_whole_lines(path)[1:])
            replace_file(path, "".join(f"{line}\n" for line in lines), flush=True)
            self._journal = path.open("a")

    def _close_journal(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            with _told(self.folder / JOURNAL):
                journal.close()

    def _close(self) -> None:
        try:
            self._close_journal()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None


def check_names(names: Iterable[str], *, in_any_case: bool = False) -> None:
    """Refuse a name that is a folder in another's path; if asked, also on case-insensitive disks.

    Raises
    ------
    DatasetMismatch
        If there are such images; the text names two.
    """
    known = {name.casefold() if in_any_case else name: name for name in names}
    for key, name in sorted(known.items()):
        for parent in PurePosixPath(key).parents:
            if str(parent) in known:
                raise DatasetMismatch(
                    f"images {known[str(parent)]!r} and {name!r} cannot be in one store, as the first would "
                    "be a folder of the second: rename one"
                )


def write_image_folder(
    store: Path,
    source: ImageSource,
    *,
    name: str,
    split: str,
    label: int | None,
    levels: int,
    origin: Mapping[str, Any],
    truth: Any = None,
    on_shard: Callable[[int, int], None] | None = None,
    on_read: Callable[[], None] | None = None,
) -> ImageRecord:
    """Write one image into ``store`` and return its record; any process may call it.

    An image of that name is replaced. ``on_shard`` is called with the pixels written so far and in total.
    ``on_read`` is called after all pixels are read and before anything is replaced; if it raises, nothing is.

    Raises
    ------
    ValueError
        If not every system allows the name for a folder.
    DatasetMismatch
        If the name is a folder of other images, or is inside an image, or a store cannot hold the dtype.
    CorruptImage
        If the source cannot be read, or a link leads out of the store.
    CannotWrite
        If it cannot be written, as on a full disk; nothing of the image is left.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"image name {name!r}: allowed are letters, digits, _ and %, and . - ( ) and blanks after "
            "the first character, in parts divided by /"
        )
    kind = str(source.dtype).removeprefix("torch.")
    if kind not in DTYPES:
        raise DatasetMismatch(
            f"{source.name} has pixels of type {kind}: allowed in a tile store are {', '.join(DTYPES)}; "
            "save it as one of these"
        )
    target = store / IMAGES / name
    require_within(store, target, error=CorruptImage)
    _refuse_to_hide(target, store / IMAGES)
    # If two processes write one image, against the rules, at least their files do not mix.
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    # All lower levels together have a third of the first one's pixels.
    with _told(target, math.prod(source.shape) * source.dtype.itemsize * 4 // 3):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            if partial.is_symlink():
                partial.unlink()
            write_image(partial, source, name=name, levels=levels, on_shard=on_shard)
            metadata, shards = record_files(partial)
            flush_files(partial)
            if on_read is not None:
                on_read()
            if target.exists():
                # Moved away in one step, so that no image is ever half removed.
                aside = target.with_name(f".{target.name}.{os.getpid()}.old.partial")
                shutil.rmtree(aside, ignore_errors=True)
                target.rename(aside)
            partial.rename(target)
            _remove_left(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return ImageRecord(
        name=name,
        split=split,
        label=label,
        shape=source.shape,
        dtype=kind,
        levels=levels,
        metadata=metadata,
        shards=shards,
        origin=origin,
        truth=truth,
        largest=None if source.largest == largest_of(source.dtype) else source.largest,
    )


def _told(path: Path, needed: int | None = None) -> AbstractContextManager[None]:
    """Name the file in an error of writing, and say that nothing is lost."""
    return writing(path, needed=needed, at_most=True, kept="Finished images are kept")


def _refuse_to_hide(target: Path, images: Path) -> None:
    """Refuse a folder that holds other images, or is inside one."""
    inside = any(
        (parent / "zarr.json").exists() for parent in target.parents if parent.is_relative_to(images)
    )
    if inside or (target.is_dir() and not (target / "zarr.json").exists()):
        what = "lies in another image" if inside else "holds other images"
        raise DatasetMismatch(f"{target} {what}: give the image another name")


def _remove_left(target: Path) -> None:
    """Remove the former image, and leftovers of killed processes."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder with content that a store does not have."""
    if folder.is_dir():
        entries = {entry.name for entry in folder.iterdir()}
        if entries and not entries & {COMPLETE, JOURNAL, LOCK}:
            raise DatasetMismatch(
                f"{folder} is not empty and no tile store (it holds {min(entries)}): give a new folder"
            )
    elif folder.exists():
        raise DatasetMismatch(f"{folder} is a file: give a folder")


def _locked(folder: Path) -> FileLock:
    """Take the folder's lock, which is held until it is released or the process ends."""
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise StreamError(
            f"{folder} is being written by another process: wait for it or give another folder"
        ) from error
    except OSError as error:
        raise StreamError(
            f"cannot lock {folder / LOCK}: {error.strerror}; see that it is a file which you may write to"
        ) from error
    return lock


def _whole_lines(path: Path) -> list[str]:
    """The complete lines of a journal."""
    try:
        content = read_within(path.parent, path, error=CorruptImage, most_bytes=MOST_BYTES)
    except FileNotFoundError:
        return []
    lines = content.decode(errors="surrogateescape").split("\n")
    return lines[:-1]


def _flat(found: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
