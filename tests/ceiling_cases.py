"""Cases under a ceiling on host memory, each in a process of its own: ``python ceiling_cases.py``.

A limit left behind, or a heap full of another case's holes, would affect the next case. Each case runs in a
child forked before PyTorch has started any thread, which saves importing PyTorch every time. The program
prints one JSON object: what each case returned, null where its process died.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from streamcnn.ceiling import allocator, heap
from streamcnn.ceiling.baseline import Baseline
from streamcnn.ceiling.cpu import DataLimit
from streamcnn.ceiling.process import status_bytes
from streamcnn.ceiling.refusals import is_out_of_memory

MB = 10**6


def soft_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_DATA)[0]


def error_of(action: Callable[[], object]) -> tuple[bool, str] | None:
    """Whether the error of ``action`` counts as out of memory, and its text; None if it raises none."""
    try:
        action()
    except Exception as error:
        return is_out_of_memory(error), repr(error)
    return None


def refusals() -> Any:
    image, weight = torch.randn(1, 16, 1024, 1024), torch.randn(16, 16, 3, 3)
    # Code that runs for the first time is read in, and would count as resident.
    torch.nn.functional.conv2d(image[..., :128, :128], weight)
    before = soft_limit()
    with DataLimit(30 * MB) as limit:
        inside = soft_limit()
        errors = {
            "tensor": error_of(lambda: torch.ones(10 * MB)),
            "numpy": error_of(lambda: np.ones(10 * MB)),
            "bytes": error_of(lambda: bytearray(40 * MB)),
            "untouched": error_of(lambda: np.zeros(40 * MB, np.uint8)),
            "convolution": error_of(lambda: torch.nn.functional.conv2d(image, weight)),
        }
        smaller = torch.ones(6 * MB)
    restored = soft_limit()
    larger = torch.ones(20 * MB)
    return {
        "errors": errors,
        "limits": [before, inside, restored],
        "peak": limit.peak_bytes,
        "sums": [smaller.sum().item(), larger.sum().item()],
    }


def peaks() -> Any:
    with DataLimit(None) as measured:
        kept = torch.ones(12 * MB)
        freed = torch.ones(13 * MB)
        del freed
        at_work = measured.peak_bytes
    unlimited = soft_limit()
    # This does not pass what was held before, so it is sampled, and has to last until it has been.
    with DataLimit(300 * MB) as limited:
        touched = torch.ones(5 * MB)
        limited.check()
        del touched
        untouched = np.zeros(100 * MB, np.uint8)
    with DataLimit(300 * MB) as idle:
        pass
    return {
        "at work": at_work,
        "measured": measured.peak_bytes,
        "limited": limited.peak_bytes,
        "idle": idle.peak_bytes,
        "readings": [measured.reading, limited.reading],
        "at most": [measured.at_most_bytes, limited.at_most_bytes],
        "samples": [len(measured.samples), max(nbytes for _, nbytes in limited.samples)],
        "unlimited": unlimited == soft_limit(),
        "alive": [len(kept), len(untouched)],
    }


def marks() -> list[int]:
    """The process's peak as the user reads it, in bytes: ``ru_maxrss`` and ``VmHWM``."""
    with open("/proc/self/status") as lines:
        mark = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, mark * 1024]


def _highest(limit: DataLimit) -> int:
    """The largest sample until now, in bytes."""
    return max((nbytes for _, nbytes in limit.samples), default=0)


def after_a_large_block() -> Any:
    """Blocks in a process that has held more than they take."""
    large = torch.ones(100 * MB)
    del large
    before = marks()
    with DataLimit(300 * MB) as sampled:
        kept = torch.ones(10 * MB)
        spike = torch.ones(15 * MB)
        # The thread that samples is asked to see it, not this one, whenever a busy machine lets it.
        until = time.monotonic() + 30
        while time.monotonic() < until and _highest(sampled) < 90 * MB:
            time.sleep(0.01)
        del spike
    within = marks()
    with DataLimit(None) as exact:
        larger = torch.ones(150 * MB)
        del larger
    return {
        "marks": [before, within, marks()],
        "readings": [sampled.reading, exact.reading],
        "peaks": [sampled.peak_bytes, exact.peak_bytes],
        "at most": [sampled.at_most_bytes, exact.at_most_bytes],
        "threads": [thread.name for thread in threading.enumerate()],
        "alive": len(kept),
    }


def the_samplers_stack() -> Any:
    """Whether blocks can have most of a small budget: the stack of the thread that samples is not in it."""
    baseline = Baseline.now()
    errors = []
    for _ in range(20):
        with DataLimit(20 * MB, baseline=baseline):
            errors.append(error_of(lambda: torch.ones(4 * MB)))
    return errors


def shared_baseline() -> Any:
    before = soft_limit()
    baseline = Baseline.now()
    with DataLimit(100 * MB, baseline=baseline) as forward:
        checkpoint = torch.ones(15 * MB)
    with DataLimit(100 * MB, baseline=baseline) as backward:
        past_both = error_of(lambda: torch.ones(12 * MB))
        within = error_of(lambda: torch.ones(8 * MB))
    with DataLimit(100 * MB):
        own_baseline = error_of(lambda: torch.ones(20 * MB))
    after = soft_limit()
    return {
        "peaks": [forward.peak_bytes, backward.peak_bytes],
        "errors": [past_both is not None, within, own_baseline],
        "restored": before == after,
        "alive": len(checkpoint),
    }


def nested() -> Any:
    before = soft_limit()
    resource.setrlimit(resource.RLIMIT_DATA, (2**40, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with DataLimit(400 * MB) as outer:
        torch.ones(25 * MB)
        at_outer = soft_limit()
        try:
            with DataLimit(80 * MB) as inner:
                kept = torch.ones(10 * MB)
                inner.check()
                raise KeyError("stop")
        except KeyError:
            after_error = soft_limit()
        with DataLimit(4000 * MB):
            looser = soft_limit()
    return {
        "limits": [at_outer, after_error, looser],
        "own limit": soft_limit() == 2**40 != before,
        "peaks": [inner.peak_bytes, outer.peak_bytes],
        "alive": len(kept),
    }


def first_parallel_operator() -> Any:
    torch.set_num_threads(2)
    # Less than a thread's stack of 8 MiB, and more than the tensor and what the heap holds free here (1 MB).
    with DataLimit(6 * MB):
        return torch.empty(MB, dtype=torch.uint8).fill_(3)[-1].item()


def blocks(nbytes: int) -> list[bytearray]:
    """So many bytes in pieces that come from the heap."""
    return [bytearray(200_000) for _ in range(nbytes // 200_000)]


class Heap:
    """A heap that holds so many bytes free, below a block that keeps it from shrinking."""

    def __init__(self, nbytes: int) -> None:
        tamed = [allocator.set_mmap_threshold(), allocator.set_mmap_threshold()]
        below = blocks(nbytes)
        self._pin = bytearray(200_000)
        before = heap.free_heap_bytes()
        del below
        self.facts = {"tamed": tamed, "freed": heap.free_heap_bytes() - before}


def small_heap() -> Any:
    heap = Heap(10 * MB)
    with DataLimit(100 * MB) as limit:
        too_large = error_of(lambda: torch.ones(23 * MB))
        fits = error_of(lambda: torch.ones(20 * MB))
        limit.check()
    return {**heap.facts, "errors": [too_large, fits]}


def large_heap() -> Any:
    """One large hole, which is no part of a budget and is there again afterwards."""
    facts = (hole := Heap(100 * MB)).facts
    with DataLimit(60 * MB) as limit:
        filled = heap.free_heap_bytes()
        fits = error_of(lambda: torch.ones(13 * MB))
        from_heap = error_of(lambda: blocks(70 * MB))
        limit.check()
    del limit
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") or 0, -1))
    again = error_of(lambda: blocks(90 * MB))
    return {**facts, "filled": filled, "errors": [fits, from_heap, again], "alive": hole is not None}


def small_holes() -> Any:
    """Holes that are too small to be filled, 100 MB of them."""
    allocator.set_mmap_threshold()
    before = heap.free_heap_bytes()
    walls = [(bytearray(200_000), bytearray(5_000)) for _ in range(500)]
    walls = [(bytearray(), wall) for _, wall in walls]
    freed = heap.free_heap_bytes() - before
    with DataLimit(60 * MB) as limit:
        large = torch.ones(10 * MB)
        limit.check()
        within = limit.peak_bytes
        del large
        from_heap = blocks(80 * MB)
        checked = error_of(limit.check)
        # Last, since the first error of PyTorch's allocator reads code that describes it.
        too_large = error_of(lambda: torch.ones(15 * MB))
    return {
        "freed": freed,
        "errors": [checked, too_large],
        "within": within,
        "peak": limit.peak_bytes,
        "alive": len(from_heap) + len(walls),
    }


def overlapping() -> Any:
    """Two blocks on two threads: the first is left before the second."""
    resource.setrlimit(resource.RLIMIT_DATA, (2**40, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    limits = [soft_limit()]
    with ThreadPoolExecutor(2) as threads:
        first, second = DataLimit(50 * MB), DataLimit(200 * MB)
        for pool_action in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
            threads.submit(pool_action).result()
            limits.append(soft_limit())
        refused = threads.submit(error_of, lambda: torch.ones(60 * MB)).result()
        fits = threads.submit(error_of, lambda: torch.ones(30 * MB)).result()
        threads.submit(second.__exit__, None, None, None).result()
    return {
        "limits": [*limits, soft_limit()],
        "errors": [refused, fits],
        "shared": [first.is_shared, second.is_shared],
    }


def interleaved() -> Any:
    """Blocks on several threads, entered and left in 200 random orders."""
    own = 2**40
    resource.setrlimit(resource.RLIMIT_DATA, (own, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    baseline = without_libraries()
    wrong = []
    chance = random.Random(0)
    with ThreadPoolExecutor(3) as threads:
        # All of them now, since a limit may refuse a thread.
        list(threads.map(time.sleep, [0.05] * 3))
        for turn in range(200):
            alone: dict[DataLimit, int] = {}
            pending = [DataLimit(chance.randrange(200, 900) * MB, baseline=baseline) for _ in range(4)]
            while pending or alone:
                if pending and (not alone or chance.random() < 0.5):
                    limit = pending.pop()
                    threads.submit(limit.__enter__).result()
                    alone[limit] = limit._ceiling(limit._budget or 0)
                else:
                    limit = chance.choice(list(alone))
                    del alone[limit]
                    threads.submit(limit.__exit__, None, None, None).result()
                if soft_limit() != min([own, *alone.values()]):
                    wrong.append([turn, soft_limit(), list(alone.values())])
            # Without an order between them.
            many = [DataLimit(chance.randrange(200, 900) * MB, baseline=baseline) for _ in range(6)]
            list(threads.map(lambda limit: limit.__exit__(*[None] * 3), map(DataLimit.__enter__, many)))
            if soft_limit() != own:
                wrong.append([turn, soft_limit(), "at the end"])
    return wrong


def children() -> Any:
    """The limits of processes that are started inside of a block, forked ones and programs."""
    resource.setrlimit(resource.RLIMIT_DATA, (2**40, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    before = soft_limit()
    programs, back = {}, []
    with ThreadPoolExecutor(1) as thread, DataLimit(200 * MB):
        forked = in_a_child(lambda: [soft_limit(), error_of(nested_in_a_child)])
        inside = soft_limit()
        for name, start in STARTS.items():
            for who, run in {
                "same": lambda start: start(),
                "another": lambda s: thread.submit(s).result(),
            }.items():
                programs[f"{name}, {who} thread"] = run(start)
                back.append(is_soon(lambda: soft_limit() == inside))
        failed = error_of(lambda: subprocess.run(["/no/such/program"], check=True))
        back.append(is_soon(lambda: soft_limit() == inside))
    return {
        "before": before,
        "forked": forked,
        "inside": inside,
        "programs": programs,
        "failed": failed,
        "back": back,
        "after": soft_limit(),
    }


def is_soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within ten seconds, with a sampler that looks every ten milliseconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def by_subprocess() -> int:
    return int(subprocess.run(SHOW, capture_output=True, check=True).stdout)


def by_system() -> int:
    with tempfile.NamedTemporaryFile("r") as file:
        os.system(f"{shlex.join(SHOW)} > {shlex.quote(file.name)}")
        return int(file.read())


def by_posix_spawn() -> int:
    with tempfile.NamedTemporaryFile("r") as file:
        actions = [(os.POSIX_SPAWN_OPEN, 1, file.name, os.O_WRONLY, 0)]
        os.waitpid(os.posix_spawn(SHOW[0], SHOW, os.environ, file_actions=actions), 0)
        return int(file.read())


SHOW = [sys.executable, "-c", "import resource as r; print(r.getrlimit(r.RLIMIT_DATA)[0])"]
STARTS = {"subprocess": by_subprocess, "system": by_system, "posix_spawn": by_posix_spawn}


def nested_in_a_child() -> None:
    # As in a DataLoader's workers: OpenMP's threads are not there after a fork, and would be waited for.
    torch.set_num_threads(1)
    before = soft_limit()
    with DataLimit(100 * MB) as limit:
        assert soft_limit() < before
    assert soft_limit() == before
    assert not limit.is_shared


def code(nbytes: int) -> mmap.mmap:
    access = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    return mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, access)


def without_libraries() -> Baseline:
    """A baseline that does not know of pages of files, of which any line may bring some."""
    return replace(Baseline.now(), file_bytes=None)


def library_code() -> Any:
    """The limit before and after pages of a file are read, 10 MB and then 40 MB of them."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(40 * MB))
        file.flush()
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
            DataLimit(60 * MB) as limit,
        ):
            limits = [soft_limit()]
            for nbytes in (10 * MB, 40 * MB):
                for place in range(0, nbytes, mmap.PAGESIZE):
                    library[place]
                limit.check()
                limits.append(soft_limit())
    return limits


def compiled_code() -> Any:
    with DataLimit(30 * MB, baseline=without_libraries()) as limit:
        limits = [soft_limit()]
        with code(25 * MB) as compiled:
            for _ in range(5):
                compiled.write(bytes(MB))
            errors = [error_of(lambda: torch.ones(5 * MB))]
            limit.check()
            limits.append(soft_limit())
            errors += [error_of(lambda: torch.ones(5 * MB)), error_of(lambda: torch.ones(10 * MB))]
        limit.check()
        limits.append(soft_limit())
    return {"errors": errors, "limits": limits}


def code_that_is_not_looked_for() -> Any:
    with DataLimit(30 * MB) as limit:
        limits = [soft_limit()]
        with code(10 * MB):
            for compiled in (False, True):
                limit.check(compiled=compiled)
                limits.append(soft_limit())
    return limits


def in_a_child(case: Callable[[], Any]) -> Any:
    """What ``case`` returns in a forked process; None if that dies."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, json.dumps(case()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


CASES = (
    refusals,
    peaks,
    after_a_large_block,
    the_samplers_stack,
    shared_baseline,
    nested,
    first_parallel_operator,
    small_heap,
    large_heap,
    small_holes,
    overlapping,
    interleaved,
    children,
    compiled_code,
    code_that_is_not_looked_for,
    library_code,
)

if __name__ == "__main__":
    print(json.dumps({case.__name__: in_a_child(case) for case in CASES}))
