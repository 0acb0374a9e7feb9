"""Reading of a tile store: its images as lazy sources, with all bytes compared with the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.codec import Codec
from zarr.storage import LocalStore, StorePath

from streamcnn.data.sources import ImageSource, ZarrSource
from streamcnn.data.sources.files import opening
from streamcnn.data.sources.places import local_path
from streamcnn.data.tile_store.checks import CheckedStore, check_metadata, check_shard
from streamcnn.data.tile_store.format import IMAGES, JOURNAL, ImageRecord, read_complete, read_manifest
from streamcnn.data.tile_store.metadata import chunks_per_shard, parse_level
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.support.documents import read_within, require_within


class TileStore:
    """The images of a complete tile store.

    Parameters
    ----------
    folder
        Folder of the store.

    Attributes
    ----------
    head : Head
        Kind of the store, and everything that determines its images.
    records : tuple of ImageRecord
        One for each image, in the order of the manifest.

    Raises
    ------
    CorruptImage
        If there is no store, or its manifest has changed.
    DatasetMismatch
        If the store is not finished, or its version is not supported.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = local_path(folder)
        complete = read_complete(self.folder)
        if complete is None:
            raise _no_store(self.folder)
        self.head, by_name = read_manifest(*complete)
        self.records: tuple[ImageRecord, ...] = tuple(by_name.values())

    def __len__(self) -> int:
        return len(self.records)

    def path(self, record: ImageRecord) -> Path:
        """The folder of an image, which any OME-Zarr reader opens."""
        return self.folder / IMAGES / record.name

    def source(self, record: ImageRecord, *, level: int = 0) -> ImageSource:
        """An image as a lazy source, with every byte compared with the manifest.

        Raises
        ------
        CorruptImage
            If its metadata is missing or has changed.
        ValueError
            If there is no such level.
        """
        if not 0 <= level < record.levels:
            raise ValueError(f"level {level} of {record.name}: allowed are 0..{record.levels - 1}")
        for key in record.shards:
            require_within(self.folder, self.path(record) / key, error=CorruptImage)
        # Chunks are not searched for either, as the manifest shows missing ones.
        array = self._array(record, level)
        return ZarrSource(array, channels_last=False, missing_chunks="fill", largest=record.largest)

    def _array(self, record: ImageRecord, level: int) -> zarr.Array[Any]:
        """Open a level of an image, with its metadata compared with the manifest."""
        metadata, folder = self._metadata(record), self.path(record)
        store = CheckedStore(
            LocalStore(folder, read_only=True), record.shards, chunks_per_shard(folder, metadata)
        )
        path = folder / f"{level}/zarr.json"
        # Not with zarr, which would read the metadata again: small images are opened often.
        known, values = parse_level(metadata[f"{level}/zarr.json"], path)
        said = (record.shape[0], *(-(-extent // 2**level) for extent in record.shape[1:]))
        if (known.shape, known.data_type) != (said, record.dtype):
            raise CorruptImage(
                f"{path} has shape {list(known.shape)} and data_type {known.data_type[:80]!r}, the manifest "
                f"says {list(said)} and {record.dtype!r}: write the store again"
            )
        with opening(str(path), "zarr array"):
            return zarr.Array(zarr.AsyncArray(values, StorePath(store, str(level))))

    def _metadata(self, record: ImageRecord) -> dict[str, bytes]:
        """All metadata of an image, compared with the manifest."""
        folder = self.path(record)
        return {
            key: check_metadata(self.folder, folder / key, sha256) for key, sha256 in record.metadata.items()
        }

    def codec(self) -> str | None:
        """Names and settings of the pixels' compressors, from the first image; None in an empty store.

        Raises
        ------
        CorruptImage
            If that image's metadata is missing or has changed.
        """
        if not self.records:
            return None
        array = self._array(self.records[0], 0)
        return ", ".join(
            _codec_text(codec.to_dict()) for codec in array.compressors if isinstance(codec, Codec)
        )

    def split(self, name: str) -> tuple[ImageRecord, ...]:
        """The images of one split."""
        return tuple(record for record in self.records if record.split == name)

    def label_counts(self, split: str) -> Counter[int | None]:
        """Number of images with each label in a split."""
        return Counter(record.label for record in self.split(split))

    def verify(self) -> Iterator[tuple[ImageRecord, CorruptImage | None]]:
        """Compare each image's files with the manifest, byte by byte; the error is None if they agree."""
        for record in self.records:
            try:
                self._verify(record)
            except CorruptImage as error:
                yield record, error
            else:
                yield record, None

    def _verify(self, record: ImageRecord) -> None:
        folder = self.path(record)
        chunks = chunks_per_shard(folder, self._metadata(record))
        for key, shard in record.shards.items():
            try:
                content = read_within(self.folder, folder / key, error=CorruptImage, most_bytes=2**40)
                check_shard(content, shard, chunks[key.partition("/")[0]], key)
            except CorruptImage as error:
                raise CorruptImage(f"{folder}: {error}") from error
            except OSError as error:
                raise CorruptImage(f"{folder}: shard {key}: {error.strerror}; copy it again") from error


def _codec_text(codec: Mapping[str, Any]) -> str:
    """A codec's name and settings, as in ``blosc(cname=zstd, clevel=5)``."""
    settings = codec.get("configuration") or {}
    return f"{codec['name']}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _no_store(folder: Path) -> Exception:
    if (folder / JOURNAL).exists():
        return DatasetMismatch(
            f"{folder} is not finished: start the command that writes it again, and it goes on where it was"
        )
    return CorruptImage(f"no tile store at {folder}: give the folder that holds its complete.json")
