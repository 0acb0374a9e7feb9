"""Measure images per second and core, and memory, of making and writing UltraMNIST images.

    python -m benchmarks.ultramnist_speed --digits path/to/mnist

One thread of this process does all work, like each worker of ``streamcnn ultramnist generate``. The clock
starts after the first image. Memory is resident memory after each image.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from typing import Annotated, Any

import torch
import typer
import zarr

from benchmarks.record import append
from streamcnn.ceiling.baseline import Baseline
from streamcnn.ceiling.cpu import DataLimit
from streamcnn.data.ultramnist import Recipe, Spec, load_digits
from streamcnn.data.ultramnist.generate import generate


def main(
    images: Annotated[int, typer.Option(min=20)] = 112,
    size: Annotated[int, typer.Option(min=64)] = 4000,
    recipe: Recipe = Recipe.BALANCED,
    digits: Annotated[str, typer.Option(help="As for streamcnn ultramnist generate.")] = "uci",
    record: Annotated[bool, typer.Option(help="Append to results/ultramnist_speed.jsonl.")] = True,
) -> None:
    """Write a set to a temporary folder and print one line."""
    torch.set_num_threads(1)
    zarr.config.set({"threading.max_workers": 1})
    loaded = load_digits(digits)
    resident: list[int] = []
    start, cpu_start, stored = 0.0, 0.0, 0
    with tempfile.TemporaryDirectory() as folder, DataLimit(None) as measured:
        spec = Spec(seed=0, recipe=recipe, size=size)
        for state in generate(folder, spec, loaded, num_train=images + 1, num_test=0, workers=0):
            if state.done == 1:
                start, cpu_start = time.perf_counter(), time.process_time()
            resident.append(Baseline.now().resident_bytes or 0)
            stored = state.stored_bytes
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        peak = measured.peak_bytes
    tenth = images // 10
    fields: dict[str, Any] = {
        "case": f"{images} images {size}x{size}, {recipe.value}, {loaded.name} digits",
        "images_per_second": round(images / seconds, 2),
        "images_per_cpu_second": round(images / cpu_seconds, 2),
        "stored_bytes_per_image": stored // (images + 1),
        "peak_bytes": peak,
        "resident_bytes_first_tenth": round(statistics.median(resident[1 : 1 + tenth])),
        "resident_bytes_last_tenth": round(statistics.median(resident[-tenth:])),
    }
    command = "python -m benchmarks.ultramnist_speed " + " ".join(sys.argv[1:])
    print(append("ultramnist_speed", command, **fields) if record else fields, flush=True)


if __name__ == "__main__":
    typer.run(main)
