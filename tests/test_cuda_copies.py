"""How CUDA is asked for pinned memory and copies, with a stand-in for it, and who has that memory."""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from streamcnn.stores import cuda_copies, pinned
from streamcnn.stores.pinned import PinnedBlock


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda place, nbytes, flags: calls.append("register") or 0,
        cudaHostUnregister=lambda place: calls.append("unregister") or 0,
    )
    stand_in = SimpleNamespace(
        cudart=lambda: runtime,
        device=lambda device: nullcontext(calls.append(f"on {device}")),
        runtime=runtime,
    )
    monkeypatch.setattr(cuda_copies, "cuda", stand_in)
    return calls


def engine() -> cuda_copies.CudaCopies:
    engine = object.__new__(cuda_copies.CudaCopies)
    engine.device = torch.device("cpu")
    return engine


def test_it_is_done_on_the_device_that_computes_and_undone(calls: list[str]) -> None:
    undo = engine().pin(torch.zeros(8, dtype=torch.uint8))
    assert undo is not None
    undo()
    assert calls == ["on cpu", "register", "on cpu", "unregister"]


def test_an_interrupt_that_comes_when_it_is_done_undoes_it(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(place: int, nbytes: int, flags: int) -> int:
        calls.append("register")
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda_copies.cuda.runtime, "cudaHostRegister", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine().pin(torch.zeros(8, dtype=torch.uint8))
    assert calls == ["on cpu", "register", "on cpu", "unregister"]


def test_the_error_of_a_refusal_is_not_left_for_the_next_kernel(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(*args: Any, **kwargs: Any) -> None:
        calls.append("launched")
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(cuda_copies.cuda.runtime, "cudaHostRegister", lambda *args: 2)
    monkeypatch.setattr(torch, "ones", launched)
    with pytest.warns(RuntimeWarning, match="cannot be pinned"):
        assert engine().pin(torch.zeros(8, dtype=torch.uint8)) is None
    assert calls == ["on cpu", "launched"]


def test_a_forked_child_is_given_no_pages_of_pinned_memory() -> None:
    block = PinnedBlock(2**26, lambda memory: lambda: None)
    block.memory.fill_(7)
    child = os.fork()
    if child == 0:
        os._exit(int(block.memory[2**20]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert block.memory.all()


def test_memory_is_had_from_a_kernel_that_knows_no_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapping(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(pinned.mmap, "mmap", Mapping)
    block = PinnedBlock(pinned.HUGE_PAGE_BYTES, lambda memory: lambda: None)
    assert block.nbytes == pinned.HUGE_PAGE_BYTES


def test_an_interrupt_leaves_the_stream_that_computes_current(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    computing, copying = (SimpleNamespace(device="cuda:0", wait_event=waited.append) for _ in range(2))
    current = [computing]

    class Chosen:
        def __init__(self, stream: SimpleNamespace) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.stream

        def __exit__(self, *args: object) -> None:
            if self.stream is copying:
                raise KeyboardInterrupt
            current[0] = self.before

    stand_in = SimpleNamespace(stream=Chosen, current_stream=lambda device: current[0])
    monkeypatch.setattr(cuda_copies, "cuda", stand_in)
    target, source = torch.zeros(3), torch.ones(3)
    with pytest.raises(KeyboardInterrupt):
        cuda_copies._copied(copying, [(target, source)], "earlier work")  # type: ignore[arg-type]
    assert torch.equal(target, source)
    assert waited == ["earlier work"]
    assert current == [computing]
