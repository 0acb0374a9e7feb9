"""Generation of an UltraMNIST set into a tile store, on several processes, and resumable.

The images depend neither on the number of processes nor on interruptions of the run. Existing images beyond
the requested ones stay.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zarr

from streamcnn.data.sources import TensorSource
from streamcnn.data.tile_store import ImageRecord, TileStoreWriter, write_image_folder
from streamcnn.data.tile_store.format import Head
from streamcnn.data.ultramnist.digits import Digits
from streamcnn.data.ultramnist.image import make_image
from streamcnn.data.ultramnist.layout import SPLITS, Layout, Spec
from streamcnn.errors import StreamError

KIND = "ultramnist"
_WAITING_PER_WORKER = 4

Key = tuple[str, int]
"""Split and index of an image."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run, after each image."""

    done: int
    total: int
    stored_bytes: int
    """Bytes on disk of the images that this run wrote."""


def generate(
    folder: str | Path, spec: Spec, digits: Digits, *, num_train: int, num_test: int, workers: int = 1
) -> Generator[Progress]:
    """Write the images that ``folder`` lacks; iterate to do the work, image by image.

    Parameters
    ----------
    folder
        Folder of the tile store; created if missing, extended if it was made with the same settings.
    spec, digits
        The settings and the digits that determine the images.
    num_train, num_test
        Number of images of each split.
    workers
        Number of worker processes, each of which holds one image at a time; 0 does all work in this one.

    Raises
    ------
    DatasetMismatch
        If the folder holds something else.
    StreamError
        If another process writes to the folder, the disk is full, or a worker is killed. Finished images are
        kept, and the same call continues with the rest.
    """
    keys = [
        (split, index) for split, n in zip(SPLITS, (num_train, num_test), strict=True) for index in range(n)
    ]
    with TileStoreWriter(folder, head_of(spec, digits)) as writer:
        missing = [key for key in keys if name_of(key) not in writer.records]
        done, stored = len(keys) - len(missing), 0
        yield Progress(done, len(keys), stored)
        job = _Job(writer.folder, spec, digits)
        for record in map(job.write, missing) if workers == 0 else _on_workers(job, missing, workers):
            writer.add(record)
            done, stored = done + 1, stored + record.stored_bytes
            yield Progress(done, len(keys), stored)
        writer.finish(_in_order(writer.records))


def head_of(spec: Spec, digits: Digits) -> Head:
    """The head of a store of these images."""
    provenance = {
        "seed": spec.seed,
        "recipe": spec.recipe.value,
        "size": spec.size,
        "digits": digits.name,
        "digits_sha256": digits.fingerprint,
    }
    return Head(KIND, provenance)


def name_of(key: Key) -> str:
    """Name of an image in the store."""
    split, index = key
    return f"{split}/{index:05d}"


def _in_order(names: Iterable[str]) -> list[str]:
    """Names sorted by split, training first, and index, whatever order workers finished in."""
    return sorted(names, key=lambda name: (SPLITS.index(name.partition("/")[0]), int(name.partition("/")[2])))


@dataclass(frozen=True, slots=True)
class _Job:
    """The data that every worker needs."""

    folder: Path
    spec: Spec
    digits: Digits

    def write(self, key: Key) -> ImageRecord:
        """Make one image and write it."""
        made = make_image(self.spec, *key, self.digits)
        return write_image_folder(
            self.folder,
            TensorSource(torch.from_numpy(made.pixels)),
            name=name_of(key),
            split=key[0],
            label=made.layout.label,
            levels=1,
            origin={"index": key[1]},
            truth=truth_of(made.layout),
        )


def truth_of(layout: Layout) -> list[dict[str, Any]]:
    """Each digit's value, side, scale factor and box (top, left, bottom, right), in pixels."""
    return [
        {
            "value": digit.value,
            "side": digit.side,
            "factor": digit.factor,
            "box": [digit.box.rows.start, digit.box.cols.start, digit.box.rows.stop, digit.box.cols.stop],
        }
        for digit in layout.digits
    ]


def _on_workers(job: _Job, keys: Iterable[Key], workers: int) -> Iterator[ImageRecord]:
    """The records of all images, in the order in which they are finished."""
    waiting = iter(keys)
    pending: set[Future[ImageRecord]] = set()
    # Spawned, as a fork would copy locks of PyTorch and zarr in an arbitrary state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,))
    try:
        while True:
            free = _WAITING_PER_WORKER * workers - len(pending)
            pending |= {pool.submit(_write, key) for key in itertools.islice(waiting, free)}
            if not pending:
                return
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    except BrokenProcessPool as error:
        raise StreamError(
            f"one of {workers} worker processes was killed, by the system if memory ran out: start again "
            "with fewer --workers; finished images are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_job: _Job | None = None
"""The job of this worker process."""


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One core each, as more would compete with the other workers.
    torch.set_num_threads(1)
    zarr.config.set({"threading.max_workers": 1})


def _end_with_parent() -> None:
    """End this process when the parent, which writes the journal and holds the lock, has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _write(key: Key) -> ImageRecord:
    assert _job is not None
    return _job.write(key)
