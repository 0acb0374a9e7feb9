"""A U-Net on an image of five bands in uint16 and its mask, both in zarr: one update, and the map on disk.

    python -m benchmarks.segmentation compare --size 1000
    python -m benchmarks.segmentation update --size 12000 --budget 1GiB
    python -m benchmarks.segmentation predict --size 12000 --budget 512MiB

``compare`` gives the largest error of loss and gradients against plain PyTorch in float64. The others report
projected and measured bytes and seconds, and resident memory as the kernel has it, each in a fresh process.
"""

from __future__ import annotations

import copy
import json
import resource
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
import zarr
from torch import Tensor, nn

from benchmarks.networks import UNet
from benchmarks.record import append, in_fresh_process
from streamcnn import StreamingModel, ZarrSource
from streamcnn.geometry.regions import Region
from streamcnn.support.units import parse_bytes
from streamcnn.verification import FLOOR

app = typer.Typer(add_completion=False, help=__doc__)

BANDS, CLASSES, IGNORED = 5, 4, 255
_WIDTH, _CHUNK = 8, 512
Folder = Annotated[
    Path, typer.Option(help="Folder for image, mask, spilled maps and the map that is written.")
]
Record = Annotated[bool, typer.Option(help="Append to results/segmentation.jsonl.")]
Size = Annotated[int, typer.Option(help="Edge of the square image.")]
Budget = Annotated[str, typer.Option(help="Ceiling of a pass.")]
loss_of = partial(F.cross_entropy, ignore_index=IGNORED)


def write_scene(folder: Path, size: int) -> tuple[ZarrSource, ZarrSource]:
    """Write an image of noise and a mask of its brightest band chunk by chunk, unless they exist."""
    image, mask = folder / f"image-{size}.zarr", folder / f"mask-{size}.zarr"
    if not mask.exists():
        generator = np.random.default_rng(0)
        options: dict[str, Any] = {"config": {"write_empty_chunks": True}, "overwrite": True}
        bands = zarr.create_array(
            image,
            shape=(BANDS, size, size),
            chunks=(BANDS, _CHUNK, _CHUNK),
            dtype="uint16",
            dimension_names=("c", "y", "x"),
            **options,
        )
        partial_mask = mask.with_suffix(".partial")
        classes = zarr.create_array(
            partial_mask,
            shape=(size, size),
            chunks=(_CHUNK, _CHUNK),
            dtype="uint8",
            dimension_names=("y", "x"),
            **options,
        )
        for top in range(0, size, _CHUNK):
            for left in range(0, size, _CHUNK):
                rows, cols = slice(top, top + _CHUNK), slice(left, left + _CHUNK)
                extents = min(_CHUNK, size - top), min(_CHUNK, size - left)
                pixels = generator.integers(2**16, size=(BANDS, *extents), dtype=np.uint16)
                bands[:, rows, cols] = pixels
                brightest = pixels.argmax(0).astype(np.uint8)
                classes[rows, cols] = np.where(brightest < CLASSES, brightest, IGNORED)
        partial_mask.rename(mask)
    return ZarrSource(image), ZarrSource(mask)


def scaled(tile: Tensor) -> Tensor:
    """Convert pixels to floats around 0."""
    return tile.float() / 2**16 - 0.5


def scaled_exactly(tile: Tensor) -> Tensor:
    """Convert pixels to float64 around 0."""
    return tile.double() / 2**16 - 0.5


def make_net() -> nn.Module:
    """The U-Net, in train mode."""
    torch.manual_seed(0)
    return UNet(_WIDTH, channels=BANDS, classes=CLASSES)


@app.command()
def compare(
    size: Size = 1000, work: Folder = Path("benchmark-runs/segmentation"), record: Record = True
) -> None:
    """Compare loss and gradients of one update with plain PyTorch's, in float64."""
    work.mkdir(parents=True, exist_ok=True)
    _report({"case": f"compare {size}", **compared(work, size)}, record=record)


def compared(work: Path, size: int, **options: Any) -> dict[str, float]:
    """The largest relative error of loss and gradients against plain PyTorch's, in float64."""
    image, mask = write_scene(work, size)
    net = make_net().double()
    plain = copy.deepcopy(net)
    model = StreamingModel(net, preprocess=scaled_exactly, spill=work, **{"tile": 256, **options})
    streamed = model.streamed_loss(image, mask, loss_of)
    streamed.backward()
    whole = Region.whole((size, size))
    expected = loss_of(plain(scaled_exactly(image.read(whole)[None])), mask.read(whole).long())
    expected.backward()
    pairs = [(streamed.detach(), expected.detach())]
    pairs += [(a.grad, b.grad) for a, b in zip(net.parameters(), plain.parameters(), strict=True)]
    largest = max(float(b.norm()) for _, b in pairs[1:])
    errors = [float((a - b).norm()) / max(float(b.norm()), FLOOR * largest) for a, b in pairs]
    return {"loss": float(expected.detach()), "max_error": max(errors)}


@app.command()
def update(
    size: Size = 12000,
    budget: Budget = "1GiB",
    work: Folder = Path("benchmark-runs/segmentation"),
    record: Record = True,
) -> None:
    """Take one update under a budget: forward and backward pass of the streamed loss."""
    _in_child("update", size, budget, work, record)


@app.command()
def predict(
    size: Size = 12000,
    budget: Budget = "512MiB",
    work: Folder = Path("benchmark-runs/segmentation"),
    record: Record = True,
) -> None:
    """Write the map of classes to an OME-Zarr folder under a budget."""
    _in_child("predict", size, budget, work, record)


def _in_child(case: str, size: int, budget: str, work: Path, record: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    write_scene(work, size)
    found = in_fresh_process("benchmarks.segmentation", "child", case, str(size), budget, str(work))
    _report({"case": f"{case} {size} {budget}", **found}, record=record)


@app.command(hidden=True)
def child(case: str, size: int, budget: str, work: Path) -> None:
    """Run one case in this process; what it took as JSON on the last line."""
    image, mask = write_scene(work, size)
    model = StreamingModel(make_net(), budget, preprocess=scaled, spill=work)
    before, began = _most_resident(), time.perf_counter()
    found: dict[str, Any] = {}
    if case == "update":
        loss = model.streamed_loss(image, mask, loss_of)
        found["forward_seconds"] = round(time.perf_counter() - began, 1)
        loss.backward()
        found["loss"] = float(loss.detach())
    else:
        model.predict_to(image, work / f"map-{size}.zarr", output="classes", overwrite=True)
        shutil.rmtree(work / f"map-{size}.zarr")
    report = model.last_report
    assert report is not None
    print(
        json.dumps(
            {
                "budget": parse_bytes(budget),
                "projected_bytes": report.projected_bytes,
                "measured_bytes": report.measured_bytes,
                "resident_bytes_before": before,
                "most_resident_bytes": _most_resident(),
                "seconds": round(time.perf_counter() - began, 1),
                **found,
            }
        )
    )


def _most_resident() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _report(fields: dict[str, Any], *, record: bool) -> None:
    command = "python -m benchmarks.segmentation " + " ".join(sys.argv[1:])
    print(append("segmentation", command, **fields) if record else json.dumps(fields), flush=True)


if __name__ == "__main__":
    app()
