"""Names of the classes of a segmentation, and scores printed under these names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamcnn.errors import DatasetMismatch, some
from streamcnn.metrics import SegmentationScore
from streamcnn.support.text import printable

_OTHERWISE = "name all classes from 0 on, or leave class_names out; on the command line a comma ends a name"


def require_names(names: Sequence[str]) -> None:
    """Make sure that ``names`` can be names of classes; their number is checked against the model later.

    Raises
    ------
    ValueError
        If there are none, or one is blank, not a text, or given to two classes.
    """
    if not names:
        raise ValueError(f"class_names={names!r}: allowed is a name for each class; {_OTHERWISE}")
    known: dict[str, int] = {}
    for label, name in enumerate(names):
        if not _is_text(name):
            raise ValueError(
                f"class_names: class {label} is called {name!r}: allowed is text in UTF-8 that is not blank; "
                f"{_OTHERWISE}"
            )
        other = known.setdefault(name, label)
        if other != label:
            raise ValueError(
                f"class_names: the classes {other} and {label} are both called {name!r}: allowed are names "
                f"of which no two are the same; {_OTHERWISE}"
            )


def require_as_many(names: Sequence[str], num_classes: int) -> None:
    """Make sure that there is a name for each class.

    Raises
    ------
    DatasetMismatch
        If not.
    """
    if len(names) != num_classes:
        raise DatasetMismatch(
            f"there are {len(names)} class_names ({some(names)}), and the model tells {num_classes} classes "
            f"apart: allowed is one for each; {_OTHERWISE}"
        )


def class_label(label: int, names: Sequence[str] | None) -> str:
    """A class's number, and its name if it has one."""
    return str(label) if names is None or label >= len(names) else f"{label} {names[label]}"


def class_lines(score: SegmentationScore, names: Sequence[str] | None) -> list[str]:
    """IoU and Dice as lines for a terminal, of each class that is in the masks or the predictions."""
    return [
        printable(f"  {class_label(label, names)}: IoU {iou:.1%}, Dice {dice:.1%}")
        for label, (iou, dice) in enumerate(zip(score.iou.tolist(), score.dice.tolist(), strict=True))
        if not math.isnan(iou)
    ]


def _is_text(name: object) -> bool:
    """Whether a name is a text that shows something when printed and can be written to files."""
    if not isinstance(name, str) or not name.strip():
        return False
    try:
        name.encode()
    except UnicodeEncodeError:  # an argument's bytes that are no UTF-8
        return False
    return True
