"""The layout of a tile store, and the records of its manifest.

::

    store/
      complete.json             names the manifest; written last, so a store without it is unfinished
      manifest-<hash>.jsonl     one line for the store, one for each image, with checksums
      images/<name>/            one OME-Zarr 0.5 image: zarr.json, and an array for each level
      journal.jsonl             while it is written: the lines of the images that are finished
      writer.lock               held by the process that writes

A manifest is never changed. Another one is written beside it, and ``complete.json`` is replaced in one step,
so that readers see either the old or the new set of images.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from streamcnn.data.sources.files import is_there
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.support.atomic import replace_file
from streamcnn.support.documents import conform, parse_json, read_within, require_flat

FORMAT = "streamcnn tile store"
VERSION = 1
COMPLETE = "complete.json"
JOURNAL = "journal.jsonl"
LOCK = "writer.lock"
IMAGES = "images"
NAME = re.compile(r"[A-Za-z0-9_%][A-Za-z0-9_%.() -]*(/[A-Za-z0-9_%][A-Za-z0-9_%.() -]*)*")
"""Valid names of images, none of which leads out of the folder of images."""
DTYPES = (
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "bool"),
)
MOST_BYTES = 2**30
"""Largest manifest and journal in bytes."""
_MOST_LEVELS = 32
_MANIFEST = re.compile(r"manifest-[0-9a-f]{12}\.jsonl")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"(0|[1-9][0-9]?)/c/0/(0|[1-9][0-9]{0,9})/(0|[1-9][0-9]{0,9})")
_STRICT: dict[str, Any] = {"extra": "forbid"}
"""Pydantic's settings for values read from a manifest."""


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One shard file as it was written.

    Raises
    ------
    ValueError
        If the size is negative, or a checksum is invalid.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    nbytes: int
    index_crc32c: str
    """Checksum of the shard's index in hexadecimal, as stored in its last four bytes."""
    chunk_crc32c: str
    """Checksums of the compressed inner chunks in the order of the file, four bytes each, in base 64."""

    def __post_init__(self) -> None:
        if not 0 <= self.nbytes < 2**63:
            raise ValueError(f"nbytes={self.nbytes}: allowed are 0 and more, below 2**63")
        if not re.fullmatch("[0-9a-f]{8}", self.index_crc32c):
            raise ValueError(f"index_crc32c={self.index_crc32c[:80]!r}: allowed are 8 hexadecimal digits")
        try:
            whole = len(base64.b64decode(self.chunk_crc32c, validate=True)) % 4 == 0
        except ValueError:
            whole = False
        if not whole:
            raise ValueError(f"chunk_crc32c={self.chunk_crc32c[:80]!r}: allowed are checksums in base 64")

    def chunk_checksums(self) -> list[bytes]:
        """The checksums of the inner chunks, as stored after each chunk."""
        packed = base64.b64decode(self.chunk_crc32c)
        return [packed[start : start + 4] for start in range(0, len(packed), 4)]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """The record of one image of a store, and of its files as they were written.

    Raises
    ------
    ValueError
        If a value has no meaning, or a name leads out of the folder.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

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
    """Records of shards, by path below the image's folder."""
    origin: Mapping[str, Any]
    """Where the image came from."""
    truth: Any = None
    """Ground truth beyond the label, for evaluation only."""
    largest: int | None = None
    """Largest possible value of a pixel, if below its dtype's; else None."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name[:80]!r}: allowed are letters, digits, and _ . - ( ) and blanks after the "
                "first character, in parts divided by /"
            )
        if self.label is not None and not 0 <= self.label < 2**63:
            raise ValueError(f"label={self.label}: allowed are 0 and more, below 2**63, and None")
        if not all(1 <= extent < 2**31 for extent in self.shape):
            raise ValueError(f"shape={self.shape}: allowed are extents of 1 and more, below 2**31")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype[:80]!r}: allowed are {', '.join(DTYPES)}")
        if not 1 <= self.levels <= _MOST_LEVELS:
            raise ValueError(f"levels={self.levels}: allowed are 1 to {_MOST_LEVELS}")
        if self.largest is not None and not 1 <= self.largest < _type_max(self.dtype):
            raise ValueError(
                f"largest={self.largest}: allowed are 1 and more, below the largest {self.dtype}, and None"
            )
        self._require_files()
        require_flat("origin", self.origin)
        require_flat("truth", self.truth)

    def _require_files(self) -> None:
        """Make sure that the paths of all files belong to an image."""
        known = {"zarr.json", *(f"{level}/zarr.json" for level in range(self.levels))}
        if self.metadata.keys() != known:
            raise ValueError(f"metadata: allowed are {', '.join(sorted(known))}")
        if not all(_SHA256.fullmatch(sha256) for sha256 in self.metadata.values()):
            raise ValueError("metadata: allowed are SHA-256 in 64 hexadecimal digits")
        for key in self.shards:
            match = _SHARD.fullmatch(key)
            if match is None or int(match[1]) >= self.levels:
                raise ValueError(f"shards: {key[:80]!r} is no shard: allowed are such as 0/c/0/0/0")

    @property
    def stored_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.nbytes for shard in self.shards.values())

    @property
    def pixel_bytes(self) -> int:
        """Uncompressed bytes of all pixels at full resolution."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def to_json(self) -> str:
        """One line of the manifest."""
        values = asdict(self)
        if self.largest is None:  # as in older versions, which had no such value
            del values["largest"]
        return json.dumps(values, separators=(",", ":"))


def _type_max(dtype: str) -> int:
    """The largest value of a dtype; 0 for floats."""
    if dtype == "bool":
        return 1
    return 0 if dtype.startswith("float") else int(np.iinfo(dtype).max)


@dataclass(frozen=True, slots=True)
class Head:
    """The description of a store, which is the first line of its manifest.

    Raises
    ------
    ValueError
        If two classes have the same name.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    kind: str
    """``"ultramnist"`` or ``"images"``."""
    provenance: Mapping[str, Any]
    """Everything that determines the images."""
    classes: tuple[str, ...] | None = None
    """Names of the labels 0, 1, …; None if labels are numbers."""

    def __post_init__(self) -> None:
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: allowed is each name once")
        require_flat("provenance", self.provenance)

    def to_json(self) -> str:
        """The first line of a manifest."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, separators=(",", ":"))


def parse_head(line: str | bytes, path: Path) -> Head:
    """Parse the first line of a manifest.

    Raises
    ------
    DatasetMismatch
        If it has another format, or a version that is not supported.
    CorruptImage
        If it is not such a line.
    """
    found = _parse_line(line, path)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise DatasetMismatch(
            f"{path} is {found.get('format')!r} version {found.get('version')!r}: allowed is {FORMAT!r} "
            f"version {VERSION}; use the program that wrote it, or convert the images again"
        )
    known = {key: value for key, value in found.items() if key not in ("format", "version")}
    return conform(Head, known, path, error=CorruptImage)


def parse_record(line: str | bytes, path: Path) -> ImageRecord:
    """Parse a line of a manifest that describes an image.

    Raises
    ------
    CorruptImage
        If it does not describe one.
    """
    found = _parse_line(line, path)
    name = found.get("name")
    where = f"{path}, image {name!r}" if isinstance(name, str) and len(name) < 256 else str(path)
    return conform(ImageRecord, found, where, error=CorruptImage)


def _parse_line(line: str | bytes, path: Path) -> dict[str, Any]:
    found = parse_json(line, f"a line of {path}", error=CorruptImage)
    if not isinstance(found, dict):
        raise CorruptImage(f"{path} holds a line that is no JSON object: write the store again")
    return found


@dataclass(frozen=True, slots=True)
class _Complete:
    """The content of ``complete.json``."""

    manifest: str
    sha256: str

    def __post_init__(self) -> None:
        if not _MANIFEST.fullmatch(self.manifest):
            raise ValueError(
                f"manifest={self.manifest[:80]!r}: allowed are files beside it such as "
                "'manifest-0123456789ab.jsonl'"
            )
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256={self.sha256[:80]!r}: allowed are 64 hexadecimal digits")


def is_tile_store(folder: str | Path) -> bool:
    """Whether there is a tile store in ``folder``, complete or not."""
    return any(is_there(Path(folder) / name) for name in (COMPLETE, JOURNAL))


def read_complete(folder: Path) -> tuple[Path, str] | None:
    """The manifest that ``complete.json`` names and its SHA-256; None if the store is not complete.

    Raises
    ------
    CorruptImage
        If the file exists but is invalid.
    """
    path = folder / COMPLETE
    try:
        content = read_within(folder, path, error=CorruptImage)
    except FileNotFoundError:
        return None
    found = conform(_Complete, parse_json(content, path, error=CorruptImage), path, error=CorruptImage)
    return folder / found.manifest, found.sha256


def read_manifest(path: Path, sha256: str) -> tuple[Head, dict[str, ImageRecord]]:
    """The head and the images by name, checked against the manifest's own checksum.

    Raises
    ------
    CorruptImage
        If the manifest is missing, has changed, or is invalid.
    """
    try:
        content = read_within(path.parent, path, error=CorruptImage, most_bytes=MOST_BYTES)
    except CorruptImage:
        raise
    except OSError as error:
        raise CorruptImage(
            f"cannot read the manifest {path}: {error.strerror}; copy the store again"
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CorruptImage(
            f"{path} is not what {COMPLETE} says (its SHA-256 differs): it was changed after it was written; "
            "copy the store again"
        )
    head, *lines = content.removesuffix(b"\n").split(b"\n")
    known = parse_head(head, path)
    records: dict[str, ImageRecord] = {}
    for line in lines:
        record = parse_record(line, path)
        if record.name in records:
            raise CorruptImage(f"{path} has two images {record.name!r}: write the store again")
        require_known_label(record, known, path)
        records[record.name] = record
    return known, records


def require_known_label(record: ImageRecord, head: Head, path: Path) -> None:
    """Make sure that an image's label has a name, if labels have names.

    Raises
    ------
    CorruptImage
        If not.
    """
    if record.label is not None and head.classes is not None and record.label >= len(head.classes):
        raise CorruptImage(
            f"{path}, image {record.name!r}: label={record.label}: allowed are labels of the "
            f"{len(head.classes)} classes; write the store again"
        )


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
