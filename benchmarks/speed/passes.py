"""The process that makes one kind of pass, one at a time on command.

    python -m benchmarks.speed.passes TASK

It says on a line of JSON when it is ready, then answers each command on a line of JSON: ``pass`` makes a pass
and says what that took, ``rest`` gives free memory back to the system. It ends with its input.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import device_name
from benchmarks.speed.task import Task
from streamcnn import StreamingModel
from streamcnn.ceiling.allocator import trim_heap
from streamcnn.ceiling.cuda import idle_bytes, nvml_session, record_idle_memory
from streamcnn.ceiling.gauge import Gauge
from streamcnn.ceiling.refusals import is_out_of_memory
from streamcnn.plan.storage import Tier
from streamcnn.runtime.calibration import hardware_profile
from streamcnn.support.models import load_model

_ENDED_FIRST = 1000
"""The kernel's most, for the process to end where memory runs out."""


class Passes:
    """A network and images, ready for a pass.

    Parameters
    ----------
    task
        What to compute, how and where.
    """

    def __init__(self, task: Task) -> None:
        torch.manual_seed(0)
        record_idle_memory()
        self._case, self._device = task.case, task.device
        layout = torch.channels_last if task.kind.channels_last else torch.contiguous_format
        net = load_model(task.case.model).train(not task.case.inference)
        net = net.to(task.device, memory_format=layout)
        self.image = torch.rand(task.case.shape, device=task.device).contiguous(memory_format=layout)
        """(N, 3, H, W), float32."""
        self.net = _prepared(net, task)
        """As the kind has it computed."""
        self._gauge = None
        if task.device == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
            self._gauge = Gauge(device, nvml_session(), idle_bytes)

    def make(self) -> dict[str, Any]:
        """A pass; its seconds, page faults and bytes."""
        self.net.zero_grad(set_to_none=True)
        if self._gauge is not None:
            self._gauge.reset_peak()
        before, start = resource.getrusage(resource.RUSAGE_SELF), self._now()
        output = self._forward()
        allocated = self._allocated()
        if not self._case.inference:
            output.float().square().mean().backward()
        seconds, after = self._now() - start, resource.getrusage(resource.RUSAGE_SELF)
        return {
            "seconds": round(seconds, 4),
            "user_seconds": round(after.ru_utime - before.ru_utime, 3),
            "kernel_seconds": round(after.ru_stime - before.ru_stime, 3),
            "minor_faults": after.ru_minflt - before.ru_minflt,
            "allocated_bytes": max(allocated, self._allocated()),
            **self._measured(),
        }

    def rest(self) -> None:
        """Give memory back that is free but kept, and the gradients."""
        self.net.zero_grad(set_to_none=True)
        gc.collect()
        if isinstance(self.net, StreamingModel):
            self.net.release()
        trim_heap()
        if self._gauge is not None:
            self._gauge.empty_cache()

    def plan(self) -> dict[str, Any] | None:
        """How a streamed pass was planned; None of a plain one."""
        if not isinstance(self.net, StreamingModel):
            return None
        with torch.set_grad_enabled(not self._case.inference), self._autocast():
            plan = self.net.plan(self._case.shape)
        return {
            "digest": plan.digest,
            "budget_bytes": plan.budget,
            "tile": list(plan.tile),
            "phases": len(plan.phases),
            "tiles": sum(phase.num_tiles for phase in plan.phases),
            "resident_operators": plan.num_resident,
            "recomputation": round(plan.recomputation, 3),
            "projected_seconds": round(plan.projected_seconds, 3),
            "projected_plain_seconds": round(plan.plain_seconds, 3),
            "projected_bytes": plan.projected_bytes,
            "projected_plain_bytes": plan.plain_bytes,
            "stored_bytes": {tier.value: plan.bytes_on(tier) for tier in Tier},
        }

    def _forward(self) -> Tensor:
        with torch.set_grad_enabled(not self._case.inference), self._autocast():
            output: Tensor = self.net(self.image)
        return output

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._case.autocast)

    def _now(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self._gauge is not None:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _allocated(self) -> int:
        """The most bytes of live tensors on a card; a streamed pass resets it between its directions."""
        return 0 if self._gauge is None else torch.cuda.max_memory_allocated()

    def _measured(self) -> dict[str, Any]:
        """What streamcnn measured; of a plain pass on a card the same, all that the process held there."""
        if isinstance(self.net, StreamingModel):
            report = self.net.last_report
            assert report is not None
            return {
                "measured_bytes": report.measured_bytes,
                "reading": report.reading,
                "retries": report.num_retries,
                "moved_bytes": report.bytes_moved,
                "compiled_parts": report.num_compiled,
            }
        if self._gauge is None:
            return {}
        overhead = self._gauge.overhead()
        held = overhead.nbytes + self._gauge.max_reserved()
        return {"measured_bytes": held, "reading": overhead.source.value}


def _prepared(net: nn.Module, task: Task) -> nn.Module:
    """The network as the kind has it computed."""
    kind = task.kind
    if kind.is_streamed:
        # What is measured once for a machine is no part of a first pass.
        element = torch.bfloat16 if task.case.autocast else torch.float32
        hardware_profile(next(net.parameters()).device, element)
        return StreamingModel(net, kind.budget, compile=kind.compiles_parts)
    if kind.checkpoints:
        if not hasattr(net, "set_grad_checkpointing"):
            raise SystemExit(f"{task.case.model} has no set_grad_checkpointing(), as timm's networks have")
        net.set_grad_checkpointing()
    if kind.activation_budget is None:
        return net
    import torch._functorch.config as compiler

    compiler.activation_memory_budget = kind.activation_budget
    return torch.compile(net)


def _answer(passes: Passes, command: str) -> dict[str, Any]:
    """What a command has come to."""
    if command == "rest":
        passes.rest()
        return {}
    try:
        return {"pass": passes.make(), "plan": passes.plan()}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"refused": f"{type(error).__name__}: {error}"}


def main(text: str) -> None:
    """Answer commands until there are no more."""
    # Libraries print, too: what they do goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text(str(_ENDED_FIRST))
    task = Task.from_json(text)
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    passes = Passes(task)
    ready = {"device": device_name(cpu=task.device == "cpu"), "threads": torch.get_num_threads()}
    ready["versions"] = {
        "python": platform.python_version(),
        "timm": sys.modules["timm"].__version__ if "timm" in sys.modules else None,
        "libc": " ".join(platform.libc_ver()),
        "cuda": torch.version.cuda,
    }
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(passes, line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
