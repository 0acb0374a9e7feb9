"""Digit sources: what is read, what is refused, and that training and test share no image."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import os
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits as load_scans

from streamcnn.data.ultramnist import Digits, DigitSet, digits, load_digits
from streamcnn.data.ultramnist.idx import CONTENT_SHA256, DOWNLOAD_SHA256, PAIRS
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.support.extras import MissingExtra

TRAIN_IMAGES, TRAIN_LABELS = PAIRS["train"]
TEST_IMAGES, TEST_LABELS = PAIRS["test"]
NAMES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)
NOT_MNISTS = "SHA-256 differs from MNIST's published file"
UCI_FINGERPRINT = "15fabc1146545d297ca23b4eca535bb16f46abc022892e7567ab908cc3deee95"


def make_images(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def make_labels(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).permutation(np.arange(count) % 10).astype(np.uint8)


def as_idx(array: NDArray[np.uint8]) -> bytes:
    """The IDX file of an array of unsigned bytes: type code 8, number of axes, extents, bytes."""
    header = [0x0800 + array.ndim, *array.shape]
    return b"".join(number.to_bytes(4, "big") for number in header) + array.tobytes()


def make_files() -> dict[str, bytes]:
    """Four files of random images: 40 for training, 30 for test."""
    return {
        TRAIN_IMAGES: as_idx(make_images(40, seed=0)),
        TRAIN_LABELS: as_idx(make_labels(40, seed=1)),
        TEST_IMAGES: as_idx(make_images(30, seed=2)),
        TEST_LABELS: as_idx(make_labels(30, seed=3)),
    }


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def images_of(part: DigitSet) -> set[bytes]:
    return {image.tobytes() for image in part.images}


def assert_usable(found: Digits) -> None:
    """Read-only bool images of all ten digits, labelled, and none of them in both splits."""
    for part in (found.train, found.test):
        assert part.images.dtype == np.bool_
        assert part.images.shape == (len(part.labels), 28, 28)
        assert part.labels.dtype == np.uint8
        assert set(part.labels.tolist()) == set(range(10))
        assert not part.images.flags.writeable
        assert not part.labels.flags.writeable
    assert not images_of(found.train) & images_of(found.test)


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name,
        lambda name: f"{name}.gz",
        lambda name: name.replace("-idx", ".idx"),
        lambda name: f"{name.replace('-idx', '.idx')}.gz",
    ],
)
def test_four_files_become_the_two_splits(tmp_path: Path, spell: Callable[[str], str]) -> None:
    for name, content in make_files().items():
        path = tmp_path / spell(name)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    found = load_digits(tmp_path)
    assert_usable(found)
    assert found.name == "idx"
    np.testing.assert_array_equal(found.train.images, make_images(40, seed=0) >= 128)
    np.testing.assert_array_equal(found.train.labels, make_labels(40, seed=1))
    np.testing.assert_array_equal(found.split("test").images, make_images(30, seed=2) >= 128)
    np.testing.assert_array_equal(found.split("test").labels, make_labels(30, seed=3))
    assert found.notes == tuple(f"{tmp_path / spell(name)}: {NOT_MNISTS}" for name in NAMES)


def test_positions_of_a_digit(tmp_path: Path) -> None:
    write(tmp_path, make_files())
    found = load_digits(str(tmp_path))
    for value in range(10):
        assert found.train.of(value).tolist() == [
            position for position, label in enumerate(found.train.labels) if label == value
        ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_pair_is_divided_digit_by_digit(tmp_path: Path, split: str) -> None:
    files = make_files()
    write(tmp_path, {name: files[name] for name in PAIRS[split]})
    found = load_digits(tmp_path)
    assert_usable(found)
    images, labels = (
        (make_images(40, seed=0), make_labels(40, seed=1))
        if split == "train"
        else (make_images(30, seed=2), make_labels(30, seed=3))
    )
    for value in range(10):
        shown = images[labels == value] >= 128
        np.testing.assert_array_equal(found.train.images[found.train.of(value)], shown[0::2])
        np.testing.assert_array_equal(found.test.images[found.test.of(value)], shown[1::2])
    file = {"train": "train", "test": "t10k"}[split]
    assert found.notes[-1] == (
        f"{tmp_path} has the {file} files only: they are divided into training and test digits"
    )


def test_published_content_makes_it_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_files()
    for name, content in files.items():
        monkeypatch.setitem(CONTENT_SHA256, name, hashlib.sha256(content).hexdigest())
    write(tmp_path, files)
    found = load_digits(tmp_path)
    assert (found.name, found.notes) == ("mnist", ())
    (tmp_path / TEST_LABELS).write_bytes(as_idx(make_labels(30, seed=9)))
    found = load_digits(tmp_path)
    assert (found.name, found.notes) == ("idx", (f"{tmp_path / TEST_LABELS}: {NOT_MNISTS}",))


@pytest.mark.skipif("STREAMCNN_MNIST" not in os.environ, reason="STREAMCNN_MNIST names no folder of MNIST")
def test_mnist_itself_is_recognised() -> None:
    found = load_digits(os.environ["STREAMCNN_MNIST"])
    assert found.name == "mnist"
    assert not any(NOT_MNISTS in note for note in found.notes)
    assert all(0.1 < part.images.mean() < 0.2 for part in (found.train, found.test))


def test_the_fingerprint_is_of_images_labels_and_splits(tmp_path: Path) -> None:
    files = make_files()
    prints = []
    for change in range(4):
        changed = dict(files)
        if change == 1:
            changed[TRAIN_IMAGES] = changed[TRAIN_IMAGES][:-1] + bytes([changed[TRAIN_IMAGES][-1] ^ 128])
        if change == 2:
            changed[TRAIN_LABELS] = as_idx(np.roll(make_labels(40, seed=1), 1))
        if change == 3:
            changed = dict(zip(files, (files[name] for name in (*NAMES[2:], *NAMES[:2])), strict=True))
        write(tmp_path, changed)
        prints.append(load_digits(tmp_path).fingerprint)
    assert len(set(prints)) == 4
    write(tmp_path, files)
    assert load_digits(tmp_path).fingerprint == prints[0]


FAULTS: dict[str, tuple[dict[str, bytes | None], type[Exception], str]] = {
    "one file is missing": (
        {TEST_LABELS: None},
        DatasetMismatch,
        rf"has {TEST_IMAGES} but no {TEST_LABELS} nor {TEST_LABELS}\.gz: add the missing file",
    ),
    "the other file is missing": (
        {TRAIN_IMAGES: None},
        DatasetMismatch,
        rf"has {TRAIN_LABELS} but no {TRAIN_IMAGES} nor {TRAIN_IMAGES}\.gz: add the missing file",
    ),
    "no file at all": (
        dict.fromkeys(NAMES),
        DatasetMismatch,
        r"no digits in .*: expected are train-images-idx3-ubyte, .*, t10k-labels-idx1-ubyte, each also with",
    ),
    "labels in the place of images": (
        {TRAIN_IMAGES: as_idx(make_labels(40, seed=1))},
        CorruptImage,
        rf"{TRAIN_IMAGES} is no IDX file of images: its magic number is 2049, allowed is 2051",
    ),
    "images in the place of labels": (
        {TRAIN_LABELS: as_idx(make_images(40, seed=1))},
        CorruptImage,
        rf"{TRAIN_LABELS} is no IDX file of labels: its magic number is 2051, allowed is 2049",
    ),
    "an empty file": (
        {TEST_IMAGES: b""},
        CorruptImage,
        rf"{TEST_IMAGES} is no IDX file of images: its magic number is 0, allowed is 2051",
    ),
    "a header cut short": (
        {TEST_IMAGES: as_idx(make_images(30, seed=2))[:6]},
        CorruptImage,
        rf"{TEST_IMAGES} holds 6 bytes where its header says 16: get the file again",
    ),
    "a file cut short": (
        {TEST_IMAGES: as_idx(make_images(30, seed=2))[:-1]},
        CorruptImage,
        rf"{TEST_IMAGES} holds 23535 bytes where its header says 23536: get the file again",
    ),
    "a byte too many": (
        {TEST_LABELS: as_idx(make_labels(30, seed=3)) + b"\0"},
        CorruptImage,
        rf"{TEST_LABELS} holds 39 bytes where its header says 38: get the file again",
    ),
    "images of another size": (
        {TRAIN_IMAGES: as_idx(make_images(40, seed=0)[:, :, :20])},
        DatasetMismatch,
        rf"{TRAIN_IMAGES} has images of 28x20 pixels: allowed are 28x28",
    ),
    "fewer labels than images": (
        {TRAIN_LABELS: as_idx(make_labels(39, seed=1))},
        DatasetMismatch,
        rf"{TRAIN_IMAGES} has 40 images but .*{TRAIN_LABELS} has 39 labels: take both files from one set",
    ),
    "a label that is no digit": (
        {TRAIN_LABELS: as_idx(make_labels(40, seed=1) + np.uint8(1))},
        DatasetMismatch,
        rf"{TRAIN_LABELS} has the label 10: allowed are 0 to 9",
    ),
    "a digit that is missing": (
        {TEST_LABELS: as_idx(make_labels(30, seed=3) % np.uint8(9))},
        DatasetMismatch,
        r"the test digits of .* show no 9: every digit is needed",
    ),
    "no images": (
        {TRAIN_IMAGES: as_idx(make_images(0, seed=0)), TRAIN_LABELS: as_idx(make_labels(0, seed=0))},
        DatasetMismatch,
        r"the training digits of .* show no 0, 1, 2, 3, 4, 5, 6, 7, 8, 9: every digit is needed",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files_are_named(tmp_path: Path, fault: str) -> None:
    changed, error, text = FAULTS[fault]
    write(
        tmp_path,
        {name: content for name, content in {**make_files(), **changed}.items() if content is not None},
    )
    with pytest.raises(error, match=text):
        load_digits(tmp_path)


PACKED = gzip.compress(as_idx(make_images(40, seed=0)))


@pytest.mark.parametrize(
    "content",
    [PACKED[:-100], PACKED[:100] + b"\xff" * 100 + PACKED[200:], b"not gzip at all", b""],
    ids=["truncated", "overwritten", "no gzip", "empty"],
)
def test_damaged_gzip_files_are_named(tmp_path: Path, content: bytes) -> None:
    files = make_files()
    del files[TRAIN_IMAGES]
    write(tmp_path, {**files, f"{TRAIN_IMAGES}.gz": content})
    with pytest.raises(
        CorruptImage, match=rf"{TRAIN_IMAGES}(\.gz: .*; get the file again|\.gz is no IDX file)"
    ):
        load_digits(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetMismatch, match=r"no folder .*nowhere: name one with MNIST's IDX files"):
        load_digits(tmp_path / "nowhere")


def test_uci_digits() -> None:
    found = load_digits("uci")
    assert_usable(found)
    assert (found.name, found.notes) == ("uci", ())
    assert len(found.train.labels) + len(found.test.labels) == 1797
    for value in range(10):
        assert 0 <= len(found.train.of(value)) - len(found.test.of(value)) <= 1
    assert found.fingerprint == UCI_FINGERPRINT


def test_uci_digits_are_interpolated_linearly() -> None:
    scans, found = load_scans(), load_digits("uci").train
    for value in (0, 8):
        scan = scans.images[scans.target == value][0].astype(int).tolist()
        at = [
            min(max(Fraction(8 * (2 * i + 1), 56) - Fraction(1, 2), Fraction(0)), Fraction(7))
            for i in range(28)
        ]
        drawn = [[bilinear(scan, row, col) > 7 for col in at] for row in at]
        np.testing.assert_array_equal(found.images[found.of(value)[0]], drawn)


def bilinear(scan: list[list[int]], row: Fraction, col: Fraction) -> Fraction:
    top, left = min(int(row), 6), min(int(col), 6)
    down, right = row - top, col - left
    above = scan[top][left] * (1 - right) + scan[top][left + 1] * right
    below = scan[top + 1][left] * (1 - right) + scan[top + 1][left + 1] * right
    return above * (1 - down) + below * down


def test_without_a_source_uci_digits_are_used_and_it_is_said() -> None:
    found = load_digits(None)
    assert (found.name, found.fingerprint) == ("uci", UCI_FINGERPRINT)
    (note,) = found.notes
    assert "no MNIST digits were given: using scikit-learn's UCI digits" in note


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'val': allowed are 'train' and 'test'"):
        load_digits("uci").split("val")


def fake_pooch(cache: Path, fetch: Callable[[str], Any]) -> Any:
    """A stand-in for the package that keeps what it was created with."""
    created: dict[str, Any] = {}

    def create(**options: Any) -> Any:
        created.update(options)
        return SimpleNamespace(fetch=fetch)

    return SimpleNamespace(os_cache=lambda name: cache / name, create=create, created=created)


def test_a_download_fills_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_files()
    cache = tmp_path / "streamcnn"

    def fetch(file: str) -> None:
        cache.mkdir(exist_ok=True)
        (cache / file).write_bytes(gzip.compress(files[file.removesuffix(".gz")]))

    pooch = fake_pooch(tmp_path, fetch)
    monkeypatch.setitem(sys.modules, "pooch", pooch)
    found = load_digits("mnist")
    np.testing.assert_array_equal(found.test.labels, make_labels(30, seed=3))
    assert pooch.created["path"] == cache
    assert pooch.created["base_url"] == "https://ossci-datasets.s3.amazonaws.com/mnist/"
    assert pooch.created["registry"] == {
        f"{name}.gz": f"sha256:{digest}" for name, digest in DOWNLOAD_SHA256.items()
    }


@pytest.mark.parametrize("error", [OSError("no route to host"), ValueError("SHA256 hash does not match")])
def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fetch(file: str) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "pooch", fake_pooch(tmp_path, fetch))
    with pytest.raises(
        CorruptImage, match=rf"cannot download MNIST from https.*: {error}; get its four files"
    ):
        load_digits("mnist")


@pytest.mark.parametrize(
    ("source", "module", "extra"), [("mnist", "pooch", "ultramnist"), ("uci", "sklearn.datasets", "demo")]
)
def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, source: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"{module} cannot be imported.*streamcnn\[{extra}\]"):
        load_digits(source)


@pytest.fixture
def local_url(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine that offers ``tmp_path / "served"``."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_pooch_itself_downloads_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_url: str
) -> None:
    pooch = pytest.importorskip("pooch")
    (tmp_path / "served").mkdir()
    write(tmp_path / "served", {f"{name}.gz": gzip.compress(file) for name, file in make_files().items()})
    monkeypatch.setattr(digits, "MNIST_URL", local_url)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    with pytest.raises(CorruptImage, match=r"cannot download MNIST from .* does not match"):
        load_digits("mnist")
    for name in NAMES:
        served = (tmp_path / "served" / f"{name}.gz").read_bytes()
        monkeypatch.setitem(DOWNLOAD_SHA256, name, hashlib.sha256(served).hexdigest())
    np.testing.assert_array_equal(load_digits("mnist").test.labels, make_labels(30, seed=3))
