"""Cases in which blocks are kept, each in a process of its own: ``python kept_blocks_cases.py``.

The program prints one JSON object: what each case returned, null where its process died.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import resource
import threading
from collections.abc import Callable
from typing import Any

import torch
from ceiling_cases import in_a_child
from streaming_cases import error_of, loss_of, make_image, make_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from streamcnn import StreamingModel
from streamcnn.ceiling.allocator import start_thread_pool
from streamcnn.ceiling.baseline import Baseline
from streamcnn.ceiling.cpu import DataLimit
from streamcnn.ceiling.kept_blocks import KeptBlocks, extents, free_block_bytes
from streamcnn.ceiling.process import status_bytes
from streamcnn.ceiling.refusals import is_out_of_memory
from streamcnn.support.models import load_model

MIB = 2**20
USED = 2


def block(nbytes: int = MIB) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def is_kept(tensor: Tensor) -> bool:
    return (tensor.data_ptr(), USED) in [(start, state) for start, _, state in extents()]


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def forked_children() -> Any:
    """Children of a thread in a pass, while another thread takes and frees blocks."""
    blocks, over = KeptBlocks(cap=64 * MIB), threading.Event()
    blocks.enter()
    tensor = block().fill_(5)

    def churn() -> None:
        mine = KeptBlocks()
        mine.enter()
        while not over.is_set():
            block()
        mine.leave()

    def child() -> Any:
        # OpenMP's threads are not there after a fork, and would be waited for.
        torch.set_num_threads(1)
        outside, value = is_kept(block()), int(tensor.sum()) // MIB
        tensor.untyped_storage().resize_(0)
        own = KeptBlocks(cap=MIB)
        own.enter()
        return [outside, value, is_kept(block()), own._counts()[0]]

    thread = threading.Thread(target=churn)
    thread.start()
    found = [in_a_child(child) for _ in range(30)]
    over.set()
    thread.join()
    return {
        "children": [each == [False, 5, True, 0] for each in found],
        "parent": [is_kept(block()), int(tensor.sum()) // MIB, blocks._counts()[0]],
    }


def refused_mappings() -> Any:
    """What the kernel refuses under a limit of the process's own, with free blocks that are too small."""
    start_thread_pool()
    blocks = KeptBlocks()
    blocks.enter()
    small = [block() for _ in range(32)]
    del small[::2]
    before, held = free_block_bytes(), status_bytes("VmData")
    assert held is not None
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + MIB, hard))
    errors = [error_with(16 * MIB), error_with(64 * MIB)]
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return {"free": [before, free_block_bytes()], "errors": errors, "later": error_with(64 * MIB)}


def error_with(nbytes: int) -> tuple[bool, str] | None:
    """Whether the error of a block of ``nbytes`` counts as out of memory, and its text; None if none."""
    try:
        block(nbytes).fill_(1)
    except RuntimeError as error:
        return is_out_of_memory(error), str(error)
    return None


def onednn_outlives_its_pass() -> Any:
    """Memory that oneDNN took in a pass, from this allocator, and before it, and frees when that is over."""
    weights = torch.rand(64, 64, 9, 9)
    early = weights.to_mkldnn()
    blocks = KeptBlocks()
    blocks.enter()
    within = weights.to_mkldnn()
    taken = blocks._counts()[0]
    del early
    blocks.leave()
    late = weights.to_mkldnn()
    equal = [torch.equal(each.to_dense(), weights) for each in (within, late)]
    del within, late
    return {"taken": taken, "equal": equal, "left": blocks._counts()[0]}


class Blocks(Dataset[Tensor]):
    """Tensors of 256 KiB."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return block(MIB // 4).fill_(index)


def workers() -> Any:
    """A ``DataLoader``'s workers that are started in a pass."""
    blocks = KeptBlocks(cap=MIB)
    blocks.enter()
    # A batch in a worker is twice as large as the pass may take here.
    batches = list(DataLoader(Blocks(), batch_size=8, num_workers=2))
    blocks.leave()
    return [batch[:, 0].tolist() for batch in batches]


def streamed() -> Any:
    """Updates of a streamed net against its twin's, with what they keep."""
    net = make_net()
    twin, image = copy.deepcopy(net), make_image(shape=(1, 3, 400, 300))
    model = StreamingModel(net, "100MiB", tile=130)
    errors, kept = [], []
    for _ in range(2):
        for each in (model, twin):
            each.zero_grad()
            loss_of(each(image)).backward()
        pairs = list(zip(net.parameters(), twin.parameters(), strict=True))
        largest = max(float(theirs.grad.norm()) for _, theirs in pairs if theirs.grad is not None)
        errors.append(max(error_of(ours.grad, theirs.grad, largest) for ours, theirs in pairs))
        kept.append(free_block_bytes())
    report, plan = model.last_report, model.plan(tuple(image.shape))
    assert report is not None
    model.release()
    kept.append(free_block_bytes())
    loss_of(model(image)).backward()
    kept.append(free_block_bytes())
    del model
    gc.collect()
    kept.append(free_block_bytes())
    return {
        "errors": errors,
        "kept": kept,
        "kept_bytes": max(plan.kept_bytes.values()),
        "measured": report.measured_bytes,
        "after": is_kept(block()),
    }


def page_faults() -> Any:
    """Faults of three updates of ResNet-18 at 512 x 512 within 256 MiB, and what they took."""
    model = StreamingModel(load_model("resnet18", num_classes=10).train(), "256MiB")
    image, found, reports = torch.rand(1, 3, 512, 512), [], []
    for _ in range(3):
        model.zero_grad()
        before = faults()
        model(image).square().sum().backward()
        found.append(faults() - before)
        reports.append(model.last_report)
    return {
        "faults": found,
        "retries": [each.num_retries for each in reports if each],
        "measured": [each.measured_bytes for each in reports if each],
    }


def two_threads() -> Any:
    """Two blocks on two threads at once, each with tensors for most of its budget."""
    turn, found = threading.Barrier(2, timeout=60), dict[str, Any]()

    def work(budget: int) -> None:
        start_thread_pool()
        # Threads' stacks are no part of either budget.
        turn.wait()
        baseline, errors = Baseline.now(fill_holes=False), []
        turn.wait()
        # As forward and backward: what the first keeps, counts in the second.
        for _ in range(2):
            with DataLimit(budget, baseline=baseline, kept=budget):
                turn.wait()
                large = block(budget * 3 // 4).fill_(1)
                turn.wait()
                try:
                    block(budget)
                except RuntimeError as error:
                    errors.append(is_out_of_memory(error))
                turn.wait()
                del large
        found[str(budget // MIB)] = errors

    before = resource.getrlimit(resource.RLIMIT_DATA)
    threads = [threading.Thread(target=work, args=(budget,)) for budget in (40 * MIB, 200 * MIB)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return [found, resource.getrlimit(resource.RLIMIT_DATA) == before]


def another_plan() -> Any:
    """A pass with a small plan after one with a large one."""
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.AdaptiveAvgPool2d(1))
    model, kept = StreamingModel(net, "800MiB", tile=600), []
    for size, budget in ((600, 800 * MIB), (100, 60 * MIB)):
        model.budget = budget
        model(torch.rand(1, 3, size, size)).sum().backward()
        may_keep = max(model.plan((1, 3, size, size)).kept_bytes.values())
        kept.append([free_block_bytes(), may_keep])
    return kept


CASES: tuple[Callable[[], Any], ...] = (
    refused_mappings,
    onednn_outlives_its_pass,
    forked_children,
    workers,
    streamed,
    page_faults,
    two_threads,
    another_plan,
)

if __name__ == "__main__":
    print(json.dumps({case.__name__: in_a_child(case) for case in CASES}), flush=True)
    os._exit(0)
