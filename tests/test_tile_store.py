"""The tile store: what is written is read back, and no fault gives wrong pixels."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamcnn import CorruptImage, DatasetMismatch, StreamError
from streamcnn.data.sources import TensorSource
from streamcnn.data.tile_store import TileStore, TileStoreWriter, arrays, write_image_folder
from streamcnn.data.tile_store.checks import crc32c
from streamcnn.data.tile_store.format import Head, ImageRecord
from streamcnn.geometry.regions import Interval, Region

HEAD = Head("images", {"made by": "a test"})
SIZE = (1100, 700)


def noise(channels: int = 1, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, *size), generator=generator, dtype=torch.uint8)


def add(writer: TileStoreWriter, image: Tensor, name: str = "train/a", *, levels: int = 1) -> ImageRecord:
    record = write_image_folder(
        writer.folder, TensorSource(image), name=name, split="train", label=3, levels=levels, origin={}
    )
    writer.add(record)
    return record


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TileStore:
    """Two images of several shards of two chunks each way, the second of black and noise."""
    monkeypatch.setattr(arrays, "SHARD_BYTES", 4 * arrays.CHUNK**2)
    with TileStoreWriter(tmp_path / "store", HEAD) as writer:
        add(writer, noise())
        black = noise(seed=1)
        black[:, :600] = 0
        add(writer, black, "train/b")
        writer.finish()
    return TileStore(tmp_path / "store")


def whole(store: TileStore, position: int = 0) -> Tensor:
    record = store.records[position]
    return store.source(record).read(Region.whole(record.shape[1:]))


def test_what_is_written_is_read_back(store: TileStore) -> None:
    assert len(store) == 2
    assert torch.equal(whole(store), noise())
    assert not whole(store, 1)[:, :600].any()
    assert torch.equal(whole(store, 1)[:, 600:], noise(seed=1)[:, 600:])
    assert [(r.name, r.split, r.label, r.shape, r.dtype) for r in store.records] == [
        (name, "train", 3, (1, *SIZE), "uint8") for name in ("train/a", "train/b")
    ]
    assert store.label_counts("train") == {3: 2}
    assert len(store.records[0].shards) == 2
    assert all(error is None for _, error in store.verify())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_every_pixel_type_and_number_of_channels(tmp_path: Path, dtype: torch.dtype, channels: int) -> None:
    image = noise(channels, (37, 53)).to(dtype)
    with TileStoreWriter(tmp_path, HEAD) as writer:
        add(writer, image)
        writer.finish()
    assert torch.equal(whole(TileStore(tmp_path)), image)


def test_a_source_can_be_sent_to_another_process(store: TileStore) -> None:
    source = pickle.loads(pickle.dumps(store.source(store.records[0])))
    region = Region(Interval(500, 530), Interval(3, 600))
    assert torch.equal(source.read(region), noise()[:, 500:530, 3:600])


def test_levels_are_means_of_four_pixels(tmp_path: Path) -> None:
    image = noise(size=(9, 6))
    with TileStoreWriter(tmp_path, HEAD) as writer:
        add(writer, image, levels=2)
        writer.finish()
    store = TileStore(tmp_path)
    smaller = store.source(store.records[0], level=1)
    assert smaller.shape == (1, 5, 3)
    found = smaller.read(Region.whole((5, 3)))
    expected = image[:, :8].float().view(1, 4, 2, 3, 2).mean((2, 4)).round().to(torch.uint8)
    assert torch.equal(found[:, :4], expected)
    assert torch.equal(found[:, 4], image[:, 8].float().view(1, 3, 2).mean(2).round().to(torch.uint8))


def test_a_level_is_made_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(3, (1300, 530))  # the smaller level has rows of two strips and a part
    of_floats: list[int] = []
    pool = torch.nn.functional.avg_pool2d

    def noted(floats: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        of_floats.append(floats.nbytes)
        return pool(floats, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "avg_pool2d", noted)
    with TileStoreWriter(tmp_path, HEAD) as writer:
        add(writer, image, levels=2)
        writer.finish()
    store = TileStore(tmp_path)
    expected = image.double().view(3, 650, 2, 265, 2).mean((2, 4)).round().to(torch.uint8)
    found = store.source(store.records[0], level=1).read(Region.whole((650, 265)))
    assert torch.equal(found, expected)
    # Blocks of 25 MB had left holes of 100 MB in the heap.
    assert max(of_floats) <= 2**20


def test_other_programs_find_their_metadata(store: TileStore) -> None:
    group = zarr.open_group(store.path(store.records[0]), mode="r")
    ome = group.attrs["ome"]
    assert isinstance(ome, dict)
    (multiscale,) = ome["multiscales"]
    assert ome["version"] == "0.5"
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
    array = group[multiscale["datasets"][0]["path"]]
    assert isinstance(array, zarr.Array)
    assert array.metadata.dimension_names == ("c", "y", "x")
    assert np.array_equal(np.asarray(array[:]), noise().numpy())


@given(height=st.integers(1, 20_000), width=st.integers(1, 20_000), channels=st.sampled_from([1, 3, 4, 40]))
def test_shards_are_whole_chunks_and_small(height: int, width: int, channels: int) -> None:
    rows, cols = arrays.shard_size((channels, height, width), itemsize=2)
    chunk = channels * 2 * arrays.CHUNK**2
    assert rows % arrays.CHUNK == cols % arrays.CHUNK == 0
    assert rows * cols * channels * 2 <= max(arrays.SHARD_BYTES, chunk)
    assert rows < height + arrays.CHUNK
    assert cols < width + arrays.CHUNK


# --- faults: one error that names file and place, never wrong pixels ------------------------------------


def shard(store: TileStore, position: int = 0) -> Path:
    """The first shard of an image: four chunks."""
    return store.path(store.records[position]) / "0/c/0/0/0"


def flip_a_bit(store: TileStore) -> None:
    content = bytearray(shard(store).read_bytes())
    content[1000] ^= 4
    shard(store).write_bytes(content)


def truncate(store: TileStore) -> None:
    with shard(store).open("r+b") as file:
        file.truncate(5000)


def truncate_to_nothing(store: TileStore) -> None:
    shard(store).write_bytes(b"")


def remove(store: TileStore) -> None:
    shard(store).unlink()


def remove_an_inner_chunk(store: TileStore) -> None:
    """As zarr would write a shard whose first chunk is empty: the index is sound."""
    content = bytearray(shard(store).read_bytes())
    index_size = 4 * 16 + 4
    struct.pack_into("<QQ", content, len(content) - index_size, 2**64 - 1, 2**64 - 1)
    content[-4:] = crc32c(bytes(content[-index_size:-4]))
    shard(store).write_bytes(content)


def exchange(store: TileStore) -> None:
    """Another shard, sound in itself and of the same length."""
    other = shard(store).read_bytes()
    array = zarr.open_array(store.path(store.records[0]) / "0", mode="r+")
    array[0, 0, 0] = int(np.asarray(array[0, 0, 0])) ^ 1
    assert shard(store).read_bytes() != other


def change_metadata(store: TileStore) -> None:
    path = store.path(store.records[0]) / "0/zarr.json"
    found = json.loads(path.read_text())
    found["shape"][1] -= 100
    path.write_text(json.dumps(found))


def remove_metadata(store: TileStore) -> None:
    (store.path(store.records[0]) / "zarr.json").unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (flip_a_bit, r"rows 0\.\.600, cols 0\.\.600 .*train/a.*"),
        (truncate, r"rows 0\.\.600, cols 0\.\.600 .*train/a.*0/c/0/0/0"),
        (truncate_to_nothing, r"rows 0\.\.600, cols 0\.\.600 .*train/a.*0/c/0/0/0"),
        (remove, r"rows 0\.\.600, cols 0\.\.600 .*train/a.*shard 0/c/0/0/0 is missing"),
        (remove_an_inner_chunk, r"rows 0\.\.600, cols 0\.\.600 .*train/a.*index of shard 0/c/0/0/0 is not"),
        (exchange, r"rows 0\.\.600, cols 0\.\.600 .*train/a.*0/c/0/0/0 .*is not what the manifest says"),
        (change_metadata, r"train/a/0/zarr\.json was changed after the manifest was written"),
        (remove_metadata, r"cannot read .*train/a/zarr\.json: No such file"),
    ],
)
def test_damage_is_an_error(store: TileStore, damage: Callable[[TileStore], None], text: str) -> None:
    damage(store)
    with pytest.raises(CorruptImage, match=text):
        store.source(store.records[0]).read(Region.whole((600, 600)))
    # All shards at once are read by another way.
    with pytest.raises(CorruptImage, match="train/a"):
        whole(store)
    errors = {record.name: error for record, error in store.verify()}
    assert isinstance(errors["train/a"], CorruptImage)
    assert "train/a" in str(errors["train/a"])
    assert (
        "zarr.json" if "zarr" in damage.__name__ or "metadata" in damage.__name__ else "shard 0/c/0/0/0"
    ) in str(errors["train/a"])
    assert errors["train/b"] is None
    assert not whole(store, 1)[:, :600].any()


def test_what_may_not_be_read_is_an_error(store: TileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    source = store.source(store.records[0])

    async def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied", "0/c/0/0/0")

    monkeypatch.setattr(zarr.storage.LocalStore, "get", refuse)
    with pytest.raises(CorruptImage, match=r"train/a.*Permission denied"):
        source.read(Region.whole((10, 10)))


def test_a_changed_manifest_is_an_error(store: TileStore) -> None:
    (path,) = store.folder.glob("manifest-*")
    path.write_text(path.read_text().replace('"label":3', '"label":4', 1))
    with pytest.raises(CorruptImage, match=r"manifest-\w+\.jsonl is not what complete\.json says"):
        TileStore(store.folder)
    path.unlink()
    with pytest.raises(CorruptImage, match="cannot read the manifest"):
        TileStore(store.folder)
    (store.folder / "complete.json").write_text("{")
    with pytest.raises(CorruptImage, match=r"complete\.json is no valid JSON"):
        TileStore(store.folder)


def test_a_folder_without_a_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorruptImage, match=r"no tile store at .*complete\.json"):
        TileStore(tmp_path)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamcnn.data.tile_store.format.VERSION", 2)
    with TileStoreWriter(tmp_path, HEAD) as writer:
        writer.finish()
    monkeypatch.undo()
    with pytest.raises(DatasetMismatch, match="version 2: allowed is 'streamcnn tile store' version 1"):
        TileStore(tmp_path)


# --- writing: interrupted, resumed, extended ------------------------------------------------------------


def test_an_unfinished_store_is_not_read_and_goes_on(tmp_path: Path) -> None:
    with TileStoreWriter(tmp_path, HEAD) as writer:
        add(writer, noise(size=(20, 20)))
    with pytest.raises(DatasetMismatch, match="not finished: start the command that writes it again"):
        TileStore(tmp_path)
    with (tmp_path / "journal.jsonl").open("a") as journal:
        journal.write('{"name": "train/b", "spl')  # the process was killed while it wrote this
    with TileStoreWriter(tmp_path, HEAD) as writer:
        assert list(writer.records) == ["train/a"]
        add(writer, noise(size=(20, 20), seed=1), "train/b")
        writer.finish(["train/b", "train/a"])
    store = TileStore(tmp_path)
    assert [record.name for record in store.records] == ["train/b", "train/a"]
    assert torch.equal(whole(store), noise(size=(20, 20), seed=1))
    assert sorted(path.name for path in tmp_path.iterdir() if "manifest" not in path.name) == [
        "complete.json",
        "images",
        "writer.lock",
    ]


def test_images_are_added_to_a_store(tmp_path: Path) -> None:
    for position, name in enumerate("abc"):
        with TileStoreWriter(tmp_path, HEAD) as writer:
            assert len(writer.records) == position
            add(writer, noise(size=(20, 20), seed=position), name)
            if position == 2:
                continue  # not finished: the store stays as it was
            writer.finish()
    assert [record.name for record in TileStore(tmp_path).records] == ["a", "b"]
    assert len(list(tmp_path.glob("manifest-*"))) == 1


def test_another_set_of_images_is_refused(tmp_path: Path) -> None:
    with TileStoreWriter(tmp_path, HEAD) as writer:
        add(writer, noise(size=(20, 20)))
    other = Head("images", {"made by": "another test"})
    text = "made by is 'a test', asked for is 'another test'; give another folder"
    with pytest.raises(DatasetMismatch, match=text), TileStoreWriter(tmp_path, other):
        pass
    with TileStoreWriter(tmp_path, HEAD) as writer:
        writer.finish()
    with pytest.raises(DatasetMismatch, match=text), TileStoreWriter(tmp_path, other):
        pass


def test_names_of_classes_may_be_added(tmp_path: Path) -> None:
    for names in (("cat",), ("cat", "dog")):
        with TileStoreWriter(tmp_path, HEAD) as writer:
            assert writer.head.classes in (None, ("cat",))
            writer.set_classes(names)
        with TileStoreWriter(tmp_path, HEAD) as writer:
            assert writer.head.classes == names
            writer.finish()
        assert TileStore(tmp_path).head.classes == names


def test_starting_again_on_a_full_disk_keeps_the_journal(tmp_path: Path) -> None:
    with TileStoreWriter(tmp_path, HEAD) as writer:
        for index in range(10):
            add(writer, noise(size=(20, 20)), f"train/{index}")
    before = (tmp_path / "journal.jsonl").read_bytes()
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2)"
    code = f"""
        import resource, signal
        from streamcnn.data.tile_store import Head, TileStoreWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        {limit}
        with TileStoreWriter({str(tmp_path)!r}, Head("images", {{"made by": "a test"}})):
            pass
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode == 1
    assert f"CannotWrite: cannot write {tmp_path}/journal.jsonl: it would be larger than" in run.stderr
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    with TileStoreWriter(tmp_path, HEAD) as writer:
        assert len(writer.records) == 10


def test_an_empty_journal_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    with TileStoreWriter(tmp_path, HEAD) as writer:
        assert writer.records == {}
        writer.finish()


def test_an_image_does_not_replace_others(store: TileStore) -> None:
    with TileStoreWriter(store.folder, HEAD) as writer:
        with pytest.raises(DatasetMismatch, match="images/train holds other images"):
            add(writer, noise(size=(20, 20)), "train")
        with pytest.raises(DatasetMismatch, match="images/train/a/b lies in another image"):
            add(writer, noise(size=(20, 20)), "train/a/b")
    assert all(error is None for _, error in store.verify())


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DatasetMismatch, match=r"holds thesis\.tex"), TileStoreWriter(tmp_path, HEAD):
        pass
    file = tmp_path / "thesis.tex"
    with pytest.raises(DatasetMismatch, match="is a file"), TileStoreWriter(file, HEAD):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    code = f"""
        from streamcnn.data.tile_store import TileStoreWriter
        from streamcnn.data.tile_store.format import Head
        with TileStoreWriter({str(tmp_path)!r}, Head("images", {{}})):
            pass
    """
    with TileStoreWriter(tmp_path, HEAD):
        run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode == 1
    assert "is being written by another process" in run.stderr


@pytest.mark.parametrize("name", ["", "/etc", "../a", "a//b", ".hidden", "a/../b", "a\nb"])
def test_names_that_are_no_folders_are_refused(tmp_path: Path, name: str) -> None:
    with TileStoreWriter(tmp_path, HEAD) as writer, pytest.raises(ValueError, match="image name"):
        add(writer, noise(size=(20, 20)), name)


def run_and_write(folder: Path, before: str, after: str) -> subprocess.CompletedProcess[str]:
    """A process that writes an image "first", and then one whose pixels are read in between."""
    code = f"""
        import os, resource, signal, torch
        from streamcnn.data.sources import ImageSource, TensorSource
        from streamcnn.data.tile_store import TileStoreWriter, write_image_folder
        from streamcnn.data.tile_store.format import Head

        class Interrupted(ImageSource):
            def _read(self, region):
                {before}
                return torch.randint(0, 255, (1, *region.size), dtype=torch.uint8)

        with TileStoreWriter({str(folder)!r}, Head("images", {{"made by": "a test"}})) as writer:
            for name, source in (
                ("first", TensorSource(torch.ones(1, 20, 20, dtype=torch.uint8))),
                ("second", Interrupted((1, 2000, 1500), torch.uint8)),
            ):
                writer.add(write_image_folder(
                    writer.folder, source, name=name, split="train", label=0, levels=1, origin={{}}
                ))
            {after}
    """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)


def test_being_killed_loses_one_image_at_most(tmp_path: Path) -> None:
    run = run_and_write(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "writer.finish()")
    assert run.returncode == -signal.SIGKILL
    run = run_and_write(tmp_path, "pass", "writer.finish()")
    assert run.returncode == 0, run.stderr
    store = TileStore(tmp_path)
    assert [record.name for record in store.records] == ["first", "second"]
    assert all(error is None for _, error in store.verify())
    assert sorted(os.listdir(tmp_path / "images")) == ["first", "second"]


def test_a_full_disk_is_one_error_and_nothing_is_left(tmp_path: Path) -> None:
    # A file larger than the limit fails as on a full disk, once the signal is ignored.
    ignore = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))"
    run = run_and_write(tmp_path, f"{ignore}; {limit}", "writer.finish()")
    assert run.returncode == 1
    assert f"CannotWrite: cannot write {tmp_path}/images/second: it would be larger than" in run.stderr
    assert "(File too large): up to " in run.stderr
    assert "needed, raise the limit, as with `ulimit -f`. Finished images are kept\n" in run.stderr
    assert os.listdir(tmp_path / "images") == ["first"]
    with TileStoreWriter(tmp_path, HEAD) as writer:
        assert list(writer.records) == ["first"]


def test_a_source_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    class Broken(TensorSource):  # type: ignore[misc]
        def _read(self, region: Region) -> Tensor:
            raise CorruptImage("no such pixels")

    with TileStoreWriter(tmp_path, HEAD) as writer:
        with pytest.raises(CorruptImage, match="no such pixels"):
            write_image_folder(
                tmp_path, Broken(noise()), name="a", split="train", label=0, levels=1, origin={}
            )
        assert os.listdir(tmp_path / "images") == []
        writer.finish()
    assert len(TileStore(tmp_path)) == 0


def test_a_stream_error_is_what_a_caller_catches(tmp_path: Path) -> None:
    with TileStoreWriter(tmp_path, HEAD), pytest.raises(StreamError), TileStoreWriter(tmp_path, HEAD):
        pass
