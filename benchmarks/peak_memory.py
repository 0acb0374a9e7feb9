"""Peak memory and time of one training update under a budget, each image size in a fresh process.

    python -m benchmarks.peak_memory resnet18 --sizes 2000,4000,8000 --budget 1GiB

The image is a zarr array of random bytes on disk, made beforehand and read tile by tile. The peak is the
kernel's high-water mark of resident memory above what the process holds with library, model, optimiser and
plan loaded; the budget is enforced by the kernel's limit on the data segment.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.record import append
from streamcnn import StreamingModel, ZarrSource
from streamcnn.data.sources import write_zarr_image
from streamcnn.models import load_model

app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: str,
    sizes: Annotated[
        str, typer.Option(help="Edges of square images, separated by commas.")
    ] = "2000,4000,8000",
    budget: Annotated[str, typer.Option(help="Ceiling of forward and backward.")] = "1GiB",
    record: Annotated[bool, typer.Option(help="Append to results/peak_memory.jsonl.")] = True,
) -> None:
    """Measure each size in its own process and print one JSON line each."""
    command = "python -m benchmarks.peak_memory " + " ".join(sys.argv[1:])
    for size in map(int, sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            image = Path(folder) / "image.zarr"
            write_zarr_image(image, torch.randint(256, (3, size, size), dtype=torch.uint8))
            arguments = [sys.executable, "-m", "benchmarks.peak_memory", "one", model, str(image), budget]
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        fields: dict[str, Any] = {
            "case": f"{model} {size}x{size}",
            **json.loads(done.stdout.splitlines()[-1]),
        }
        print(append("peak_memory", command, **fields) if record else fields, flush=True)


@app.command()
def one(model: str, image: Path, budget: str) -> None:
    """One update in this process; the measurement as JSON on the last line."""
    torch.manual_seed(0)
    streamed = StreamingModel(
        load_model(model, num_classes=28).train(), budget, preprocess=lambda tile: tile / 255 - 0.5
    )
    optimizer = torch.optim.SGD(streamed.parameters(), lr=1e-3, momentum=0.9)
    source = ZarrSource(image)
    plan = streamed.plan((1, *source.shape))
    start = time.perf_counter()
    loss = torch.nn.functional.cross_entropy(streamed(source), torch.tensor([7]))
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    report = streamed.last_report
    assert report is not None
    result = {
        "budget": plan.budget,
        "measured_bytes": report.measured_bytes,
        "reading": report.reading,
        "projected_bytes": plan.projected_bytes,
        "plain_bytes": plan.plain_bytes,
        "seconds": round(seconds, 1),
        "tile": list(plan.tile),
        "on_disk_bytes": sum(s.nbytes for s in plan.stores.values() if s.home.value == "disk"),
        "bytes_moved": report.bytes_moved,
        "plan": plan.digest,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    app()
