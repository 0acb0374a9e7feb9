"""OME-Zarr groups: the arrays of an image's levels, and their axes (OME-NGFF 0.4 and 0.5).

bioformats2raw writes a group of such images, the series, some of which may be a slide's label or overview.
The names of the series are in an OME-XML file beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from streamcnn.data.sources.axes import Axes
from streamcnn.data.sources.guard import ZarrArray
from streamcnn.data.sources.placement import spacing_of_ome
from streamcnn.data.sources.places import check_stored
from streamcnn.data.sources.series import SeriesFacts
from streamcnn.errors import CorruptImage, DatasetMismatch

_OLD_AXES = ("t", "c", "z", "y", "x")  # before version 0.3 these five axes were implied
_SERIES = "bioformats2raw.layout"
_OTHER_GROUPS = {
    "plate": "a plate of many images",
    "well": "a well of many images",
    "labels": "a group of label images",
}
_NO_SLIDE = re.compile(r"\b(label|macro|overview|thumbnail)\b", re.IGNORECASE)
_XML_BYTES = 2**26


def is_ome_image(attributes: Mapping[str, Any]) -> bool:
    """Whether a group with these attributes is an image in several resolutions, or a series of them."""
    metadata = _metadata(attributes)
    return "multiscales" in metadata or _SERIES in metadata


def open_level(name: str, group: zarr.Group, level: int, series: int | None) -> tuple[ZarrArray, Axes | None]:
    """Open a level's array, with its axes or None if they are not named; level 0 is the full resolution.

    Parameters
    ----------
    name : name of the image in messages
    series : which of several images; by default the first that is not a slide's label or overview

    Raises
    ------
    CorruptImage
        If the group holds no image, or its metadata is damaged.
    DatasetMismatch
        If there is no such level or series.
    """
    group, metadata, number = _chosen(name, group, series)
    paths, axes = _levels(name, metadata, number)
    if not 0 <= level < len(paths):
        raise DatasetMismatch(f"{name} has no level {level}: allowed are 0..{len(paths) - 1}")
    return _array(name, group, paths, level), axes


def level_spacing(
    name: str, group: zarr.Group, level: int, series: int | None
) -> tuple[tuple[float, float], str] | None:
    """Height and width of a pixel of an existing level, and their unit; None if the group has none."""
    _, metadata, number = _chosen(name, group, series)
    return spacing_of_ome(_images(name, metadata)[number], level)


def _chosen(name: str, group: zarr.Group, series: int | None) -> tuple[zarr.Group, Mapping[str, Any], int]:
    """The group of the chosen image, its metadata, and the image's index in there."""
    metadata = _metadata(dict(group.attrs))
    if _SERIES in metadata and "multiscales" not in metadata:
        group, metadata, series = _series(name, group, metadata, series)
    if "multiscales" not in metadata:
        raise _no_image(name, group, metadata)
    number = len(_images(name, metadata))
    if series and not 0 <= series < number:
        raise DatasetMismatch(f"{name} has no series {series}: allowed are 0..{number - 1}")
    return group, metadata, series or 0


def ome_series(name: str, group: zarr.Group) -> list[SeriesFacts]:
    """All images of a group: the series of bioformats2raw, or those of one OME-Zarr group.

    Raises
    ------
    CorruptImage
        If the group holds no image, or its metadata is damaged.
    """
    metadata = _metadata(dict(group.attrs))
    if _SERIES in metadata and "multiscales" not in metadata:
        paths, titles = _series_paths(group, metadata), _titles(group)
        default = _default_series(paths, titles)
        found = []
        for number, path in enumerate(paths):
            image = _series_group(name, group, path, number)
            sizes = _sizes(name, image, _metadata(dict(image.attrs)), 0)
            found.append(SeriesFacts(number, titles.get(number, ""), sizes, number == default))
        return found
    if "multiscales" not in metadata:
        raise _no_image(name, group, metadata)
    return [
        SeriesFacts(number, _name_of(image), _sizes(name, group, metadata, number), number == 0)
        for number, image in enumerate(_images(name, metadata))
    ]


def _images(name: str, metadata: Mapping[str, Any]) -> list[Any]:
    images = metadata["multiscales"]
    if not isinstance(images, list) or not images:
        raise _damaged(name, "its OME metadata lacks a list of images")
    return images


def _name_of(image: Any) -> str:
    said = image.get("name") if isinstance(image, Mapping) else None
    return said if isinstance(said, str) else ""


def _levels(name: str, metadata: Mapping[str, Any], number: int) -> tuple[list[str], Axes | None]:
    """The paths of an image's levels, and its axes if they are named."""
    try:
        image = _images(name, metadata)[number]
        paths = [dataset["path"] for dataset in image["datasets"]]
        axes = image.get("axes", _OLD_AXES)
        names = [axis if isinstance(axis, str) else axis["name"] for axis in axes]
        types = [None if isinstance(axis, str) else axis.get("type") for axis in axes]
    except (AttributeError, LookupError, TypeError) as error:
        raise _damaged(name, f"its OME metadata lacks {error}") from error
    return paths, Axes.of_names(names, types)


def _array(name: str, group: zarr.Group, paths: list[str], level: int) -> ZarrArray:
    array = group.get(paths[level])
    if not isinstance(array, zarr.Array):
        raise _damaged(name, f"there is no array {paths[level]!r}, which should be level {level}")
    return array


def _sizes(
    name: str, group: zarr.Group, metadata: Mapping[str, Any], number: int
) -> tuple[tuple[int, int], ...]:
    """Height and width of each level of an image."""
    paths, axes = _levels(name, metadata, number)
    shapes = [_array(name, group, paths, level).shape for level in range(len(paths))]
    letters = () if axes is None else axes.letters
    known = "Y" in letters and "X" in letters and all(len(shape) == len(letters) for shape in shapes)
    rows, cols = (letters.index("Y"), letters.index("X")) if known else (-2, -1)
    return tuple((shape[rows], shape[cols]) for shape in shapes)


def _series(
    name: str, group: zarr.Group, metadata: Mapping[str, Any], series: int | None
) -> tuple[zarr.Group, Mapping[str, Any], int]:
    """One image of a group by bioformats2raw, its metadata, and the index of the image in there."""
    paths = _series_paths(group, metadata)
    titles = _titles(group)
    if series is None:
        series = _default_series(paths, titles)
    if not 0 <= series < len(paths):
        named = ", ".join(f"{n}{f' ({titles[n]})' if titles.get(n) else ''}" for n, _ in enumerate(paths))
        raise DatasetMismatch(f"{name} has no series {series}: allowed are {named or 'none'}")
    image = _series_group(name, group, paths[series], series)
    return image, _metadata(dict(image.attrs)), 0


def _default_series(paths: list[str], titles: Mapping[int, str]) -> int:
    """The first image that is not a slide's label or overview."""
    slides = [n for n, _ in enumerate(paths) if not _NO_SLIDE.search(titles.get(n, ""))]
    return slides[0] if slides else 0


def _series_group(name: str, group: zarr.Group, path: str, series: int) -> zarr.Group:
    image = group.get(path)
    if not isinstance(image, zarr.Group):
        raise _damaged(name, f"there is no group {path!r}, which should be series {series}")
    return image


def _series_paths(group: zarr.Group, metadata: Mapping[str, Any]) -> list[str]:
    """The paths of the series: those in the group OME or, without these, the groups 0, 1, 2, ..."""
    listing = group.get("OME")
    said: Any = None
    if isinstance(listing, zarr.Group):
        said = _metadata(dict(listing.attrs)).get("series")
    said = said if isinstance(said, list) else metadata.get("series")
    if isinstance(said, list) and all(isinstance(path, str) for path in said):
        return said
    paths: list[str] = []
    while isinstance(group.get(str(len(paths))), zarr.Group):
        paths.append(str(len(paths)))
    return paths


def _titles(group: zarr.Group) -> dict[int, str]:
    """Names of the series that have one, by number."""
    key = f"{group.path}/OME/METADATA.ome.xml".removeprefix("/")
    check_stored(group.store, key, _XML_BYTES)
    found = sync(group.store.get(key, default_buffer_prototype()))
    if found is None:
        return {}
    try:
        root = ElementTree.fromstring(found.to_bytes())
    except ElementTree.ParseError as error:
        raise _damaged(str(group.store_path), f"{key}: {error}") from error
    images = [element for element in root if element.tag.rpartition("}")[2] == "Image"]
    return {number: image.get("Name", "") for number, image in enumerate(images)}


def _no_image(name: str, group: zarr.Group, metadata: Mapping[str, Any]) -> CorruptImage:
    for key, what in _OTHER_GROUPS.items():
        if key in metadata:
            return CorruptImage(
                f"{name} is {what}: allowed is one image; give the folder of one inside of it"
            )
    members = ", ".join(sorted(group.keys())[:5]) or "nothing"
    return CorruptImage(
        f"{name} is a zarr group that says nothing of an image, with {members} inside: allowed are "
        "arrays and OME-Zarr images; give the folder of one"
    )


def _metadata(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """A group's OME metadata, which from version 0.5 on is under one key."""
    nested = attributes.get("ome")
    return nested if isinstance(nested, Mapping) else attributes


def _damaged(name: str, what: str) -> CorruptImage:
    return CorruptImage(f"cannot open {name} as an OME-Zarr image: {what}; copy the image again")
