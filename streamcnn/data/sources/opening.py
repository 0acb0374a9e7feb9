"""One function that opens an image of any kind: by what is at the path, not by its ending.

Only slides are told by their ending, for most of them are TIFF files that OpenSlide knows better.
"""

from __future__ import annotations

import json
from pathlib import Path

from streamcnn.data.sources.base import ImageSource
from streamcnn.data.sources.files import opening
from streamcnn.data.sources.memory import ArraySource
from streamcnn.data.sources.ome import is_ome_image
from streamcnn.data.sources.picture import FORMATS, PictureSource
from streamcnn.data.sources.slide import SlideSource
from streamcnn.data.sources.tiff import TiffSource
from streamcnn.data.sources.zarr import ZarrSource
from streamcnn.errors import CorruptImage, DatasetMismatch

_SLIDES = (".bif", ".czi", ".dcm", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".vms", ".vmu")
_ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")
_MAGIC = {
    "npy": (b"\x93NUMPY",),
    "tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "picture": (
        *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF87a", b"GIF89a", b"RIFF"),
        *(f"P{digit}{space}".encode() for digit in range(1, 7) for space in " \t\n\r"),
    ),
}
_ALLOWED = (
    "folders of a zarr array or an OME-Zarr image, .npy files, TIFF files, pictures "
    f"({', '.join(FORMATS)}) and slides ({', '.join(_SLIDES)})"
)


def open_image(
    path: str | Path, *, level: int = 0, channels_last: bool | None = None, series: int | None = None
) -> ImageSource:
    """The image at ``path`` as a source that reads it region by region.

    Parameters
    ----------
    path
        File, or folder of a zarr array or OME-Zarr image.
    level
        Resolution of a TIFF pyramid, an OME-Zarr image or a slide; 0 is full.
    channels_last
        Whether the channels are the last of three axes or the first, where the file does not say it.
    series
        Which image of a TIFF file that holds several; by default the largest of full resolution that is no
        macro, label or thumbnail.

    Raises
    ------
    CorruptImage
        If there is nothing at the path, or it is damaged or no image.
    DatasetMismatch
        If there is no such level or series, or pixels or axes are not what a source can have.
    MissingExtra
        If the format needs a package that is not installed.
    """
    kind = _kind(Path(path))
    if series not in (None, 0) and kind != "tiff":
        raise DatasetMismatch(f"{path} is no TIFF: allowed is series 0; leave series= out")
    if level != 0 and kind in ("npy", "picture"):
        raise DatasetMismatch(f"{path} has one resolution: allowed is level 0; leave level= out")
    match kind:
        case "zarr":
            return ZarrSource(path, channels_last=channels_last, level=level)
        case "npy":
            return ArraySource(path, channels_last=channels_last)
        case "tiff":
            return TiffSource(path, series=series, level=level, channels_last=channels_last)
        case "slide":
            return SlideSource(path, level=level)
        case "picture":
            return PictureSource(path)
    raise CorruptImage(f"{path} is {_found(Path(path))}: allowed are {_ALLOWED}; convert the image")


def is_image(path: str | Path) -> bool:
    """Whether `open_image` knows what is at ``path``; it may still be damaged.

    A zarr group is an image only if it is an OME-Zarr image, not if it holds some.

    Raises
    ------
    CorruptImage
        If there is nothing at the path, or it may not be read.
    """
    folder = Path(path)
    kind = _kind(folder)
    return kind is not None and (kind != "zarr" or not _is_mere_group(folder))


def _kind(path: Path) -> str | None:
    with opening(str(path), "image"):
        if path.is_dir():
            return "zarr" if any((path / name).is_file() for name in _ZARR_FILES) else None
        with path.open("rb") as file:
            head = file.read(16)
    if path.suffix.lower() in _SLIDES:
        return "slide"
    return next((kind for kind, starts in _MAGIC.items() if head.startswith(starts)), None)


def _is_mere_group(folder: Path) -> bool:
    """Whether a zarr folder is a group of other things; False where its metadata cannot be read."""
    is_array_of_v2 = (folder / ".zarray").is_file()
    try:
        if not (folder / "zarr.json").is_file():
            attributes = folder / ".zattrs"
            found = json.loads(attributes.read_bytes()) if attributes.is_file() else {}
            return not is_array_of_v2 and not is_ome_image(found)
        metadata = json.loads((folder / "zarr.json").read_bytes())
        return metadata["node_type"] == "group" and not is_ome_image(metadata.get("attributes", {}))
    except (AttributeError, LookupError, OSError, TypeError, ValueError):
        return False


def _found(path: Path) -> str:
    if path.is_dir():
        return f"a folder without {', '.join(_ZARR_FILES)}"
    with path.open("rb") as file:
        head = file.read(16)
    return f"no image that is known (it begins with {head!r})" if head else "an empty file"
