"""Images are told apart by their content: a run goes on with a copy, and not with other pictures."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hostile import make_run, make_store
from PIL import Image

from streamcnn.data.dataset import OF_CONTENT, TileDataset
from streamcnn.data.fingerprints import BLOCK, WHOLE_BYTES, content_digest
from streamcnn.errors import CorruptImage, RunMismatch
from streamcnn.training import make_trainer
from streamcnn.training.checkpoints import CheckpointFolder
from streamcnn.training.runs import read_run
from streamcnn.training.trainer import Trainer


@pytest.mark.parametrize("size", [0, 100_000, WHOLE_BYTES, WHOLE_BYTES + 1, 3 * WHOLE_BYTES + 7])
def test_another_picture_is_noticed_and_another_time_or_place_is_not(tmp_path: Path, size: int) -> None:
    path, copy = tmp_path / "a.tif", tmp_path / "folder" / "b.tif"
    content = np.random.default_rng(0).bytes(size)
    path.write_bytes(content)
    known = content_digest([path])
    os.utime(path, ns=(1, 1))
    copy.parent.mkdir()
    shutil.copy(path, copy)
    assert content_digest([path]) == content_digest([copy]) == known
    for other in (content + b"\0", content[: size // 2]):
        path.write_bytes(other)
        assert (content_digest([path]) != known) == (other != content)
    for at in {0, size - 1} if size else ():
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert content_digest([path]) != known


def test_every_byte_of_a_small_image_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    content = bytearray(3 * BLOCK + 5)
    found = set()
    for at in range(0, len(content), BLOCK // 2):
        content[at] = 1
        path.write_bytes(content)
        found.add(content_digest([path]))
        content[at] = 0
    assert len(found) == 7


def test_all_files_of_an_image_count(tmp_path: Path) -> None:
    for name in ("c/0/0", "c/0/1", "zarr.json", "../b.dat"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text("same size")
    files = [tmp_path / "a", tmp_path / "b.dat"]
    known = content_digest(files)
    for name in ("c/0/1", "zarr.json", "../b.dat"):
        (tmp_path / "a" / name).write_text("size same")
        assert content_digest(files) != known
        (tmp_path / "a" / name).write_text("same size")
    (tmp_path / "a/c/0/1").rename(tmp_path / "a/c/0/2")
    assert content_digest(files) != known


def test_many_chunks_are_not_all_read_and_their_sizes_count(tmp_path: Path) -> None:
    for index in range(300):
        (tmp_path / f"{index:03d}").write_bytes(bytes([index % 256]) * (WHOLE_BYTES // 256))
    known = content_digest([tmp_path])
    for index in (0, 299):
        (tmp_path / f"{index:03d}").write_bytes(b"x" * (WHOLE_BYTES // 256))
        changed = content_digest([tmp_path])
        assert changed != known
        known = changed
    (tmp_path / "007").write_bytes(b"")
    assert content_digest([tmp_path]) != known


def test_a_file_that_is_gone_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CorruptImage, match=rf"cannot read {tmp_path}/a\.tif: No such file"):
        content_digest([tmp_path / "a.tif"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def again(folder: Path) -> Trainer:
    """The trainer of one more epoch of a run."""
    config = read_run(folder)
    settings = replace(config.settings, epochs=2)
    return make_trainer(replace(config, settings=settings), folder)


def images_of(folder: Path) -> list[Path]:
    return sorted(Path(read_run(folder).data).rglob("*.png"))


def test_a_run_goes_on_with_files_that_were_touched(folder: Path) -> None:
    for path in images_of(folder):
        os.utime(path, ns=(1, 1))
    assert again(folder).run().num_epochs == 2


def test_a_run_does_not_go_on_with_another_picture_of_the_same_size(folder: Path) -> None:
    path = images_of(folder)[0]
    before = path.stat()
    pixels = np.asarray(Image.open(path)).copy()
    pixels[...] = 201
    Image.fromarray(pixels).save(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        RunMismatch, match=r"the training images or their labels.*\(content \w{64}, now "
    ) as caught:
        again(folder).run()
    assert "older version" not in str(caught.value)


def as_older_versions_saved(folder: Path) -> None:
    """Give a run's newest checkpoint the fingerprints of files' times."""
    trainer, checkpoints = again(folder), CheckpointFolder(folder / "checkpoints")
    state = checkpoints.newest()
    assert state is not None
    for name, images in (("images", trainer.images), ("validation", trainer.validation)):
        former = images.former_fingerprint  # type: ignore[attr-defined]
        assert not former.startswith(OF_CONTENT)
        state["identity"][name] = former
    checkpoints.save(state, state["progress"]["update"])


def test_a_run_of_an_older_version_goes_on(folder: Path) -> None:
    as_older_versions_saved(folder)
    assert again(folder).run().num_epochs == 2
    newest = CheckpointFolder(folder / "checkpoints").newest()
    assert newest is not None
    assert newest["identity"]["images"].startswith(OF_CONTENT)


def test_a_run_of_an_older_version_says_why_it_does_not_go_on(folder: Path) -> None:
    as_older_versions_saved(folder)
    for path in images_of(folder):
        os.utime(path, ns=(1, 1))
    with pytest.raises(RunMismatch, match="told images by the times of their files, and these"):
        again(folder).run()


def test_images_of_a_store_are_the_same_wherever_they_came_from(tmp_path: Path) -> None:
    images = TileDataset(make_store(tmp_path))
    known, former = images.fingerprint, images.former_fingerprint
    images.records = tuple(replace(record, origin={"fingerprint": "other"}) for record in images.records)
    assert images.fingerprint == known
    assert images.former_fingerprint != former
    images.records = tuple(
        replace(record, metadata=dict.fromkeys(record.metadata, "0" * 64)) for record in images.records
    )
    assert images.fingerprint != known
