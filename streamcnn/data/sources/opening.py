"""Opening of images of any format, recognised by content rather than by ending.

Only slides are recognised by their ending, as most are TIFF files that OpenSlide reads better.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from streamcnn.data.sources.base import ImageSource
from streamcnn.data.sources.choice import ImageChoice
from streamcnn.data.sources.files import MAX_PIXELS, opening, regular
from streamcnn.data.sources.guard import MissingChunks
from streamcnn.data.sources.layout import told
from streamcnn.data.sources.memory import ArraySource
from streamcnn.data.sources.ome import is_ome_image
from streamcnn.data.sources.picture import FORMATS, PictureSource
from streamcnn.data.sources.places import (
    ZARR_FILES,
    holds_zarr,
    is_zarr_zip,
    place,
    remote_store,
    zarr_object,
)
from streamcnn.data.sources.remote import RemoteFile, trouble
from streamcnn.data.sources.slide import SlideSource
from streamcnn.data.sources.tiff import TiffSource
from streamcnn.data.sources.zarr import ZarrSource
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.support.text import without_secrets

_SLIDES = (".bif", ".czi", ".dcm", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".vms", ".vmu")
_TIFFS = (".btf", ".tf2", ".tf8", ".tif", ".tiff")
_ZIP = b"PK\x03\x04"
_MAGIC = {
    "npy": (b"\x93NUMPY",),
    "tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "picture": (
        *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF87a", b"GIF89a", b"RIFF"),
        *(f"P{digit}{space}".encode() for digit in range(1, 7) for space in " \t\n\r"),
    ),
}
_ALLOWED = (
    "folders of a zarr array or an OME-Zarr image, zip files of one, .npy files, TIFF files, pictures "
    f"({', '.join(FORMATS)}) and slides ({', '.join(_SLIDES)})"
)


def open_image(
    path: str | Path,
    *,
    level: int = 0,
    channels_last: bool | None = None,
    series: int | None = None,
    index: Mapping[str, int] | None = None,
    missing_chunks: MissingChunks = "some",
    max_pixels: int = MAX_PIXELS,
) -> ImageSource:
    """Open the image at ``path`` as a source that reads it region by region.

    Parameters
    ----------
    path
        File, folder of a zarr array or OME-Zarr image, or zip file of one, also with ``~`` and ``file://``;
        or URL of a remote zarr array, OME-Zarr image or TIFF file.
    level
        Resolution of a TIFF pyramid, an OME-Zarr image or a slide; 0 is full.
    channels_last
        Whether the channels are the last of three axes or the first, if the file does not say it; if it does,
        this may only agree.
    series
        Which image of a TIFF file or OME-Zarr folder that holds several; by default the largest one of full
        resolution that is not a macro, label or thumbnail, in a folder by bioformats2raw the first such one.
    index
        Plane to take of each axis of a zarr array longer than 1 other than rows, columns and channels, by
        name, as in ``{"t": 0}``.
    missing_chunks
        How to treat missing chunks of a zarr array: see `ZarrSource`.
    max_pixels
        Largest number of pixels of anything that is decoded whole: a picture, a tile or strip, a chunk.

    Raises
    ------
    CorruptImage
        If there is nothing at the path, or it is damaged or not an image.
    DatasetMismatch
        If there is no such level, series or plane, an option does not apply to the format, pixels or axes
        are unsupported or uncertain, or the image is too large.
    MissingExtra
        If the format or the location needs a package that is not installed.
    """
    where = place(path)
    kind = _kind(where)
    path = without_secrets(str(path))
    if series not in (None, 0) and kind in ("npy", "picture", "slide"):
        raise DatasetMismatch(
            f"{path} is no TIFF or OME-Zarr: allowed is series 0; leave series= out, or give --series 0"
        )
    if level != 0 and kind in ("npy", "picture"):
        raise DatasetMismatch(
            f"{path} has one resolution: allowed is level 0; leave level= out, or give --level 0"
        )
    if channels_last is not None and kind in ("picture", "slide"):
        raise DatasetMismatch(
            f"{path} is a {kind}, whose format says where the channels are: leave {told(channels_last)} out"
        )
    if index and kind in ("npy", "picture", "slide", "tiff"):
        raise DatasetMismatch(f"{path} is no zarr array: planes are taken of these alone; leave index= out")
    match kind:
        case "zarr":
            return ZarrSource(
                where,
                channels_last=channels_last,
                level=level,
                series=series,
                index=index,
                missing_chunks=missing_chunks,
                max_pixels=max_pixels,
            )
        case "npy":
            return ArraySource(where, channels_last=channels_last)
        case "tiff":
            return TiffSource(
                where, series=series, level=level, channels_last=channels_last, max_pixels=max_pixels
            )
        case "slide":
            return SlideSource(where, level=level)
        case "picture":
            return PictureSource(where, max_pixels=max_pixels)
    raise CorruptImage(f"{path} is {_found(where)}: allowed are {_ALLOWED}; convert the image")


def open_chosen(path: str | Path, choice: ImageChoice) -> ImageSource:
    """Open the image at ``path`` that ``choice`` selects, as `open_image` does.

    Raises
    ------
    CorruptImage, DatasetMismatch, MissingExtra
        As from `open_image`.
    """
    return open_image(path, series=choice.series, level=choice.level, channels_last=choice.channels_last)


def is_image(path: str | Path) -> bool:
    """Whether `open_image` supports what is at ``path``, which may still be damaged.

    A zarr group is an image only if it is an OME-Zarr image or a series by bioformats2raw, not if it merely
    contains images.

    Raises
    ------
    CorruptImage
        If there is nothing at the path, or access is denied.
    """
    where = place(path)
    kind = _kind(where)
    if kind == "zarr" and isinstance(where, Path) and where.is_dir():
        return not _is_mere_group(where)
    return kind is not None


def _kind(where: Path | str) -> str | None:
    with opening(str(where), "image"):
        if isinstance(where, str):
            return _kind_of_url(where)
        regular(where)
        if where.is_dir():
            return "zarr" if any((where / name).is_file() for name in ZARR_FILES) else None
        with where.open("rb") as file:
            head = file.read(16)
        if head.startswith(_ZIP) and is_zarr_zip(where):
            return "zarr"
    if where.suffix.lower() in _SLIDES:
        return "slide"
    return _kind_of_head(head)


def _kind_of_head(head: bytes) -> str | None:
    return next((kind for kind, starts in _MAGIC.items() if head.startswith(starts)), None)


def _kind_of_url(url: str) -> str:
    """The kind of a remote image: a zarr array or a TIFF file.

    Raises
    ------
    CorruptImage
        If it is something else.
    """
    is_named_tiff = PurePosixPath(urlsplit(url).path).suffix.lower() in _TIFFS
    if not is_named_tiff and holds_zarr(remote_store(url)):
        return "zarr"
    shown = without_secrets(url)
    try:
        head = RemoteFile(url).read(16)
    except FileNotFoundError as error:
        if trouble(error) is not None:
            raise
        raise CorruptImage(
            f"no image at {shown}: give the URL of a TIFF file, or of the folder that holds a zarr.json"
        ) from None
    kind = _kind_of_head(head)
    if kind == "tiff":
        return kind
    what = kind or ("zip file" if head.startswith(_ZIP) else "file")
    raise CorruptImage(
        f"{shown} is a {what}: allowed elsewhere than on this machine are TIFF files and folders of a zarr "
        "array or an OME-Zarr image; download it, or write it as one"
    )


def _is_mere_group(folder: Path) -> bool:
    """Whether a zarr folder is a group but not an image; False if its metadata cannot be read."""
    try:
        if not (folder / "zarr.json").is_file():
            attributes = folder / ".zattrs"
            found = zarr_object(attributes) if attributes.is_file() else {}
            return not (folder / ".zarray").is_file() and not is_ome_image(found)
        metadata = zarr_object(folder / "zarr.json")
    except (CorruptImage, OSError):
        return False
    attributes_of_v3 = metadata.get("attributes")
    is_image = isinstance(attributes_of_v3, dict) and is_ome_image(attributes_of_v3)
    return metadata.get("node_type") == "group" and not is_image


def _found(where: Path | str) -> str:
    assert isinstance(where, Path), "what is elsewhere has a kind"
    if where.is_dir():
        return f"a folder without {', '.join(ZARR_FILES)}"
    with where.open("rb") as file:
        head = file.read(16)
    return f"no image that is known (it begins with {head!r})" if head else "an empty file"
