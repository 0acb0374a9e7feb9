"""Names of splits in the spellings that people use for training, validation and test images."""

from __future__ import annotations

import re
import unicodedata

_WORDS = {
    "train": ("train", "training", "trn", "tr"),
    "val": ("val", "valid", "validate", "validation", "dev", "devel", "development"),
    "test": ("test", "testing", "tst", "te"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
_AFFIX = "(?:data|dataset|files|images?|imgs?|samples|sets?|splits?)?"
_NAMED = re.compile(f"{_AFFIX}({'|'.join(_SPLITS)}){_AFFIX}")
_PARTS = {"eval", "evaluation", "heldout", "holdout", "unlabeled", "unlabelled"}
_NUMBERED_PARTS = {
    "crossvalidation",
    "cv",
    "cvfold",
    "fold",
    "folds",
    "kfold",
    "partition",
    "split",
    "subset",
}


def canonical(text: str) -> str:
    """``"train"``, ``"val"`` or ``"test"`` for any of its spellings; any other name unchanged.

    Case, separators and words such as "set" do not matter; digits do.
    """
    return _split_of(re.sub(r"[\W_]+", "", _plain(text))) or text


def split_of_folder(name: str) -> str | None:
    """The split that a folder's name means, ignoring digits; None if it means none."""
    return _split_of(re.sub(r"[\W\d_]+", "", _plain(name)))


def is_some_part(name: str) -> bool:
    """Whether a folder's name means a part of the data, such as a fold, but no split."""
    words = re.sub(r"[\W\d_]+", "", _plain(name))
    return words in _PARTS or (words in _NUMBERED_PARTS and re.search(r"\d", name) is not None)


def split_within(name: str) -> str | None:
    """The split that the first or the last word of a folder's name means, as in ``train_cat``."""
    words = [word for word in re.split(r"[\W\d_]+", _plain(name)) if word]
    if len(words) < 2:
        return None
    return _split_of(words[0]) or _split_of(words[-1])


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _split_of(word: str) -> str | None:
    found = _NAMED.fullmatch(word)
    return None if found is None else _SPLITS[found.group(1)]
