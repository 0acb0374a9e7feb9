"""Search for image files in folders, and their names in a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamcnn.data.companions import is_hidden, parts_of_others, without_thumbnails
from streamcnn.data.dicom import is_dicom
from streamcnn.data.scans import Scan, one_of_each, raw_image
from streamcnn.data.sources import is_image
from streamcnn.data.sources.files import opening
from streamcnn.data.sources.places import local_path
from streamcnn.data.store_names import distinct_names
from streamcnn.data.tile_store import check_names, is_tile_store
from streamcnn.errors import CorruptImage, DatasetMismatch, some

_IMAGES = frozenset(
    ".avif .bmp .bif .btf .cr2 .czi .dcm .dib .dng .ecw .exr .gif .hdr .heic .heif .img .j2k .jfif .jp2 .jpe "
    ".jpeg .jpf .jpg .jpx .jxl .jxr .lif .mha .mhd .mrxs .n5 .nd2 .ndpi .nef .nii .npy .npz .nrrd .oib .oif "
    ".oir .pbm .pcx .pgm .png .pnm .ppm .psd .ras .scn .sid .svs .svslide .tf8 .tga .tif .tiff .vms .vmu "
    ".webp .xcf .zarr .zvi".split()
)
"""Endings of image files, whether or not the format is supported."""


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image that was found, and the name that it will have in the store."""

    name: str
    path: Path
    """Path to open."""
    relative: str
    """Path relative to the given folder, with its ending."""
    others: tuple[Path, ...] = ()
    """Further files of an image that consists of several."""


def find_images(paths: Sequence[Path], series: int | None = None) -> list[FoundImage]:
    """Find all images among ``paths`` and in folders below them, sorted by name.

    The name in the store is the path relative to the given folder, with %XX for characters other than ASCII
    letters, digits and ``_.() -``, and with its ending if two names would otherwise be equal.

    In a folder written by bioformats2raw, ``series`` selects the image; by default it is the only one besides
    those of the label and the glass. A scan in several files is one image. Files that only belong to an
    image, hidden files and folders of thumbnails are not images.

    Raises
    ------
    CorruptImage
        If a path does not exist, is not on this machine or holds no image, or a file has an image's ending
        but no known format.
    DatasetMismatch
        If two images would have the same name, one's name would be a folder of another's, an image would
        occur twice, or an image consists of several files that cannot be read together.
    """
    found: dict[str, tuple[Path, Scan]] = {}
    for given, scan in _scans_of([local_path(path) for path in paths], series):
        _, known = found.setdefault(scan.key, (given, scan))
        if known.shown != scan.shown:
            raise DatasetMismatch(
                f"{known.shown} and {scan.shown} are one image ({scan.key}): keep one of them, or put its "
                "files into one folder"
            )
    relatives = [
        (scan.shown.relative_to(given) if scan.shown != given else Path(scan.shown.name)).as_posix()
        for given, scan in found.values()
    ]
    names = distinct_names(relatives)
    by_name: dict[str, FoundImage] = {}
    for name, relative, (_, scan) in zip(names, relatives, found.values(), strict=True):
        image = FoundImage(name, scan.path, relative, scan.files_beside(scan.path))
        other = by_name.setdefault(name, image)
        if other is not image:
            raise DatasetMismatch(
                f"{other.path} and {image.path} would both be {name!r} in the store: give them in "
                "folders of their own, or rename one"
            )
    check_names(by_name)
    return [by_name[name] for name in sorted(by_name)]


def _scans_of(paths: Sequence[Path], series: int | None) -> list[tuple[Path, Scan]]:
    """The scans at all paths, each with the given path under which it was found."""
    found: list[tuple[Path, Scan]] = []
    files: dict[Path, list[Path]] = {}
    for given in paths:
        _require_image(given)
        if is_image(given) and not (given.is_dir() and raw_image(given, series) is not None):
            files.setdefault(given.parent, []).append(given)
            continue
        scans = _scans_below(given, series)
        if not scans:
            raise _none_known(given)
        kept = without_thumbnails([scan.shown.relative_to(given).as_posix() for scan in scans])
        found += [(given, scan) for scan in scans if scan.shown.relative_to(given).as_posix() in kept]
    for beside in files.values():
        parts = parts_of_others(beside)
        whole = [path for path in beside if path not in parts]
        if not whole:
            raise DatasetMismatch(f"{beside[0]} is a part of another image; give that one")
        scans = one_of_each(whole)
        found += [(scan.shown, scan) for scan in scans]
    return found


def _require_image(given: Path) -> None:
    """Make sure that a path is an image, or a folder that may hold images."""
    if not given.exists():
        raise CorruptImage(f"there is nothing at {given}: give images or folders of images")
    if is_tile_store(given):
        raise DatasetMismatch(f"{given} is a tile store already: give the images that it was made from")
    if not is_image(given) and not given.is_dir():
        raise _none_known(given)


def _none_known(given: Path) -> CorruptImage:
    return CorruptImage(f"no image is known at {given}{_content(given)}: see docs/images.md for the formats")


def _scans_below(folder: Path, series: int | None, above: Sequence[Path] = ()) -> list[Scan]:
    """The scans in a folder and its subfolders, except those that are images themselves, or tile stores.

    A link to one of the folders ``above`` it is skipped, as all images there are found anyway.
    """
    raw = raw_image(folder, series)
    if raw is not None:
        return [Scan(raw, folder, f"the image {folder.resolve()}", (raw,))]
    with opening(str(folder), "folder of images"):
        entries = sorted(path for path in folder.iterdir() if not is_hidden(path))
    entries = [path for path in entries if not _is_broken_link(path)]
    parts = parts_of_others(entries)
    images, unknown, below = [], [], []
    for path in entries:
        if path in parts or is_tile_store(path):
            continue
        if path.is_dir() and (not is_image(path) or raw_image(path, series) is not None):
            below.append(path)
        elif is_image(path):
            images.append(path)
        elif path.suffix.lower() in _IMAGES or (not path.suffix and is_dicom(path)):
            unknown.append(path)
    _refuse_unknown(folder, unknown)
    _refuse_loose_levels(folder, images)
    found = one_of_each(images)
    around = (*above, folder)
    for path in below:
        if path.is_symlink() and any(path.samefile(each) for each in around):
            continue
        inside = _scans_below(path, series, around)
        if not inside and path.suffix.lower() in _IMAGES:
            _refuse_unknown(folder, [path])
        found += inside
    return found


def _is_broken_link(path: Path) -> bool:
    """Whether a path is a broken link; one that may have led to an image or a folder is refused.

    Raises
    ------
    CorruptImage
        If the broken link has the name of an image or a folder.
    """
    if not path.is_symlink() or path.exists():
        return False
    if path.suffix.lower() in _IMAGES or not path.suffix:
        raise CorruptImage(
            f"{path} is a link to {path.readlink()}, where there is nothing: put back what was there, or "
            "remove the link"
        )
    return True


def _refuse_unknown(folder: Path, unknown: Sequence[Path]) -> None:
    """Refuse files with an image's ending but no supported format, rather than skip them."""
    if unknown:
        described = some([path.name for path in unknown])
        raise CorruptImage(
            f"{folder} holds {described}, called like an image and none that is known{_content(unknown[0])}: "
            "see docs/images.md for the formats; convert it, copy it again, or move it away"
        )


def _content(path: Path) -> str:
    """The first bytes of a file as text, in brackets."""
    if path.is_dir():
        return " (a folder with no image in it)" if any(path.iterdir()) else " (an empty folder)"
    with opening(str(path), "image"), path.open("rb") as file:
        head = file.read(16)
    return f" (it begins with {head!r})" if head else " (it is empty)"


def _refuse_loose_levels(folder: Path, images: Sequence[Path]) -> None:
    """Refuse arrays 0, 1, 2 of one zarr group, which may be images or levels of one image."""
    arrays = [path.name for path in images if path.name.isdecimal() and path.is_dir()]
    if len(arrays) > 1 and any((folder / name).is_file() for name in ("zarr.json", ".zgroup")):
        raise DatasetMismatch(
            f"{folder} is a zarr group with the arrays {some(arrays)}, which may be images or levels of one: "
            "allowed are OME-Zarr images, and arrays with names; give the arrays one by one"
        )
