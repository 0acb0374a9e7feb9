"""Classes and splits of images from the names of their folders; ambiguous folders are refused."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from streamcnn.data.splits import is_some_part, split_of_folder, split_within
from streamcnn.errors import DatasetMismatch, some

_TABLE = "or name images, labels and splits in a CSV file"
_NO_CLASSES = {"annotation", "annotations", "label", "labels", "mask", "masks"}
"""Names of folders that hold no images to classify."""

PathParts = tuple[str, ...]


def classes_in_folders(folder: Path, relatives: Sequence[str]) -> list[tuple[str, str | None]]:
    """Class and split of each image, from the names of its topmost folders.

    Parameters
    ----------
    folder
        The folder that was given as a data set.
    relatives
        Paths of the images relative to it, with forward slashes.

    Raises
    ------
    DatasetMismatch
        If an image is not in the folder of a class, or folders could be splits as well as classes.
    """
    # Accents in one name may be encoded in two ways, depending on the system that wrote it.
    parts = [PurePosixPath(unicodedata.normalize("NFC", relative)).parts for relative in relatives]
    _refuse_loose(folder, relatives, parts, depth=1)
    splits = _splits(folder, parts)
    if splits is None:
        _refuse_doubtful_classes(folder, parts)
        return [(part[0], None) for part in parts]
    _refuse_loose(folder, relatives, parts, depth=2)
    below = [part[1:] for part in parts]
    _refuse_splits_below(folder, below)
    found = [(part[1], splits[part[0]]) for part in parts]
    _refuse_foreign_classes(folder, found)
    return [(name, split) for name, split in found]


def _refuse_loose(folder: Path, relatives: Sequence[str], parts: Sequence[PathParts], *, depth: int) -> None:
    loose = [relative for relative, part in zip(relatives, parts, strict=True) if len(part) <= depth]
    if loose:
        raise DatasetMismatch(
            f"{folder} has images in no folder of a class: {some(loose)}; move them into one, or name "
            "images and labels in a CSV file"
        )


def _splits(folder: Path, parts: Sequence[PathParts]) -> dict[str, str] | None:
    """The split of each topmost folder; None if these are classes."""
    tops = sorted({part[0] for part in parts})
    splits = {top: split for top in tops if (split := split_of_folder(top)) is not None}
    if len(splits) == len(tops):
        _refuse_one_split_twice(folder, splits)
        return splits
    vague = [top for top in tops if top not in splits and is_some_part(top)]
    others = [top for top in tops if top not in splits and top not in vague]
    if vague and len(vague) + len(splits) >= 2:
        raise DatasetMismatch(
            f"{folder} has the folders {some(vague)}, which name parts of the data and neither classes nor "
            f"splits: allowed are train, val and test; rename them, {_TABLE}"
        )
    nested = {part[0] for part in parts if len(part) > 2}
    # If it is the only such name, "train" may be the vehicle.
    if splits and (set(splits.values()) != {"train"} or len(splits) > 1 or nested & set(splits)):
        raise DatasetMismatch(
            f"{folder} has the folders {some(sorted(splits))}, which are called like splits, beside "
            f"{some([*others, *vague])}: allowed are folders of splits with those of classes in each, or of "
            f"classes alone; move some, {_TABLE}"
        )
    return None


def _refuse_one_split_twice(folder: Path, splits: dict[str, str]) -> None:
    for split in set(splits.values()):
        same = [top for top, each in splits.items() if each == split]
        if len(same) > 1:
            raise DatasetMismatch(
                f"{folder} has the folders {some(same)}, which would all be the split {split!r}: allowed is "
                f"one for each split; put them together, {_TABLE}"
            )


def _refuse_doubtful_classes(folder: Path, parts: Sequence[PathParts]) -> None:
    """Refuse folders that would be classes but look like something else."""
    tops = sorted({part[0] for part in parts})
    _refuse_splits_below(folder, parts)
    within = {split_within(top) for top in tops}
    if None not in within and len(within) > 1:
        raise DatasetMismatch(
            f"{folder} has the folders {some(tops)}, whose names have splits in them: allowed are folders of "
            f"splits with those of classes in each, such as train/cat; rename them, {_TABLE}"
        )
    beside = [top for top in tops if top.casefold() in _NO_CLASSES]
    if beside and len(tops) > 1:
        raise DatasetMismatch(
            f"{folder} has the folders {some(tops)}, of which {some(beside)} would be a class of its own: "
            f"move it away, {_TABLE}"
        )
    _refuse_same_folders(folder, tops, parts)


def _refuse_same_folders(folder: Path, tops: Sequence[str], parts: Sequence[PathParts]) -> None:
    """Refuse topmost folders with the same subfolders: they are splits, or a superfluous level."""
    below = [{part[1].casefold() for part in parts if part[0] == top and len(part) > 2} for top in tops]
    common = sorted(set.intersection(*below)) if below else []
    if len(common) < 2:
        return
    if len(tops) == 1:
        raise DatasetMismatch(
            f"{folder} has the one folder {tops[0]!r}, with the folders {some(common)} in it: that would be "
            f"a single class; give {folder / tops[0]}, {_TABLE}"
        )
    raise DatasetMismatch(
        f"{folder} has the folders {some(tops)}, which all hold the folders {some(common)}: they look like "
        f"splits of the same classes; call them train, val and test, {_TABLE}"
    )


def _refuse_splits_below(folder: Path, parts: Sequence[PathParts]) -> None:
    """Refuse splits below classes: their images would be used for both training and testing."""
    below = {name: split for part in parts for name in part[1:-1] if (split := split_of_folder(name))}
    if len(set(below.values())) > 1:
        raise DatasetMismatch(
            f"{folder} has the folders {some(sorted(below))} below those of classes: allowed are folders of "
            f"splits above those of classes, such as train/cat; move them, {_TABLE}"
        )


def _refuse_foreign_classes(folder: Path, found: Sequence[tuple[str, str]]) -> None:
    """Refuse a split that shares no class with the training images."""
    classes: dict[str, set[str]] = {}
    for name, split in found:
        classes.setdefault(split, set()).add(name)
    known = classes.get("train", set())
    for split, names in classes.items():
        if known and not known & names:
            raise DatasetMismatch(
                f"{folder} has the classes {some(sorted(known))} in train, and none of them in {split}: it "
                f"has {some(sorted(names))}; give folders of the same classes, {_TABLE}"
            )
