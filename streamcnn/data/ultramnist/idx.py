"""MNIST's files: images and labels in the IDX format, plain or compressed with gzip."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.support.documents import open_regular

PAIRS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# Hashes of the compressed files on MNIST's mirrors, and of their content, as others may compress the same
# content to other bytes.
DOWNLOAD_SHA256 = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
CONTENT_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049
_SIDE = 28
_MAX_LABEL = 9
_PIECE_BYTES = 2**20
MOST_BYTES = 2**30
"""Largest decompressed file in bytes: ten times as much as the largest set of digits."""


@dataclass(frozen=True, slots=True, eq=False)
class IdxPair:
    """Grey ``images`` uint8 ``(n, 28, 28)`` and ``labels`` uint8 ``(n,)`` of a pair of files.

    ``unpublished`` are those of the two files whose content is not MNIST's.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    unpublished: tuple[Path, ...]


def read_pair(folder: Path, split: str) -> IdxPair | None:
    """The images and labels of one half of MNIST, or None if ``folder`` has neither file.

    Raises
    ------
    DatasetMismatch
        If one of the two files is missing, or they do not hold digits of 28 by 28 pixels, one label each.
    CorruptImage
        If a file cannot be read or is no complete IDX file.
    """
    names = PAIRS[split]
    image_path, label_path = (_find(folder, name) for name in names)
    if image_path is None and label_path is None:
        return None
    if image_path is None or label_path is None:
        there, missing = (names[1], names[0]) if image_path is None else names
        raise DatasetMismatch(f"{folder} has {there} but no {missing} nor {missing}.gz: add the missing file")
    image_bytes, label_bytes = _read(image_path), _read(label_path)
    images = _parse(image_bytes, image_path, _IMAGES_MAGIC, num_axes=3)
    labels = _parse(label_bytes, label_path, _LABELS_MAGIC, num_axes=1)
    _check(images, labels, image_path, label_path)
    contents = zip(names, (image_path, label_path), (image_bytes, label_bytes), strict=True)
    unpublished = (path for name, path, content in contents if _sha256(content) != CONTENT_SHA256[name])
    return IdxPair(images, labels, tuple(unpublished))


def _find(folder: Path, name: str) -> Path | None:
    """The file called ``name``, also in some mirrors' spelling, plain or compressed."""
    spellings = (name, name.replace("-idx", ".idx"))
    candidates = [folder / f"{spelling}{suffix}" for suffix in ("", ".gz") for spelling in spellings]
    return next((path for path in candidates if path.is_file()), None)


def _read(path: Path) -> bytes:
    """The content of a file, decompressed up to the largest plausible size."""
    try:
        with open_regular(path, error=CorruptImage) as file:
            return _bounded(gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file, path)
    except CorruptImage:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptImage(f"cannot read {path}: {error}; get the file again") from error


def _bounded(file: gzip.GzipFile | BinaryIO, path: Path) -> bytes:
    pieces: list[bytes] = []
    total = 0
    # In pieces, as a read allocates a buffer of the requested size.
    while piece := file.read(_PIECE_BYTES):
        total += len(piece)
        if total > MOST_BYTES:
            raise CorruptImage(f"{path} holds more than {MOST_BYTES} bytes: allowed are digits, in fewer")
        pieces.append(piece)
    return b"".join(pieces)


def _parse(content: bytes, path: Path, magic: int, *, num_axes: int) -> NDArray[np.uint8]:
    """The array in an IDX file: magic number and extents as big-endian 32-bit integers, then the bytes."""
    num_header_bytes = 4 * (1 + num_axes)
    header = np.frombuffer(content[:num_header_bytes].ljust(num_header_bytes, b"\0"), dtype=">u4").tolist()
    if header[0] != magic:
        kind = "images" if magic == _IMAGES_MAGIC else "labels"
        raise CorruptImage(
            f"{path} is no IDX file of {kind}: its magic number is {header[0]}, allowed is {magic}"
        )
    expected = num_header_bytes + math.prod(header[1:])
    if len(content) != expected:
        raise CorruptImage(
            f"{path} holds {len(content)} bytes where its header says {expected}: get the file again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=num_header_bytes).reshape(header[1:])


def _check(images: NDArray[np.uint8], labels: NDArray[np.uint8], image_path: Path, label_path: Path) -> None:
    if images.shape[1:] != (_SIDE, _SIDE):
        height, width = images.shape[1:]
        raise DatasetMismatch(
            f"{image_path} has images of {height}x{width} pixels: allowed are {_SIDE}x{_SIDE}, MNIST's own"
        )
    if len(images) != len(labels):
        raise DatasetMismatch(
            f"{image_path} has {len(images)} images but {label_path} has {len(labels)} labels: "
            f"take both files from one set"
        )
    if labels.size and labels.max() > _MAX_LABEL:
        raise DatasetMismatch(
            f"{label_path} has the label {labels.max()}: allowed are 0 to {_MAX_LABEL}, take a set of digits"
        )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
