"""The process of one family: what it is, how exact it streams, how it is planned.

    python -m benchmarks.zoo.one LIBRARY NAME FOLDER PARENT

Each part is a line of JSON in FOLDER/parts.jsonl as soon as it is done, so that a process that is ended tells
what it had found.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.processes import end_with
from benchmarks.record import device_name
from benchmarks.zoo.families import Family, skeleton, smallest
from benchmarks.zoo.numerics import compare
from benchmarks.zoo.planned import planned
from benchmarks.zoo.sizes import LARGE, SMALL, NoSize, fitted
from benchmarks.zoo.traits import FEWEST_CONVOLUTIONS, further_convolutions, has_attention
from streamcnn.ceiling.refusals import is_out_of_memory
from streamcnn.errors import StreamError
from streamcnn.support.units import format_bytes

MOST_BYTES = 12 * 2**30
"""Of address space: some models make tables of positions by positions, larger than a machine's memory."""
PARTS = "parts.jsonl"

Say = Callable[..., None]


def examine(family: Family, say: Say) -> None:
    """Everything that is found of a family, part by part."""
    variant = smallest(family)
    say(variant=variant.name)
    net = skeleton(variant)
    num_convolutions = further_convolutions(net)
    say(
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        convolutions=num_convolutions,
    )
    if num_convolutions < FEWEST_CONVOLUTIONS:
        say(excluded=f"{num_convolutions} convolutions besides the first")
        return
    del net
    try:
        net, shape = fitted(variant, SMALL, (2,), fake=False)
    except NoSize as error:
        say(excluded=f"plain PyTorch runs it at no size that was tried: {error}")
        return
    say(attention=has_attention(net.eval(), shape))
    say(train=outcome(partial(compare, net, shape, train=True)))
    say(eval=outcome(partial(compare, net, shape, train=False)))
    del net
    say(plan=outcome(lambda: planned(*fitted(variant, LARGE, (1, 2), fake=True))))


def outcome(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part found, or how it ended.

    ``unfit`` for sizes and memory, ``refused`` with a reason of streamcnn's, or ``failed``, which is a fault.
    """
    try:
        return part()
    except NoSize as error:
        return {"unfit": str(error)}
    except Exception as error:
        if is_out_of_memory(error):
            return {"unfit": f"it takes more than {format_bytes(MOST_BYTES)} of address space"}
        if isinstance(error, StreamError):
            return {"refused": str(error)}
        frames = traceback.extract_tb(error.__traceback__)
        here = next((frame for frame in reversed(frames) if "streamcnn" in frame.filename), frames[-1])
        place = f"{Path(here.filename).name}:{here.lineno}"
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({place})"}


def main() -> None:
    """Examine the family that the command line names."""
    library, name, folder, parent = sys.argv[1:]
    end_with(int(parent))
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    # A card's memory is addressed as well, and would go beyond the limit.
    os.environ |= {"STREAMCNN_CALIBRATION": "off", "CUDA_VISIBLE_DEVICES": ""}
    # Tiles this small are slower on several threads, and plans are then the same on every machine.
    torch.set_num_threads(1)
    with (Path(folder) / PARTS).open("a") as file:

        def say(**part: Any) -> None:
            file.write(json.dumps(part) + "\n")
            file.flush()

        say(device=device_name(cpu=True))
        examine(Family(library, name), say)
        say(cpu_seconds=round(time.process_time(), 1))


if __name__ == "__main__":
    main()
