"""Files beside an image that are a part of it, or not an image at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from streamcnn.data.sources.files import is_there
from streamcnn.errors import DatasetMismatch
from streamcnn.support.documents import read_regular

_SYSTEM = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information"}
"""Names that operating systems write into folders, in lower case."""
_SIDECARS = (".ovr", ".msk")
"""Endings of GDAL's TIFF files with the overviews or the mask of another file."""
_SETS = {
    ".ndpis": "names slides that are the channels of one scan",
    ".afi": "names slides that are the channels of one scan",
    ".vsi": "is a scan whose pixels lie in a folder beside it",
}
"""Scans in several files that are not supported, by ending."""
_NAMED_IN_VMS = re.compile(r"^(?:ImageFile|MapFile|MacroImage|OptimisationFile)[^=]*=(.+)$", re.MULTILINE)
_THUMBNAILS = {"preview", "previews", "thumb", "thumbnail", "thumbnails", "thumbs"}
_THUMBNAIL_AFFIX = re.compile(r"^(?:thumb|thumbnail|preview)[_. -]|[_. -](?:thumb|thumbnail|preview)$")


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden, such as ``._name.tif`` of macOS, or belongs to the system."""
    return path.name.startswith(".") or path.name.casefold() in _SYSTEM


def parts_of_others(entries: Sequence[Path]) -> set[Path]:
    """The files and folders among ``entries``, all in one folder, that are parts of an image among them.

    Raises
    ------
    DatasetMismatch
        If an image in several files has a form that is not supported, or a part's image is missing.
    """
    found: set[Path] = set()
    by_name = {path.name: path for path in entries}
    for path in entries:
        ending = path.suffix.lower()
        if ending in _SETS:
            raise DatasetMismatch(
                f"{path} {_SETS[ending]}, which cannot be read: allowed are scans in a format of "
                "docs/images.md; convert the scan, and move this one and its files away"
            )
        if ending in _SIDECARS:
            _require_image(path, entries)
            found.add(path)
        else:
            found |= {by_name[part.name] for part in further_files(path) if part.name in by_name}
    return found


def further_files(path: Path) -> list[Path]:
    """The files and folders beside a slide that hold its pixels."""
    ending = path.suffix.lower()
    if ending == ".mrxs":
        found = [path.with_suffix("")]
    elif ending == ".vms":
        found = [path.parent / name for name in _names_in_vms(path)]
    else:
        found = []
    return [each for each in found if is_there(each)]


def _names_in_vms(path: Path) -> list[str]:
    """The names of files beside a slide that the slide lists; empty if it is not a file."""
    if not path.is_file():
        return []
    content = read_regular(path, error=DatasetMismatch).decode("latin-1")
    names = (Path(name.strip().replace("\\", "/")).name for name in _NAMED_IN_VMS.findall(content))
    return [name for name in names if name and "\0" not in name]


def _require_image(sidecar: Path, entries: Iterable[Path]) -> None:
    """Make sure that the image of an overview or a mask is there."""
    base = sidecar.with_suffix("").name
    is_there = sidecar.with_name(base).exists()
    if not is_there and not any(path != sidecar and base == path.stem for path in entries):
        raise DatasetMismatch(
            f"{sidecar} is an overview or a mask of {base}, which is not beside it: put the image there, "
            "or move this one away"
        )


def without_thumbnails(relatives: Sequence[str]) -> set[str]:
    """Paths of images, without those in folders of thumbnails.

    Parameters
    ----------
    relatives
        Paths relative to the given folder, with forward slashes.

    Raises
    ------
    DatasetMismatch
        If such a folder holds an image of which there is no other version.
    """
    paths = [Path(relative) for relative in relatives]
    small = [path for path in paths if {part.casefold() for part in path.parts[:-1]} & _THUMBNAILS]
    large = {path for path in paths} - set(small)
    if not large:
        return set(relatives)
    stems = {path.stem for path in large}
    for path in small:
        if not {path.stem, _THUMBNAIL_AFFIX.sub("", path.stem)} & stems:
            raise DatasetMismatch(
                f"{path.as_posix()} lies in a folder of thumbnails, and there is no other {path.stem}: "
                "rename the folder if it holds images of their own, or move it away"
            )
    return {path.as_posix() for path in large}
