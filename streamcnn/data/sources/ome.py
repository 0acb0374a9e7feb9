"""OME-Zarr groups: which array is a level of the image, and what its axes are (OME-NGFF 0.4 and 0.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import zarr

from streamcnn.data.sources.guard import ZarrArray
from streamcnn.errors import CorruptImage, DatasetMismatch

_OLD_AXES = ("t", "c", "z", "y", "x")  # before version 0.3 there were always these five


def is_ome_image(attributes: Mapping[str, Any]) -> bool:
    """Whether a group with these attributes is an image in several resolutions."""
    return "multiscales" in _metadata(attributes)


def open_level(name: str, group: zarr.Group, level: int) -> tuple[ZarrArray, tuple[str, ...]]:
    """A level's array and the names of its axes; level 0 is the full resolution.

    Raises
    ------
    CorruptImage
        If the group holds no image, or its metadata is damaged.
    DatasetMismatch
        If there is no such level.
    """
    metadata = _metadata(dict(group.attrs))
    if "multiscales" not in metadata:
        members = ", ".join(sorted(group.keys())[:5]) or "nothing"
        raise CorruptImage(
            f"{name} is a zarr group that says nothing of an image, with {members} inside: allowed are "
            "arrays and OME-Zarr images; give the folder of one"
        )
    try:
        image = metadata["multiscales"][0]
        paths = [dataset["path"] for dataset in image["datasets"]]
        axes = tuple(axis if isinstance(axis, str) else axis["name"] for axis in image.get("axes", _OLD_AXES))
    except (AttributeError, LookupError, TypeError) as error:
        raise _damaged(name, f"its OME metadata lacks {error}") from error
    if not 0 <= level < len(paths):
        raise DatasetMismatch(f"{name} has no level {level}: allowed are 0..{len(paths) - 1}")
    array = group.get(paths[level])
    if not isinstance(array, zarr.Array):
        raise _damaged(name, f"there is no array {paths[level]!r}, which should be level {level}")
    return array, axes


def _metadata(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """From 0.5 on everything lies under one key."""
    nested = attributes.get("ome")
    return nested if isinstance(nested, Mapping) else attributes


def _damaged(name: str, what: str) -> CorruptImage:
    return CorruptImage(f"cannot open {name} as an OME-Zarr image: {what}; copy the image again")
