"""Images of single digits for generated pictures: MNIST, other IDX files, or scikit-learn's UCI digits.

Each source gives two sets without a common image, for training and for testing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamcnn.data.ultramnist.idx import DOWNLOAD_SHA256, PAIRS, IdxPair, read_pair
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.support.extras import require

_NUM_DIGITS = 10
_INK = 128  # the lowest of 255 grey levels that counts as ink
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_NO_MNIST = (
    "no MNIST digits were given: using scikit-learn's UCI digits, which are fewer and coarser; "
    "name a folder with MNIST's IDX files, or 'mnist' to download them"
)

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class DigitSet:
    """Images of single digits for one split, read-only.

    ``images`` is bool ``(n, 28, 28)``, True is ink; ``labels`` is uint8 ``(n,)``, 0 to 9.
    """

    images: Mask
    labels: NDArray[np.uint8]

    def of(self, value: int) -> NDArray[np.intp]:
        """Positions of the images that show ``value``, ascending."""
        return np.flatnonzero(self.labels == value)


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Images of single digits for both splits; no image is in both.

    Parameters
    ----------
    name : str
        "mnist" for MNIST's own images, "uci" for scikit-learn's, "idx" for those of other IDX files.
    fingerprint : str
        SHA-256 over images and labels of both splits, in hexadecimal.
    train, test : DigitSet
        Every digit is in both.
    notes : tuple of str
        Notes to show to the user.
    """

    name: str
    fingerprint: str
    train: DigitSet
    test: DigitSet
    notes: tuple[str, ...]

    def split(self, name: str) -> DigitSet:
        """The images for ``"train"`` or ``"test"``.

        Raises
        ------
        ValueError
            If the name is neither.
        """
        if name not in PAIRS:
            raise ValueError(f"unknown split {name!r}: allowed are {' and '.join(map(repr, PAIRS))}")
        return self.train if name == "train" else self.test


def load_digits(source: str | Path | None) -> Digits:
    """Load images of digits, as two sets without a common image.

    Parameters
    ----------
    source : str, Path or None
        A folder with MNIST's four IDX files, plain or compressed, or with one pair of them, which is then
        divided; ``"mnist"`` to download them into the user's cache; ``"uci"`` for scikit-learn's bundled
        digits. None is ``"uci"`` with a note that says so.

    Raises
    ------
    DatasetMismatch
        If the folder or one of its files is missing, or the files do not hold digits of 28 by 28 pixels.
    CorruptImage
        If a file is damaged or the download fails.
    MissingExtra
        If scikit-learn or pooch is needed and not installed.
    """
    if source is None:
        return dataclasses.replace(_load_uci(), notes=(_NO_MNIST,))
    if source == "uci":
        return _load_uci()
    return _load_folder(_download_mnist() if source == "mnist" else Path(source))


def _load_folder(folder: Path) -> Digits:
    if not folder.is_dir():
        raise DatasetMismatch(
            f"no folder {folder}: name one with MNIST's IDX files, or 'mnist' to download them, or 'uci'"
        )
    train, test = (read_pair(folder, split) for split in PAIRS)
    given = [pair for pair in (train, test) if pair is not None]
    notes = [
        f"{path}: SHA-256 differs from MNIST's published file" for pair in given for path in pair.unpublished
    ]
    name = "idx" if notes else "mnist"
    if train is not None and test is not None:
        return _make_digits(name, _threshold(train), _threshold(test), notes, str(folder))
    if not given:
        wanted = ", ".join(file for pair in PAIRS.values() for file in pair)
        raise DatasetMismatch(f"no digits in {folder}: expected are {wanted}, each also with .gz")
    found = "train" if test is None else "t10k"
    notes.append(f"{folder} has the {found} files only: they are divided into training and test digits")
    return _make_digits(name, *_divide(_threshold(given[0])), notes, str(folder))


def _threshold(pair: IdxPair) -> DigitSet:
    return DigitSet(pair.images >= _INK, pair.labels)


def _load_uci() -> Digits:
    scans = require("sklearn.datasets", extra="demo").load_digits()
    whole = DigitSet(_enlarge(scans.images.astype(np.int64)), scans.target.astype(np.uint8))
    return _make_digits("uci", *_divide(whole), [], "scikit-learn's digits")


def _enlarge(scans: NDArray[np.int64]) -> Mask:
    """Scans ``(n, 8, 8)`` of 16 grey levels, interpolated linearly to 28 by 28; more than 7 is ink.

    In integers, as a sum of floats at the threshold would depend on the order of summation.
    """
    # The centre of pixel i lies at (4 i - 5) / 14 on the axis of the 8 samples.
    centres = (4 * np.arange(28, dtype=np.int64) - 5).clip(0, 14 * 7)
    weights = (14 - abs(centres[:, None] - 14 * np.arange(8, dtype=np.int64))).clip(0)
    return np.asarray(weights @ scans @ weights.T > 7 * 14**2)


def _divide(whole: DigitSet) -> tuple[DigitSet, DigitSet]:
    """Two halves without a common image: every other image of each digit, the first to training."""
    for_test = np.zeros(whole.labels.shape, dtype=np.bool_)
    for value in range(_NUM_DIGITS):
        for_test[whole.of(value)[1::2]] = True
    train, test = (DigitSet(whole.images[part], whole.labels[part]) for part in (~for_test, for_test))
    return train, test


def _make_digits(name: str, train: DigitSet, test: DigitSet, notes: list[str], origin: str) -> Digits:
    digest = hashlib.sha256()
    for split, part in (("training", train), ("test", test)):
        missing = [str(value) for value in range(_NUM_DIGITS) if not part.of(value).size]
        if missing:
            raise DatasetMismatch(
                f"the {split} digits of {origin} show no {', '.join(missing)}: every digit is needed"
            )
        digest.update(f"{len(part.labels)}\n".encode() + part.images.tobytes() + part.labels.tobytes())
        part.images.setflags(write=False)
        part.labels.setflags(write=False)
    return Digits(name, digest.hexdigest(), train, test, tuple(notes))


def _download_mnist() -> Path:
    """The folder in the user's cache with MNIST's files; missing ones are downloaded."""
    pooch = require("pooch", extra="ultramnist")
    folder = Path(pooch.os_cache("streamcnn"))
    files = {f"{name}.gz": f"sha256:{digest}" for name, digest in DOWNLOAD_SHA256.items()}
    registry = pooch.create(path=folder, base_url=MNIST_URL, registry=files)
    try:
        for file in files:
            registry.fetch(file)
    except (OSError, ValueError) as error:
        raise CorruptImage(
            f"cannot download MNIST from {MNIST_URL}: {error}; get its four files and name their folder"
        ) from error
    return folder
