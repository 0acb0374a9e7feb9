"""Targets: what the package offers for the files of each kind, and nothing else.

A target's function raises what the package raises; `attempt` counts a `StreamError` as a refusal.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from hostile import FACTORY

from streamcnn.cli.images import image_facts, store_facts
from streamcnn.data.convert import origin_of
from streamcnn.data.file_dataset import FileDataset, open_table
from streamcnn.data.image_files import find_images
from streamcnn.data.sources import DEFAULT_CHOICE, ImageSource, is_image, open_image
from streamcnn.data.tile_store import Head, TileStore, TileStoreWriter
from streamcnn.data.ultramnist import load_digits
from streamcnn.errors import StreamError
from streamcnn.geometry.regions import Interval, Region
from streamcnn.plan.hardware import NOMINAL, HardwareProfile
from streamcnn.runtime import calibration
from streamcnn.training import load_run, read_log
from streamcnn.training.checkpoints import CheckpointFolder
from streamcnn.training.report import write_report

from .seeds import KEY
from .values import changed, odd_value

MAX_PIXELS = 2**18
"""The ``max_pixels=`` of all functions that take it."""
READ_BYTES = 2**25
"""The most bytes that a read may announce; larger reads are not made, as no plan would make them."""


@dataclass
class Attempts:
    """Steps of one input that may each be refused."""

    refusals: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A step, which a refusal ends."""
        try:
            yield
        except StreamError as error:
            self.refusals.append(f"{type(error).__name__}: {error}")


Use = Callable[[Path, Attempts], None]


@dataclass(frozen=True)
class Target:
    """A kind of files."""

    use: Use
    files: Callable[[Path], list[Path]]
    """Returns the files to change, given the folder."""
    mend: Callable[[Path, Random], None] = lambda folder, random: None
    """Corrects checksums, since whoever writes the content writes these too."""
    reads_elsewhere: bool = False
    """Whether the files may name others anywhere, as a table names images."""
    refused: frozenset[str] = frozenset()
    """Valid variants that are refused all the same: unfinished stores, and heads of slides without pixels."""


def _every_file(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _read(source: ImageSource) -> None:
    """Read a corner at the beginning and one at the end."""
    _, height, width = source.shape
    size = min(height, 16), min(width, 16)
    known = source.reading_cost
    announced = source.reading_bytes(size)
    if announced.held + announced.transient + known.opening > READ_BYTES:
        return
    for top, left in ((0, 0), (height - size[0], width - size[1])):
        source.read(Region(Interval(top, top + size[0]), Interval(left, left + size[1])))
    source.release()


def _use_image(folder: Path, attempts: Attempts) -> None:
    for path in sorted(folder.iterdir()):
        with attempts.attempt():
            is_image(path)
            _read(open_image(path, max_pixels=MAX_PIXELS))
        with attempts.attempt():
            image_facts(path, DEFAULT_CHOICE)
        if path.is_dir():
            for missing in ("fill", "error"):
                with attempts.attempt():
                    _read(open_image(path, missing_chunks=missing, max_pixels=MAX_PIXELS))
    with attempts.attempt():
        for image in find_images([folder]):
            origin_of(image, DEFAULT_CHOICE)


def _use_store(folder: Path, attempts: Attempts) -> None:
    with attempts.attempt():
        store = TileStore(folder / "store")
        for record in store.records:
            for level in range(min(record.levels, 2)):
                with attempts.attempt():
                    _read(store.source(record, level=level))
        with attempts.attempt():
            json.dumps(store_facts(store))
        for _ in store.verify():
            pass
    with (
        attempts.attempt(),
        TileStoreWriter(folder / "store", Head("images", {"made by": "a test"})) as writer,
    ):
        writer.finish()


def _mend_store(folder: Path, random: Random) -> None:
    """Correct the checksums of metadata in the manifest, and the manifest's own."""
    store = folder / "store"
    try:
        path = next(store.glob("manifest-*"), store / "journal.jsonl")
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        for line in lines[1:]:
            for key in line["metadata"]:
                line["metadata"][key] = hashlib.sha256(
                    (store / "images" / line["name"] / key).read_bytes()
                ).hexdigest()
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        content = path.read_bytes()
    path.write_bytes(content)
    if path.name.startswith("manifest"):
        found = {"manifest": path.name, "sha256": hashlib.sha256(content).hexdigest()}
        if (store / "complete.json").stat().st_size and random.random() < 0.9:
            (store / "complete.json").write_text(json.dumps(found))


def _use_table(folder: Path, attempts: Attempts) -> None:
    for inputs in ((), ("age",)):
        with attempts.attempt():
            images = FileDataset(folder / "labels.csv", inputs=inputs)
            assert len(images.labels) == len(images)
            _read(images[0][0])
        with attempts.attempt():
            for _, source, *_ in open_table(folder / "labels.csv", inputs):
                _read(source)


def _use_scans(folder: Path, attempts: Attempts) -> None:
    for path in sorted(folder.iterdir()):
        with attempts.attempt():
            find_images([path])
        with attempts.attempt():
            open_image(path, max_pixels=MAX_PIXELS)
    with attempts.attempt():
        find_images([folder])


def _use_digits(folder: Path, attempts: Attempts) -> None:
    with attempts.attempt():
        load_digits(folder)


def _use_rates(folder: Path, attempts: Attempts) -> None:
    measured: list[HardwareProfile] = []

    def measure(device: torch.device, dtype: torch.dtype, source: str) -> HardwareProfile:
        measured.append(NOMINAL["cpu"])
        return measured[0]

    before = calibration.hardware_key, calibration.measured_rates, os.environ.get(calibration.VARIABLE)
    calibration.hardware_key, calibration.measured_rates = lambda *args: KEY, measure
    os.environ[calibration.VARIABLE] = str(folder / "rates.json")
    try:
        with attempts.attempt():
            rates = calibration.hardware_profile(torch.device("cpu"))
            numbers = [rates.dense_flops, rates.grouped_flops, rates.memory_bytes, rates.fresh_bytes]
            numbers += [
                rates.operator_seconds,
                rates.buffered_write_bytes,
                *rates.read_bytes.values(),
                *rates.write_bytes.values(),
            ]
            assert all(0 < number < float("inf") for number in numbers)
            assert len(rates.read_bytes) == len(rates.write_bytes) == 3
            if measured:
                attempts.refusals.append("rates: measured again")
    finally:
        calibration.hardware_key, calibration.measured_rates = before[0], before[1]
        os.environ[calibration.VARIABLE] = before[2] or "off"


def _use_run(folder: Path, attempts: Attempts) -> None:
    with attempts.attempt():
        load_run(folder / "run", trust=[FACTORY])
    with attempts.attempt():
        read_log(folder / "run")
    if hashlib.sha256((folder / "run" / "log.jsonl").read_bytes()).digest()[0] < 20:
        with attempts.attempt():
            write_report(folder / "run")  # half a second each


def _documents_of_run(folder: Path) -> list[Path]:
    settings, log = folder / "run" / "run.json", folder / "run" / "log.jsonl"
    return [settings, settings, log]


def _use_checkpoint(folder: Path, attempts: Attempts) -> None:
    with attempts.attempt():
        load_run(folder / "run", trust=[FACTORY])
    with attempts.attempt():
        CheckpointFolder(folder / "run" / "checkpoints").newest()


def _odd_in_state(random: Random) -> Any:
    """An odd value that a checkpoint may hold, of a type that JSON has or of another."""
    if random.random() < 0.5:
        return odd_value(random)
    return random.choice(
        [
            torch.zeros(0),
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(1, dtype=torch.complex64),
            torch.zeros(1).expand(10**12),
            torch.sparse_coo_tensor([[10**9]], [1.0], (10**12,), check_invariants=False),
            torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.quint8),
            torch.zeros(3, device="meta"),
            (1, 2),
            b"bytes",
            {1: 2},
            torch.float32,
        ]
    )


def _mend_checkpoint(folder: Path, random: Random) -> None:
    """Another state in the best checkpoint half of the time, and digests that are right."""
    checkpoints = folder / "run" / "checkpoints"
    for path in checkpoints.glob("*.pt"):
        if random.random() < 0.7:
            try:
                state = changed(random, torch.load(path, weights_only=True), _odd_in_state)
                file = io.BytesIO()
                torch.save(state, file)
                path.write_bytes(file.getvalue())
            except Exception:  # the file was damaged before; it stays so
                pass
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")


TARGETS: dict[str, Target] = {
    "store": Target(_use_store, _every_file, _mend_store, refused=frozenset({"unfinished"})),
    "zarr": Target(_use_image, _every_file),
    "tiff": Target(_use_image, _every_file),
    "picture": Target(_use_image, _every_file),
    "npy": Target(_use_image, _every_file),
    "table": Target(_use_table, lambda folder: [folder / "labels.csv"], reads_elsewhere=True),
    "scans": Target(_use_scans, _every_file, refused=frozenset({"scans"})),
    "digits": Target(_use_digits, _every_file),
    "rates": Target(_use_rates, _every_file),
    "run": Target(_use_run, _documents_of_run, reads_elsewhere=True),
    "checkpoint": Target(
        _use_checkpoint, lambda folder: sorted((folder / "run" / "checkpoints").iterdir()), _mend_checkpoint
    ),
}
