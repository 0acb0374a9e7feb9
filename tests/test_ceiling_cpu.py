"""The ceiling on host memory: what happens under it is in ``ceiling_cases.py``."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from streamcnn.ceiling import allocator, data_segment, heap, process
from streamcnn.ceiling.cpu import DataLimit
from streamcnn.ceiling.refusals import is_out_of_memory
from streamcnn.errors import StreamError
from streamcnn.planning.backends.cpu import RUNTIME_BYTES

MB = 10**6

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the ceiling needs Linux")


@pytest.fixture(scope="module")
def results() -> Any:
    """What each of ``ceiling_cases.py`` returned."""
    folder = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, folder / "ceiling_cases.py"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(folder.parent)},
    )
    assert run.returncode == 0, run.stderr
    print(run.stderr)
    return json.loads(run.stdout)


@linux_only
def test_what_goes_past_the_budget_is_refused_and_the_process_lives_on(results: Any) -> None:
    result = results["refusals"]
    for what, error in result["errors"].items():
        assert error is not None, f"{what} was not refused"
        assert error[0], f"{what}: not known as out of memory: {error}"
    before, inside, restored = result["limits"]
    assert before == restored != inside
    # Up to 10 MB are library code: that of raising errors has not run before.
    assert 0.9 * 24 * MB <= result["peak"] <= 30 * MB + 10 * MB
    assert result["sums"] == [6 * MB, 20 * MB]


@linux_only
def test_the_peak_is_what_was_touched(results: Any) -> None:
    result = results["peaks"]
    assert 0.9 * 100 * MB <= result["at work"] <= result["measured"] <= 1.3 * 100 * MB
    # calloc'd pages that nobody wrote to count for the limit, not for the peak.
    assert 0.9 * 20 * MB <= result["limited"] <= 1.3 * 20 * MB
    assert result["idle"] < 5 * MB
    assert result["readings"] == ["VmHWM", "VmRSS, sampled"]
    assert result["at most"][0] == result["measured"]
    # 100 MB before, of which 48 are there still.
    assert 0.9 * 52 * MB <= result["at most"][1] <= 1.3 * 52 * MB
    assert result["samples"] == [0, result["limited"]]
    assert result["unlimited"]


@linux_only
def test_the_processs_own_peak_is_left_to_the_user(results: Any) -> None:
    result = results["after_a_large_block"]
    before, within, after = result["marks"]
    assert within == before
    # Larger than ever before, which the user is to see as well.
    assert all(b - a > 0.9 * 200 * MB for a, b in zip(before, after, strict=True))
    sampled, exact = result["peaks"]
    assert result["readings"] == ["VmRSS, sampled", "VmHWM"]
    assert 0.9 * 100 * MB <= sampled <= 1.1 * 100 * MB
    assert result["at most"][0] >= 0.9 * 400 * MB
    assert 0.9 * 600 * MB <= exact == result["at most"][1] <= 1.1 * 600 * MB
    assert result["threads"] == ["MainThread"]


@linux_only
def test_the_thread_that_samples_takes_nothing_of_the_budget(results: Any) -> None:
    assert results["the_samplers_stack"] == [None] * 20


@linux_only
def test_what_forward_keeps_counts_against_backward(results: Any) -> None:
    result = results["shared_baseline"]
    assert result["errors"] == [True, None, None]
    forward, backward = result["peaks"]
    assert 0.9 * 60 * MB <= forward <= 1.3 * 60 * MB
    assert 0.9 * 92 * MB <= backward <= 100 * MB
    assert result["restored"]


@linux_only
def test_nested_blocks_keep_the_lowest_ceiling_and_their_own_peaks(results: Any) -> None:
    result = results["nested"]
    assert len(set(result["limits"])) == 1
    assert result["own limit"]
    inner, outer = result["peaks"]
    assert 0.9 * 40 * MB <= inner <= 1.3 * 40 * MB
    assert 0.9 * 100 * MB <= outer <= 1.3 * 100 * MB


@linux_only
def test_threads_are_there_before_the_limit(results: Any) -> None:
    # OpenMP ends the process where it gets no stack for a thread.
    assert results["first_parallel_operator"] == 3


@linux_only
def test_a_little_that_the_heap_holds_free_is_part_of_the_budget(results: Any) -> None:
    result = results["small_heap"]
    assert result["tamed"] == [True, True]
    assert 9 * MB <= result["freed"] <= 12 * MB
    # Of 100 MB, 10 are in the heap already: 92 more are refused, and 80 are not.
    too_large, fits = result["errors"]
    assert too_large is not None
    assert fits is None


@linux_only
def test_large_holes_of_the_heap_are_no_part_of_the_budget_and_come_back(results: Any) -> None:
    result = results["large_heap"]
    assert 95 * MB <= result["freed"] <= 105 * MB
    assert result["filled"] < 10 * MB
    # 52 of 60 MB from the kernel; 70 MB of small blocks would have fitted into the hole.
    fits, from_heap, again = result["errors"]
    assert fits is None
    assert from_heap[0]
    # Where the kernel gives nothing any more, the hole is there.
    assert again is None


@linux_only
def test_where_the_heap_holds_much_in_small_holes_the_peak_is_held_against_the_budget(results: Any) -> None:
    result = results["small_holes"]
    assert 95 * MB <= result["freed"] <= 105 * MB
    checked, too_large = result["errors"]
    # Of 60 MB, 17 are taken off: 40 can be had for a large block, and not 60.
    assert 38 * MB <= result["within"] <= 55 * MB
    assert too_large is not None
    # 80 MB from the heap were not refused, and are noticed.
    assert result["peak"] >= 75 * MB
    assert "BudgetExceeded" in checked[1]
    assert "that the heap held free" in checked[1]


@linux_only
def test_blocks_that_overlap_in_threads_keep_the_lowest_ceiling_and_the_users_limit(results: Any) -> None:
    result = results["overlapping"]
    before, first, both, second, after = result["limits"]
    assert first == both < second < before == after
    refused, fits = result["errors"]
    assert refused[0]
    assert fits is None
    assert result["shared"] == [True, True]


@linux_only
def test_in_any_order_the_lowest_ceiling_holds_and_the_users_limit_comes_back(results: Any) -> None:
    assert results["interleaved"] == []


@linux_only
def test_children_have_the_users_limit_and_forked_ones_ceilings_of_their_own(results: Any) -> None:
    result = results["children"]
    assert result["inside"] < result["before"] == result["after"]
    assert result["forked"] == [result["before"], None]
    assert result["programs"] == {
        f"{name}, {thread} thread": result["before"]
        for name in ("subprocess", "system", "posix_spawn")
        for thread in ("same", "another")
    }


@linux_only
def test_the_ceiling_is_back_when_a_program_has_been_started_or_has_not(results: Any) -> None:
    result = results["children"]
    assert "FileNotFoundError" in result["failed"][1]
    assert result["back"] == [True] * 7


@linux_only
def test_code_compiled_since_is_left_out_when_the_limit_is_checked(results: Any) -> None:
    result = results["compiled_code"]
    before_checking, fits, too_large = result["errors"]
    assert before_checking is not None
    assert fits is None
    assert too_large is not None
    first, checked, last = result["limits"]
    # But for the part of it that is touched, in huge pages perhaps.
    assert 20 * MB - 2**21 <= checked - first <= 20 * MB + mmap.PAGESIZE
    assert last == first


@linux_only
def test_library_code_that_has_run_is_taken_off_the_limit(results: Any) -> None:
    first, some, many = results["library_code"]
    assert 10 * MB <= first - some <= 14 * MB
    # No more than plans reserve for it: other files may be mapped too.
    assert first - many == pytest.approx(RUNTIME_BYTES, abs=2**16)


@linux_only
def test_code_is_looked_for_where_there_may_be_some(results: Any) -> None:
    first, without, found = results["code_that_is_not_looked_for"]
    assert without == first
    assert found > first + 9 * MB


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("can't start new thread"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
    ids=repr,
)
def test_out_of_memory_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive descriptor for the convolution forward propagation"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("std::bad_alloc"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_no_proc_means_unknown_and_no_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process, "STATUS", tmp_path / "missing")
    with DataLimit(None) as limit:
        np.ones(MB)
    assert (limit.peak_bytes, limit.reading) == (None, "unknown")
    with pytest.raises(StreamError, match=r"budget= cannot be enforced .* pass budget=None"), DataLimit(MB):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "streamcnn-sampler"]


@linux_only
def test_a_kernel_that_ignores_the_limit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(data_segment, "_is_refused", lambda nbytes: False)
    with pytest.raises(StreamError, match="cannot be enforced"), DataLimit(1000 * MB):
        pass
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "streamcnn-sampler"]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "libc", lambda: None)
    monkeypatch.setattr(heap, "libc", lambda: None)
    assert allocator.set_mmap_threshold() is False
    assert heap.HoleFiller().nbytes == 0
    assert heap.free_heap_bytes() == 0
    allocator.trim_heap()


def test_without_memory_for_its_description_the_heap_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    library = MagicMock()
    library.open_memstream.return_value = None
    monkeypatch.setattr(heap, "libc", lambda: library)
    assert heap.free_heap_bytes() == 0
    assert heap.HoleFiller().nbytes == 0
    # That ends the process where there is no stream to write to.
    library.malloc_info.assert_not_called()


def test_a_block_is_over_though_its_measurement_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = DataLimit(None)
    monkeypatch.setattr(limit._gauge, "close", MagicMock(side_effect=OSError("too many open files")))
    with pytest.raises(OSError, match="too many"), limit:
        pass
    monkeypatch.undo()
    with DataLimit(None) as later:
        assert not later.is_shared
    limit.close()
