"""What lies where in a tile store, and the records of its manifest.

::

    store/
      complete.json             names the manifest; written last, so a store without it is unfinished
      manifest-<hash>.jsonl     one line for the store, one for each image, with checksums
      images/<name>/            one OME-Zarr 0.5 image: zarr.json, and an array for each level
      journal.jsonl             while it is written: the lines of the images that are finished
      writer.lock               held by the process that writes

A manifest is never changed: another one is written beside it and ``complete.json`` replaced in one step,
so that readers see the old set of images or the new one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.atomic import replace_file
from streamcnn.errors import CorruptImage, DatasetMismatch

FORMAT = "streamcnn tile store"
VERSION = 1
COMPLETE = "complete.json"
JOURNAL = "journal.jsonl"
LOCK = "writer.lock"
IMAGES = "images"


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One shard file as it was written."""

    nbytes: int
    index_crc32c: str
    """Checksum of the shard's index in hexadecimal, as stored in its last four bytes."""
    chunk_crc32c: str
    """Checksums of the compressed inner chunks in the order of the file, four bytes each, in base 64."""

    def chunk_checksums(self) -> list[bytes]:
        """The checksums of the inner chunks, as stored behind each."""
        packed = base64.b64decode(self.chunk_crc32c)
        return [packed[start : start + 4] for start in range(0, len(packed), 4)]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a store: what it is, and what its files were when it was written."""

    name: str
    """Path of its folder below ``images/``, with forward slashes."""
    split: str
    label: int | None
    shape: tuple[int, int, int]
    """(C, H, W) in pixels."""
    dtype: str
    """NumPy's name of the pixel type."""
    levels: int
    """Number of resolutions; each halves the one before."""
    metadata: Mapping[str, str]
    """SHA-256 of each ``zarr.json``, by path below the image's folder."""
    shards: Mapping[str, ShardRecord]
    """By path below the image's folder."""
    origin: Mapping[str, Any]
    """Where the image came from."""
    truth: Any = None
    """What is known beyond the label, for evaluation only."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.nbytes for shard in self.shards.values())

    @property
    def pixel_bytes(self) -> int:
        """Bytes of all pixels, not compressed, at full resolution."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def to_json(self) -> str:
        """One line of the manifest."""
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Head:
    """What a store says of itself, the first line of its manifest."""

    kind: str
    """``"ultramnist"`` or ``"images"``."""
    provenance: Mapping[str, Any]
    """Everything that the images are a function of."""
    classes: tuple[str, ...] | None = None
    """Names of the labels 0, 1, …; None where labels are numbers."""

    def to_json(self) -> str:
        """The first line of a manifest."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, separators=(",", ":"))


def parse_head(line: str, path: Path) -> Head:
    """The first line of a manifest.

    Raises
    ------
    DatasetMismatch
        If it is another format, or a version that this program cannot read.
    """
    found = _parse_line(line, path)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise DatasetMismatch(
            f"{path} is {found.get('format')!r} version {found.get('version')!r}: allowed is {FORMAT!r} "
            f"version {VERSION}; use the program that wrote it, or convert the images again"
        )
    classes = found["classes"]
    return Head(found["kind"], found["provenance"], None if classes is None else tuple(classes))


def parse_record(line: str, path: Path) -> ImageRecord:
    """A line of a manifest that describes an image."""
    found = _parse_line(line, path)
    shards = {key: ShardRecord(**shard) for key, shard in found["shards"].items()}
    return ImageRecord(**{**found, "shape": tuple(found["shape"]), "shards": shards})


def _parse_line(line: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorruptImage(
            f"{path} holds a line that is no JSON object ({error}); write the store again"
        ) from error
    assert isinstance(found, dict)
    return found


def is_tile_store(folder: str | Path) -> bool:
    """Whether there is a tile store in ``folder``, complete or not."""
    return any((Path(folder) / name).exists() for name in (COMPLETE, JOURNAL))


def read_complete(folder: Path) -> tuple[Path, str] | None:
    """The manifest that ``complete.json`` names and its SHA-256; None if the store is not complete.

    Raises
    ------
    CorruptImage
        If the file is there and says nothing of the kind.
    """
    path = folder / COMPLETE
    try:
        found = json.loads(path.read_text())
        return folder / found["manifest"], found["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptImage(f"{path} is damaged ({error}); write the store again") from error


def read_manifest(path: Path, sha256: str) -> tuple[Head, dict[str, ImageRecord]]:
    """The head and the images by name, checked against the manifest's own checksum.

    Raises
    ------
    CorruptImage
        If the manifest is missing or was changed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorruptImage(
            f"cannot read the manifest {path}: {error.strerror}; copy the store again"
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CorruptImage(
            f"{path} is not what {COMPLETE} says (its SHA-256 differs): it was changed after it was written; "
            "copy the store again"
        )
    head, *lines = content.decode().splitlines()
    records = (parse_record(line, path) for line in lines)
    return parse_head(head, path), {record.name: record for record in records}


def write_manifest(folder: Path, head: Head, records: Iterable[ImageRecord]) -> None:
    """Write a manifest, then ``complete.json``, then remove the manifest that it named before."""
    previous = read_complete(folder)
    lines = (head.to_json(), *(record.to_json() for record in records))
    content = "".join(f"{line}\n" for line in lines).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    path = folder / f"manifest-{sha256[:12]}.jsonl"
    replace_file(path, content, flush=True)
    complete = json.dumps({"manifest": path.name, "sha256": sha256}) + "\n"
    replace_file(folder / COMPLETE, complete, flush=True)
    if previous is not None and previous[0] != path:
        previous[0].unlink(missing_ok=True)
