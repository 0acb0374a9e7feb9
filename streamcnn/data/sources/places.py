"""Locations of images: paths and URLs, and their zarr stores."""

from __future__ import annotations

import errno
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, WrapperStore, ZipStore

from streamcnn.data.sources.files import opening, regular
from streamcnn.data.sources.remote import using_fsspec
from streamcnn.errors import CorruptImage
from streamcnn.support.documents import parse_json, read_regular
from streamcnn.support.text import without_secrets

ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")
_METADATA_FILES = (*ZARR_FILES, ".zattrs", ".zmetadata")
METADATA_BYTES = 2**26
"""Largest file of zarr's metadata."""
# A Path turns two slashes into one.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>.*)", re.DOTALL)


def place(path: str | Path) -> Path | str:
    """A path with ``~`` and ``file://`` resolved, or the URL of a remote location.

    Raises
    ------
    CorruptImage
        If a ``file://`` URL names another machine, there is no home folder, the path is impossible on this
        system, or access is denied.
    """
    where = _resolved(path)
    return where if isinstance(where, str) else looked_at(where)


def local_path(path: str | Path) -> Path:
    """A path with ``~`` and ``file://`` resolved.

    Raises
    ------
    CorruptImage
        If it is a remote URL, and as from `place`.
    """
    return looked_at(resolved_path(path))


def resolved_path(path: str | Path) -> Path:
    """As `local_path`, without a check of what is there.

    Raises
    ------
    CorruptImage
        If it is a remote URL or names another machine, or there is no home folder.
    """
    where = _resolved(path)
    if isinstance(where, str):
        raise CorruptImage(
            f"{without_secrets(where)} is not on this machine: allowed are files and folders on it; download "
            "it, or read it with open_image, which takes zarr arrays and TIFF files elsewhere"
        )
    return where


def _resolved(path: str | Path) -> Path | str:
    text = os.fspath(path)
    match = _URL.fullmatch(text)
    if match is None:
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            raise CorruptImage(f"cannot find {text}: {error}; give the whole path") from error
    rest = match["rest"]
    if match["scheme"].lower() != "file":
        return f"{match['scheme']}://{rest.removeprefix('/')}"
    url = urlsplit(text)
    if url.netloc not in ("", "localhost"):
        raise CorruptImage(f"{text} lies on another machine ({url.netloc}): allowed is file:///path")
    return Path(unquote(url.path))


def looked_at(path: Path) -> Path:
    """The path itself, after a check that its existence can be determined.

    Later calls such as `Path.is_dir` then raise only if a disk fails meanwhile.

    Raises
    ------
    CorruptImage
        If the path is impossible on this system, or access is denied.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        # Circular links count as missing, as in pathlib.
        if getattr(error, "errno", None) != errno.ELOOP:
            why = getattr(error, "strerror", None) or error
            raise CorruptImage(
                f"cannot look at {path}: {why}; give another path, in folders that you may read"
            ) from error
    return path


class RegularFiles(WrapperStore[Store]):
    """A store of a folder or zip file that refuses pipes, sockets, devices and metadata that is too large."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The bytes under ``key``.

        Raises
        ------
        CorruptImage
            If it is a pipe, a socket or a device, or too large for metadata.
        """
        is_metadata = key.rpartition("/")[2] in _METADATA_FILES
        check_stored(self._store, key, METADATA_BYTES if is_metadata else None)
        return await self._store.get(key, prototype, byte_range)


def check_stored(store: Store, key: str, most: int | None) -> None:
    """Raise `CorruptImage` if ``key`` is a pipe, a socket or a device, or has more than ``most`` bytes.

    Stores whose sizes are known only by a network request are not checked.
    """
    store = base_store(store)
    size = None
    if isinstance(store, LocalStore):
        try:
            found = regular(store.root / key)
        except (FileNotFoundError, NotADirectoryError):
            return
        size = found.st_size if stat.S_ISREG(found.st_mode) else None
    elif isinstance(store, ZipStore) and store._is_open:
        member = store._zf.NameToInfo.get(key)
        size = None if member is None else member.file_size
    if size is not None and most is not None and size > most:
        raise CorruptImage(f"{key} has {size} bytes, allowed are {most}; copy the image again")


def zarr_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of zarr's metadata.

    Raises
    ------
    CorruptImage
        If there is none.
    """
    content = read_regular(path, error=CorruptImage, most_bytes=METADATA_BYTES)
    found = parse_json(content, path, error=CorruptImage, finite=False)
    if not isinstance(found, dict):
        raise CorruptImage(f"{path} holds a {type(found).__name__}: allowed is an object")
    return found


def base_store(store: Store) -> Store:
    """The innermost store of wrapped stores."""
    while isinstance(store, WrapperStore):
        store = store._store
    return store


def zarr_store(where: Path | str) -> tuple[Store, str]:
    """The store of a folder, a zip file or a URL, and the path of the image within it.

    Raises
    ------
    CorruptImage
        If it is a zip file without a zarr array or group.
    MissingExtra
        If reading from there needs a package that is not installed.
    """
    if isinstance(where, str):
        return remote_store(where), ""
    if not where.is_file():
        return RegularFiles(LocalStore(where, read_only=True)), ""
    with opening(str(where), "zip file"):
        regular(where)
        store = ZipStore(where, mode="r")
        store._sync_open()
        root = zip_root(store._zf.namelist())
    if root is None:
        store.close()
        raise CorruptImage(
            f"{where} is a zip file without {', '.join(ZARR_FILES)} on top or in its one folder: allowed is "
            "one zarr array or OME-Zarr image; unpack it"
        )
    return RegularFiles(store), root


def zip_root(names: list[str]) -> str | None:
    """The folder of a zip file that holds a zarr array or group; None if there is none."""
    tops = {name.partition("/")[0] for name in names} - {"__MACOSX"}
    roots: list[str] = ["", *(tops if len(tops) == 1 else ())]
    for root in roots:
        if any((f"{root}/{name}" if root else name) in names for name in ZARR_FILES):
            return root
    return None


def is_zarr_zip(path: Path) -> bool:
    """Whether a zip file holds a zarr array or group; False if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return zip_root(archive.namelist()) is not None
    except zipfile.BadZipFile:
        return False


def holds_zarr(store: Store) -> bool:
    """Whether a store holds a zarr array or group."""

    async def look() -> bool:
        for name in ZARR_FILES:
            if await store.exists(name):
                return True
        return False

    return sync(look())


def remote_store(url: str) -> FsspecStore:
    """The store of a URL.

    Raises
    ------
    CorruptImage
        If there are no such URLs.
    MissingExtra
        If reading from there needs a package that is not installed.
    """
    with using_fsspec(url):
        return FsspecStore.from_url(url, read_only=True)
