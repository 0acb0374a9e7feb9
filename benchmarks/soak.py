"""Repeat passes in one process, to see whether memory and page faults stay constant.

    python -m benchmarks.soak updates resnet18 --size 512 --budget 128MiB --count 500
    python -m benchmarks.soak threads --count 200

``updates`` trains on one image and reports resident memory and page faults by tenths of the updates.
``threads`` lets two threads make passes at the same time, each under a budget of its own, and compares every
gradient with that of a pass alone.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import threading
import time
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from benchmarks.record import append, in_fresh_process, resident_bytes
from streamcnn import StreamingModel
from streamcnn.support.models import load_model
from streamcnn.support.units import parse_bytes

app = typer.Typer(add_completion=False)
_PARTS = 10
_THREADS = (("resnet18", 256, "192MiB"), ("mobilenetv3_large_100", 320, "256MiB"))
"""Network, edge of the image and budget of each thread."""


@app.command()
def updates(
    model: str,
    size: Annotated[int, typer.Option(help="Edge of the square image.")] = 512,
    budget: Annotated[str, typer.Option(help="Ceiling of a pass.")] = "128MiB",
    count: Annotated[int, typer.Option(help="Updates.", min=_PARTS)] = 500,
    record: Annotated[bool, typer.Option(help="Append to results/soak.jsonl.")] = True,
) -> None:
    """Train on one image in a fresh process and print one JSON line."""
    found = in_fresh_process("benchmarks.soak", "child", model, str(size), budget, str(count))
    _report({"case": f"{model} {size}x{size} {budget}, {count} updates", **found}, record=record)


@app.command(hidden=True)
def child(model: str, size: int, budget: str, count: int) -> None:
    """Train in this process; what it held and faulted in, by tenths, as JSON on the last line."""
    torch.manual_seed(0)
    net = StreamingModel(load_model(model, num_classes=10).train(), budget)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x, y = torch.rand(1, 3, size, size), torch.tensor([7])
    resident, faults, seconds, measured = [], [], [], []
    for part in range(_PARTS):
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        share = count * (part + 1) // _PARTS - count * part // _PARTS
        for _ in range(share):
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            measured.append(net.last_report.measured_bytes or 0)
        faults.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // share)
        seconds.append(round((time.perf_counter() - began) / share, 3))
        resident.append(resident_bytes(os.getpid()))
    print(
        json.dumps(
            {
                "budget": parse_bytes(budget),
                "most_measured_bytes": max(measured),
                "resident_bytes": resident,
                "faults_of_an_update": faults,
                "seconds_of_an_update": seconds,
            }
        )
    )


@app.command()
def threads(
    count: Annotated[int, typer.Option(help="Passes of both threads together.", min=2)] = 200,
    record: Annotated[bool, typer.Option(help="Append to results/soak.jsonl.")] = True,
) -> None:
    """Let two threads make passes under budgets of their own, and compare them with passes alone."""
    _report({"case": f"two threads, {count} passes", **_interleaved(count)}, record=record)


def _interleaved(count: int) -> dict[str, object]:
    torch.manual_seed(0)
    passes = [_Passes(*case) for case in _THREADS]
    together = threading.Barrier(len(passes))
    workers = [
        threading.Thread(target=each.run, args=(count // len(passes), together, place))
        for place, each in enumerate(passes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {
        "passes": [each.num_done for each in passes],
        "wrong": sum(each.num_wrong for each in passes),
        "errors": [str(error) for each in passes for error in each.errors],
        "over_budget": sum(each.num_over for each in passes),
        "overlapped": sum(each.num_shared for each in passes),
        "median_measured_over_budget": [
            round(statistics.median(each.shares), 3) if each.shares else None for each in passes
        ],
    }


class _Passes:
    """Passes of one network in one thread."""

    def __init__(self, model: str, size: int, budget: str) -> None:
        self.net = StreamingModel(load_model(model, num_classes=10).eval(), budget)
        self.budget = parse_bytes(budget)
        self.x = torch.rand(1, 3, size, size)
        self.expected = self._gradients()
        self.num_done = self.num_wrong = self.num_over = self.num_shared = 0
        self.shares: list[float] = []
        self.errors: list[Exception] = []

    def run(self, count: int, together: threading.Barrier, seed: int) -> None:
        """Make passes that begin at varying moments of the other thread's passes."""
        together.wait()
        for index in range(count):
            time.sleep(0.001 * (37 * (index + seed) % 20))
            try:
                found = self._gradients()
            except Exception as error:
                self.errors.append(error)
                continue
            self.num_done += 1
            report = self.net.last_report
            self.num_wrong += any(not torch.equal(a, b) for a, b in zip(found, self.expected, strict=True))
            self.num_shared += report.is_shared
            if report.measured_bytes is not None and not report.is_shared:
                self.shares.append(report.measured_bytes / self.budget)
                self.num_over += report.measured_bytes > self.budget

    def _gradients(self) -> list[Tensor]:
        self.net.zero_grad(set_to_none=True)
        self.net(self.x).square().sum().backward()
        return [each.grad.clone() for each in self.net.parameters() if each.grad is not None]


def _report(fields: dict[str, object], *, record: bool) -> None:
    command = "python -m benchmarks.soak " + " ".join(sys.argv[1:])
    print(append("soak", command, **fields) if record else json.dumps(fields), flush=True)


if __name__ == "__main__":
    app()
