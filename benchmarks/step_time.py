"""Time of one train-mode forward and backward pass, streamed over plain, in one interleaved run.

    python -m benchmarks.step_time resnet18 --size 2048 --budget 8GiB

Plain and streamed passes alternate, so that whatever else the machine does meets both; the ratio of the
medians is the result. Loading, capture and one warm-up pass of each are left out. On a GPU, ``--autocast``
has both compute in bfloat16.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Annotated

import torch
import typer

from benchmarks.record import append, device_name
from streamcnn import StreamingModel
from streamcnn.support.models import load_model


def main(
    model: str,
    size: Annotated[int, typer.Option(help="Edge of the square image in pixels.")] = 2048,
    budget: Annotated[str | None, typer.Option(help="Ceiling of the streamed pass.")] = None,
    tile: Annotated[int | None, typer.Option(help="Tile edge; the planner's own if not given.")] = None,
    repeats: Annotated[int, typer.Option(help="Passes of each kind.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    autocast: Annotated[bool, typer.Option("--autocast", help="In bfloat16 where it may.")] = False,
    record: Annotated[bool, typer.Option(help="Append to results/step_time.jsonl.")] = True,
) -> None:
    """Measure and print one JSON line."""
    torch.manual_seed(0)
    plain = load_model(model, num_classes=28).train().to(device)
    net = load_model(model, num_classes=28).train()
    streamed = StreamingModel(net, budget, tile=tile, device=device)
    image = torch.rand(1, 3, size, size, device=device)
    label = torch.tensor([7], device=device)
    seconds: dict[str, list[float]] = {"plain": [], "streamed": []}
    for turn in range(repeats + 1):
        for name, net in (("plain", plain), ("streamed", streamed)):
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                elapsed = _step(net, image, label)
            if turn:
                seconds[name].append(elapsed)
                print(f"{name:>9} {elapsed:.2f} s", file=sys.stderr)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        plan = streamed.plan((1, 3, size, size))
    report = streamed.last_report
    assert report is not None
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fields = {
        "device": device_name(cpu=device == "cpu"),
        "case": f"{model} {size}x{size}{' bfloat16' if autocast else ''}",
        "budget": plan.budget,
        "tile": list(plan.tile),
        "plan": plan.digest,
        "plain_seconds": round(medians["plain"], 3),
        "streamed_seconds": round(medians["streamed"], 3),
        "ratio": round(medians["streamed"] / medians["plain"], 3),
        "all_seconds": {name: [round(s, 3) for s in values] for name, values in seconds.items()},
        "projected_bytes": report.projected_bytes,
        "measured_bytes": report.measured_bytes,
        "on_disk": sum(store.tier.value == "disk" for store in plan.stores.values()),
    }
    command = "python -m benchmarks.step_time " + " ".join(sys.argv[1:])
    print(append("step_time", command, **fields) if record else fields)


def _step(net: torch.nn.Module, image: torch.Tensor, label: torch.Tensor) -> float:
    net.zero_grad(set_to_none=True)
    if image.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    torch.nn.functional.cross_entropy(net(image), label).backward()
    if image.is_cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    if image.is_cuda:
        # What the plain pass leaves cached would count as the streamed one's.
        torch.cuda.empty_cache()
    return elapsed


if __name__ == "__main__":
    typer.run(main)
