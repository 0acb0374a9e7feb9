"""Time what a training step takes beside its operators, which a GPU waits for where it is faster.

    python -m benchmarks.host_time run --sizes 64,128 --tile 64

The network has the layers of a ResNet-50 with few channels, and images are small, so that operators take next
to no time. Plain PyTorch and the streamed pass take turns. Of each, the tenth percentile counts, since other
processes only add to a time.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.record import append, device_name, in_fresh_process
from streamcnn import StreamingModel

app = typer.Typer(add_completion=False)

_WIDTH = 8
_REPEATS = 5
"""Processes for each size."""


@app.command()
def run(
    sizes: Annotated[str, typer.Option(help="Edges of square images, separated by commas.")] = "64,128",
    tile: Annotated[int, typer.Option(help="Edge of a tile; one of the image's size is one a phase.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps of each kind in a process.")] = 40,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    record: Annotated[bool, typer.Option(help="Append to results/host_time.jsonl.")] = True,
) -> None:
    """Time steps at each size, in fresh processes; print one JSON line each."""
    command = "python -m benchmarks.host_time " + " ".join(sys.argv[1:])
    for size in sizes.split(","):
        arguments = ("one", size, str(tile), str(steps), device)
        found = [in_fresh_process("benchmarks.host_time", *arguments) for _ in range(_REPEATS)]
        fields = {
            "case": f"narrow ResNet-50 {size}x{size}, tiles of {tile}x{tile}",
            "device": device_name(cpu=device == "cpu"),
            "num_tiles": found[0]["num_tiles"],
            **{
                f"{name}_ms": sorted(each[name] for each in found)
                for name in ("plain", "forward", "backward")
            },
        }
        print(append("host_time", command, **fields) if record else json.dumps(fields), flush=True)


@app.command(hidden=True)
def one(size: int, tile: int, steps: int, device: str) -> None:
    """Time steps in this process; milliseconds as JSON on the last line."""
    torch.set_num_threads(1)
    net = narrow_network().to(device)
    image = torch.randn(1, 3, size, size, device=device).to(memory_format=torch.channels_last)
    plain, model = copy.deepcopy(net), StreamingModel(net, tile=tile)
    # All layers are to be streamed, as they are where memory is tight.
    model.resident_tail = False
    for each in (plain, model):
        _step(each, image)
    times: dict[str, list[float]] = {"plain": [], "forward": [], "backward": []}
    for _ in range(steps):
        times["plain"].append(sum(_step(plain, image)))
        for name, seconds in zip(("forward", "backward"), _step(model, image), strict=True):
            times[name].append(seconds)
    plan = model.plan(tuple(image.shape))
    found = {name: round(1000 * float(np.percentile(each, 10)), 1) for name, each in times.items()}
    print(json.dumps({"num_tiles": sum(phase.num_tiles for phase in plan.phases), **found}))


def narrow_network() -> nn.Module:
    """A ResNet-50 with few channels, but for its stem."""
    torch.manual_seed(0)
    net = ResNet(Bottleneck, [3, 4, 6, 3], num_classes=10, channels=(_WIDTH,) * 4, stem_width=_WIDTH)
    net.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    return net


def _step(net: Callable[[Tensor], Tensor], image: Tensor) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass, as the host sees them."""
    target = torch.zeros(1, dtype=torch.long, device=image.device)
    start = time.perf_counter()
    loss = cross_entropy(net(image), target)
    middle = time.perf_counter()
    loss.backward()
    return middle - start, time.perf_counter() - middle


if __name__ == "__main__":
    app()
