"""Peak memory of one training update under a budget, every case in a fresh process.

    python -m benchmarks.peak_memory run resnet18 resnet50 --sizes 1000,2000 --budgets 512MiB,1GiB
    python -m benchmarks.peak_memory random --cases 60 --seed 0
    python -m benchmarks.peak_memory images --size 3000 --budgets 64MiB,192MiB
    python -m benchmarks.peak_memory compare FIRST.pt SECOND.pt

Images are zarr arrays of random bytes on disk, made beforehand and read tile by tile. On the CPU the peak is
the kernel's high-water mark of resident memory above what the process holds with library, model, optimiser
and plan loaded, and the kernel's limit on the data segment enforces the budget. On a GPU the peak is the
process's memory according to NVML, CUDA's context included, and PyTorch's allocator is capped. A case that
does not fit is refused before it starts, which is a result too.
"""

from __future__ import annotations

import json
import random as randomness
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import tifffile
import torch
import typer
from PIL import Image
from torch import Tensor, nn

from benchmarks.record import append, device_name, in_fresh_process, resident_bytes
from streamcnn import BudgetExceeded, PlanDoesNotFit, StreamingModel, ZarrSource
from streamcnn.data.sources import TensorSource, open_image, write_zarr_image
from streamcnn.support.models import load_model
from streamcnn.support.units import format_bytes, parse_bytes

app = typer.Typer(add_completion=False)

RANDOM_MODELS = (
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "convnext_tiny",
    "mobilenetv3_large_100",
    "regnety_004",
    "densenet121",
    "benchmarks.networks:UNet",
)
EXTRA_ON_CUDA = 2**30
"""Bytes added to random budgets on a GPU, where CUDA's context and libraries are part of them."""
Record = Annotated[bool, typer.Option(help="Append to results/peak_memory.jsonl.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


@app.command()
def run(
    models: list[str],
    sizes: Annotated[str, typer.Option(help="Edges of square images, separated by commas.")] = "1000,2000",
    budgets: Annotated[str, typer.Option(help="Ceilings of forward and backward, likewise.")] = "1GiB",
    tile: Annotated[int, typer.Option(help="Tile edge; 0 leaves it to the planner.")] = 0,
    gradients: Annotated[Path | None, typer.Option(help="Folder to keep parameters' gradients in.")] = None,
    double: Annotated[bool, typer.Option("--double", help="In float64.")] = False,
    device: Device = "cpu",
    record: Record = True,
) -> None:
    """Measure every model at every size and budget, each in its own process; one JSON line each."""
    command = _command()
    for model in models:
        for size in map(int, sizes.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                _write_images(Path(folder), 1, size, size)
                for budget in budgets.split(","):
                    dtype = "float64" if double else "float32"
                    kept = f"{model}-{size}-{budget}-{tile}-{dtype}.pt"
                    kept = "" if gradients is None else str(gradients / kept)
                    found = _case(model, Path(folder), budget, tile, kept, dtype, device)
                    name = f"{model} {size}x{size} {budget}{' float64' if double else ''}"
                    _report(command, name, found, record=record)


@app.command()
def random(
    cases: Annotated[int, typer.Option(help="Number of cases.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the choice of cases.")] = 0,
    device: Device = "cpu",
    record: Record = True,
) -> None:
    """Random models, shapes, batches and budgets: each keeps to its budget or is refused at planning."""
    choose = randomness.Random(seed)
    command, wrong = _command(), []
    for _ in range(cases):
        model, batch = choose.choice(RANDOM_MODELS), choose.choice((1, 1, 2, 3))
        height, width = (choose.randrange(200, 1100) for _ in range(2))
        budget = int(2 ** choose.uniform(26.5, 30.5)) + (device == "cuda") * EXTRA_ON_CUDA
        with tempfile.TemporaryDirectory() as folder:
            _write_images(Path(folder), batch, height, width)
            found = _case(model, Path(folder), str(budget), 0, "", "float32", device)
        name = f"{model} {batch}x3x{height}x{width} {format_bytes(budget)}"
        _report(command, name, found, record=record)
        if found["outcome"] == "exceeded" or (found["measured_bytes"] or 0) > budget:
            wrong.append(name)
    print(f"{cases - len(wrong)} of {cases} within budget or refused at planning; wrong: {wrong or 'none'}")
    raise SystemExit(bool(wrong))


@app.command()
def images(
    size: Annotated[int, typer.Option(help="Edge of the square image.")] = 3000,
    budgets: Annotated[str, typer.Option(help="Ceilings, separated by commas.")] = "64MiB,192MiB",
    record: Record = True,
) -> None:
    """An image in four formats: resident memory, as this process sees it, keeps to a budget, or a refusal."""
    command, wrong = _command(), []
    with tempfile.TemporaryDirectory() as folder:
        for path in _write_formats(Path(folder), size):
            for budget in budgets.split(","):
                found = _watched(path, budget)
                name = f"{path.name} {size}x{size} {budget}"
                _report(command, name, found, record=record)
                if found["outcome"] == "finished" and found["resident_bytes"] > found["budget"]:
                    wrong.append(name)
                if found["outcome"] == "exceeded" or (found["outcome"] == "refused" and not found["refusal"]):
                    wrong.append(name)
    print(f"wrong: {wrong or 'none'}")
    raise SystemExit(bool(wrong))


@app.command(hidden=True)
def reading(path: Path, budget: str) -> None:
    """One update of a small network on one image; waits for a line before it and after it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    streamed = StreamingModel(net.train(), budget, preprocess=lambda pixels: pixels / 255 - 0.5)
    # What is imported and captured on first use is no part of a pass.
    streamed([TensorSource(torch.zeros(3, 64, 64, dtype=torch.uint8))]).sum().backward()
    source = open_image(path)
    plan, refusal, outcome = streamed.plan(source), "", "finished"
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        streamed(source).square().mean().backward()
    except PlanDoesNotFit as error:
        outcome, text = "refused", str(error)
        refusal = text.replace(str(path.parent), "") if "streamcnn convert" in text else ""
    except BudgetExceeded:
        outcome = "exceeded"
    report = streamed.last_report if outcome == "finished" else None
    result = {
        "device": device_name(cpu=True),
        "outcome": outcome,
        "budget": parse_bytes(budget),
        "measured_bytes": report and report.measured_bytes,
        "projected_bytes": plan.projected_bytes,
        "image_held_bytes": plan.image_held_bytes,
        "image_read_bytes": plan.image_read_bytes,
        "refusal": refusal,
    }
    print(json.dumps(result), flush=True)
    sys.stdin.readline()


def _watched(path: Path, budget: str) -> dict[str, Any]:
    """The result of `reading`, and its peak of resident memory above its start, as read by this process."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", "reading", str(path), budget]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        before = peak = resident_bytes(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        while not select.select([child.stdout], [], [], 0.003)[0]:
            peak = max(peak, resident_bytes(child.pid))
        found: dict[str, Any] = json.loads(child.stdout.readline())
        child.stdin.write("end\n")
        child.stdin.flush()
    return {**found, "resident_bytes": peak - before}


def _write_formats(folder: Path, size: int) -> list[Path]:
    """Write one random image as a PNG, a TIFF in one strip, and zarr arrays in one chunk and in many."""
    random_numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, size, size), dtype=torch.uint8, generator=random_numbers)
    channels_last = pixels.permute(1, 2, 0).contiguous().numpy()
    paths = [folder / name for name in ("image.png", "one-strip.tif", "one-chunk.zarr", "chunked.zarr")]
    Image.fromarray(channels_last).save(paths[0], compress_level=1)
    tifffile.imwrite(paths[1], channels_last, compression="zlib", rowsperstrip=size, photometric="rgb")
    write_zarr_image(paths[2], pixels, chunk=size)
    write_zarr_image(paths[3], pixels, chunk=512)
    return paths


@app.command()
def compare(first: Path, second: Path, record: Record = True) -> None:
    """Hold the gradients of two runs, kept by ``run --gradients``, against each other.

    In float32 they differ by what rounding makes of them. In a network that ends in batch norm and global
    pooling that can be some percent: the norm's backward pass takes off the mean of what arrives, which the
    pooling has made nearly constant. ``run --double`` tells rounding from errors.
    """
    found, expected = torch.load(first), torch.load(second)
    # What is zero but for rounding, such as the gradient of a bias before batch norm, has no relative error.
    least = 1e-6 * max(gradient.norm() for gradient in expected.values())
    differences = {
        name: float((found[name] - expected[name]).norm() / torch.clamp(expected[name].norm(), min=least))
        for name in expected
    }
    worst = max(differences, key=differences.__getitem__)
    fields = {
        "case": f"gradients of {first.stem} and {second.stem}",
        "num_parameters": len(differences),
        "median_relative_difference": statistics.median(differences.values()),
        "largest_relative_difference": differences[worst],
        "at": worst,
    }
    print(append("peak_memory", _command(), **fields) if record else json.dumps(fields))


@app.command(hidden=True)
def one(model: str, folder: Path, budget: str, tile: int, gradients: str, dtype: str, device: str) -> None:
    """One update in this process; the measurement as JSON on the last line."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    net = load_model(model).train().to(kind)
    _draw_norms(net)
    streamed = StreamingModel(
        net,
        budget,
        tile=tile or None,
        preprocess=lambda pixels: pixels.to(kind) / 255 - 0.5,
        device=device,
    )
    optimizer = torch.optim.SGD(streamed.parameters(), lr=1e-3, momentum=0.9)
    sources = [ZarrSource(path) for path in sorted(folder.glob("*.zarr"))]
    start = time.perf_counter()
    plan = streamed.plan((len(sources), *sources[0].shape))
    planned = time.perf_counter()
    outcome = "finished"
    try:
        output: Tensor = streamed(sources)
        output.square().mean().backward()
        if gradients:
            torch.save({name: p.grad for name, p in streamed.named_parameters()}, gradients)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
    except PlanDoesNotFit:
        outcome = "refused"
    except BudgetExceeded:
        outcome = "exceeded"
    report = streamed.last_report
    result = {
        # Not asked for by the process that starts this one, which would take memory of the card for that.
        "device": device_name(cpu=device == "cpu"),
        "outcome": outcome,
        "budget": parse_bytes(budget),
        "measured_bytes": report and report.measured_bytes,
        "reading": report and report.reading,
        "projected_bytes": plan.projected_bytes,
        "retries": report.num_retries if report else 0,
        "plain_bytes": plan.plain_bytes,
        "planning_seconds": round(planned - start, 1),
        "seconds": round(time.perf_counter() - planned, 1),
        "projected_seconds": round(plan.projected_seconds, 1),
        "recomputation": round(plan.recomputation, 3),
        "tile": list(plan.tile),
        "on_disk_bytes": sum(s.nbytes for s in plan.stores.values() if s.tier.value == "disk"),
        "bytes_moved": report and report.bytes_moved,
        "worst": plan.worst,
        "plan": plan.digest,
    }
    print(json.dumps(result))


def _draw_norms(net: nn.Module) -> None:
    """Give norms random weights: timm starts a block's last norm at zero, which stops its gradients."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)


def _command() -> str:
    return "python -m benchmarks.peak_memory " + " ".join(sys.argv[1:])


def _write_images(folder: Path, count: int, height: int, width: int) -> None:
    for index in range(count):
        random_numbers = torch.Generator().manual_seed(index)
        pixels = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=random_numbers)
        write_zarr_image(folder / f"image-{index}.zarr", pixels)


def _case(
    model: str, folder: Path, budget: str, tile: int, gradients: str, dtype: str, device: str
) -> dict[str, Any]:
    arguments = (model, str(folder), budget, str(tile), gradients, dtype, device)
    return in_fresh_process("benchmarks.peak_memory", "one", *arguments)


def _report(command: str, case: str, found: dict[str, Any], *, record: bool) -> None:
    fields = {"case": case, **found}
    if found["measured_bytes"]:
        fields["projected_over_measured"] = round(found["projected_bytes"] / found["measured_bytes"], 3)
    print(append("peak_memory", command, **fields) if record else json.dumps(fields), flush=True)


if __name__ == "__main__":
    app()
