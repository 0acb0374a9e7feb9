"""Files that are one scan: a DICOM series, an OME-TIFF of several files, a folder of bioformats2raw.

`companions` handles files beside an image; here several files, each of which could be opened, are one image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from streamcnn.data.companions import further_files
from streamcnn.data.dicom import series_uid
from streamcnn.data.sources.files import is_there
from streamcnn.data.sources.places import METADATA_BYTES, zarr_object
from streamcnn.data.sources.tiff_series import tiff_file
from streamcnn.errors import CorruptImage, DatasetMismatch, some
from streamcnn.support.documents import read_regular

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LAYOUT = "bioformats2raw.layout"
_NO_SCAN = re.compile(r"\b(label|macro|thumbnail|overview|barcode)( image)?( \d+)?\W*$", re.IGNORECASE)
"""Names that Bio-Formats gives to pictures of a slide's label and of the whole glass."""


@dataclass(frozen=True, slots=True)
class Scan:
    """One image, in one or several files."""

    path: Path
    """The path for `open_image`."""
    shown: Path
    """The path to show: for an image in a folder of several that folder, else ``path``."""
    key: str
    """A key that is equal for all files of a scan, wherever they lie."""
    files: tuple[Path, ...]
    """All files and folders that hold its pixels."""

    def files_beside(self, file: Path) -> tuple[Path, ...]:
        """All files except ``file``."""
        return tuple(each for each in self.files if each != file)


def one_of_each(paths: Sequence[Path]) -> list[Scan]:
    """The scans of the images in one folder, in their order; a scan takes the place of its first file.

    Raises
    ------
    DatasetMismatch
        If an OME-TIFF of several files cannot be read.
    """
    found: dict[str, Scan] = {}
    for path in paths:
        scan = scan_of(path)
        known = found.setdefault(scan.key, scan)
        if path not in known.files:
            found[scan.key] = replace(known, files=(*known.files, path))
    return list(found.values())


def scan_of(path: Path) -> Scan:
    """The scan that an image belongs to, as far as this file tells.

    Raises
    ------
    DatasetMismatch
        If the image is an OME-TIFF of several files that is not supported.
    OSError
        If the file cannot be read.
    """
    if path.is_file():
        if path.suffix.lower() == ".dcm" and (series := series_uid(path)) is not None:
            return Scan(path, path, f"the DICOM series {series}", (path,))
        with path.open("rb") as file:
            is_tiff = file.read(4) in _TIFF_MAGIC
        if is_tiff and (files := _files_of_ome(path)):
            return Scan(files[0], files[0], f"the OME-TIFF of {_place(min(files))}", files)
    return Scan(path, path, f"the file {_place(path)}", (path, *further_files(path)))


def _place(path: Path) -> str:
    """An identifier of a file on its disk, equal for all links to it."""
    found = path.stat()
    return f"{found.st_dev}:{found.st_ino}"


def _files_of_ome(path: Path) -> tuple[Path, ...]:
    """The files of an OME-TIFF of several files, starting with the one to open; empty for other TIFFs.

    Raises
    ------
    DatasetMismatch
        If it holds several images, or its description is in a file that is not a TIFF.
    """
    root = _ome_root(path)
    if root is None:
        return ()
    main = path
    elsewhere = [each.get("MetadataFile", "") for each in root if each.tag.endswith("BinaryOnly")]
    if elsewhere:
        main = path.with_name(Path(elsewhere[0]).name)
        described = _ome_root(main) if main.is_file() and main != path else None
        if described is None:
            raise DatasetMismatch(
                f"{path} is a part of an OME-TIFF in several files, described by {main.name}: allowed are "
                "those whose TIFF files describe it; write the image as one file"
            )
        root = described
    images = [_files_of_image(root, image, main) for image in root if image.tag.endswith("Image")]
    every = {path, *(file for files in images for file in files)}
    if every == {path}:
        return ()
    if len(images) > 1:
        raise DatasetMismatch(
            f"{path} is a part of an OME-TIFF with {len(images)} images in {len(every)} files: allowed is "
            "one image in a file or in several; write each as a file of its own"
        )
    return (main, *sorted(file for file in every - {main} if is_there(file)))


def _files_of_image(root: ElementTree.Element, image: ElementTree.Element, main: Path) -> set[Path]:
    """The files that hold an image's planes."""
    found = set()
    for each in image.iter():
        if each.tag.endswith("UUID") and (name := each.get("FileName")):
            # A renamed file still has its former name in its description.
            is_main = each.text is not None and each.text == root.get("UUID")
            found.add(main if is_main else main.with_name(Path(name).name))
    return found


def _ome_root(path: Path) -> ElementTree.Element | None:
    """An OME-TIFF's description; None for other TIFFs, and for damaged ones."""
    try:
        with tiff_file(path) as file:
            text = file.ome_metadata
        return None if text is None else ElementTree.fromstring(text)
    except Exception:  # a damaged file may raise anything; opening it shows the fault
        return None


def raw_image(folder: Path, series: int | None = None) -> Path | None:
    """The image in a folder written by bioformats2raw, other than those of the label and the glass.

    Returns None for any other folder, and the folder itself if ``series`` is given.

    Raises
    ------
    DatasetMismatch
        If there are several images.
    """
    if not _is_raw(folder):
        return None
    if series is not None:
        return folder
    groups = sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda p: int(p.name))
    names = _series_names(folder / "OME" / "METADATA.ome.xml")
    images = [
        path
        for at, path in enumerate(groups)
        if at == 0 or at >= len(names) or _NO_SCAN.search(names[at]) is None
    ]
    if len(images) != 1:
        described = some([path.name for path in images])
        raise DatasetMismatch(
            f"{folder} of bioformats2raw holds {len(images)} images ({described}): "
            "allowed is one, besides those of the label and the glass; give the folder of the one to take, "
            "or series= (--series)"
        )
    return images[0]


def _is_raw(folder: Path) -> bool:
    for name in ("zarr.json", ".zattrs"):
        attributes = _json(folder / name)
        if name == "zarr.json":
            found = attributes.get("attributes")
            attributes = found if isinstance(found, dict) else {}
        ome = attributes.get("ome", {})
        if _LAYOUT in attributes or (isinstance(ome, dict) and _LAYOUT in ome):
            return True
    return False


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if it is missing or damaged, which opening it will show."""
    try:
        return zarr_object(path)
    except (CorruptImage, FileNotFoundError, NotADirectoryError):
        return {}


def _series_names(path: Path) -> list[str]:
    """The names of the images in bioformats2raw's copy of the OME-XML; empty if that is missing."""
    try:
        content = read_regular(path, error=CorruptImage, most_bytes=METADATA_BYTES)
        root = ElementTree.fromstring(content)
    except (CorruptImage, OSError, ElementTree.ParseError, RecursionError):
        return []
    return [image.get("Name", "") for image in root if image.tag.endswith("Image")]
