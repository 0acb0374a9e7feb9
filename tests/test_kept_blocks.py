"""Kept blocks by themselves: what they are made of, count and refuse, and who is in which pass."""

from __future__ import annotations

import gc
import io
import itertools
import mmap
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamcnn.ceiling import kept_blocks
from streamcnn.ceiling.baseline import Baseline
from streamcnn.ceiling.cpu import DataLimit
from streamcnn.ceiling.kept_blocks import LEAST_BYTES, KeptBlocks, extents, free_block_bytes, give_back
from streamcnn.ceiling.process import status_bytes
from streamcnn.ceiling.refusals import is_out_of_memory

MIB = 2**20
_, FREE, USED = range(3)

pytestmark = pytest.mark.skipif(
    not kept_blocks.kept_blocks_available(), reason="there is no compiler, or blocks are not to be kept"
)


@pytest.fixture(autouse=True)
def _nothing_left() -> None:
    # An error that was caught holds the tensors of the frames that it went through.
    gc.collect()
    give_back()


def block(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def pages(nbytes: int) -> int:
    """Bytes of whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def is_kept(tensor: Tensor) -> bool:
    """Whether its memory is a used extent, as large as the tensor but for a page."""
    sizes = {start: nbytes for start, nbytes, state in extents() if state == USED}
    return sizes.get(tensor.data_ptr()) == pages(tensor.nbytes)


def assert_tiled() -> None:
    """Extents follow each other without gaps, and neighbours with the same kind of memory are one."""
    found = extents()
    for (start, nbytes, state), (after, _, next_state) in itertools.pairwise(found):
        assert start + nbytes == after
        assert state == USED or state != next_state
    assert all(start % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0 < nbytes for start, nbytes, _ in found)
    assert free_block_bytes() == sum(nbytes for _, nbytes, state in found if state == FREE)


def emptied(tensor: Tensor) -> None:
    """Free a tensor's memory on this thread."""
    tensor.untyped_storage().resize_(0)


class Entered:
    """A thread that is in a pass, or in none."""

    def __init__(self, blocks: KeptBlocks | None) -> None:
        self._pool = ThreadPoolExecutor(1)
        if blocks is not None:
            self(blocks.enter)

    def __call__(self, action: Callable[[], Any]) -> Any:
        return self._pool.submit(action).result()


sizes = st.integers(LEAST_BYTES, 40 * LEAST_BYTES)
steps = st.lists(st.tuples(st.sampled_from(["take", "take", "free", "give back"]), sizes), max_size=60)


@settings(max_examples=150)
@given(steps, st.integers(0, 200), st.integers(1, 200))
def test_any_history_keeps_counts_caps_and_contents(
    steps: list[tuple[str, int]], cap: int, keep: int
) -> None:
    cap, keep = cap * LEAST_BYTES, keep * LEAST_BYTES
    give_back()
    before = extents()
    blocks, alive = KeptBlocks(cap, keep), dict[int, Tensor]()
    blocks.enter()
    most = 0
    try:
        for number, (action, nbytes) in enumerate(steps):
            in_use = sum(pages(tensor.nbytes) for tensor in alive.values())
            if action == "take" and in_use + pages(nbytes) > cap:
                with pytest.raises(RuntimeError, match="can't allocate memory"):
                    block(nbytes)
            elif action == "take":
                alive[number] = block(nbytes).fill_(number)
                assert is_kept(alive[number])
            elif action == "free" and alive:
                del alive[sorted(alive)[nbytes % len(alive)]]
            elif action == "give back":
                give_back(but=nbytes)
                assert free_block_bytes() <= nbytes
            in_use = sum(pages(tensor.nbytes) for tensor in alive.values())
            most = max(most, in_use)
            assert (blocks._counts()[0], blocks._counts()[1]) == (in_use, most)
            assert most <= blocks.peak <= max(most, keep)
            assert in_use + free_block_bytes() <= max(in_use, keep)
            assert_tiled()
            # NumPy's comparison takes no block.
            assert all((tensor.numpy() == number).all() for number, tensor in alive.items())
    finally:
        blocks.leave()
    assert len({tensor.data_ptr() for tensor in alive.values()}) == len(alive)
    alive.clear()
    give_back()
    # But for what was used before: tensors of other tests, alive in the same process.
    assert extents() == before
    assert blocks._counts()[0] == 0


def test_freed_blocks_are_handed_out_again_and_their_pages_are_there() -> None:
    blocks = KeptBlocks()
    blocks.enter()
    tensor = block(MIB).fill_(3)
    place = tensor.data_ptr()
    del tensor
    assert free_block_bytes() == kept_blocks.resident_free_block_bytes() == MIB
    again = block(MIB)
    blocks.leave()
    assert again.data_ptr() == place
    assert (again == 3).all()


def test_the_kernel_counts_what_is_used_and_free_and_no_more() -> None:
    blocks = KeptBlocks()
    blocks.enter()
    before = status_bytes("VmData")
    tensors = [block(16 * MIB) for _ in range(4)]
    held = status_bytes("VmData")
    del tensors[1:]
    kept = status_bytes("VmData")
    give_back(but=MIB)
    returned = status_bytes("VmData")
    blocks.leave()
    assert None not in (before, held, kept, returned)
    assert held - before == kept - before == 64 * MIB  # type: ignore[operator]
    assert returned - before == 17 * MIB  # type: ignore[operator]


def test_holes_cost_no_refusal() -> None:
    blocks = KeptBlocks(cap=32 * MIB, keep=32 * MIB)
    blocks.enter()
    small = [block(MIB) for _ in range(32)]
    del small[::2]
    large = block(16 * MIB)
    blocks.leave()
    assert is_kept(large)
    assert (blocks._counts()[0], blocks.peak) == (32 * MIB, 32 * MIB)


def test_what_goes_past_the_cap_is_pytorchs_own_error() -> None:
    blocks = KeptBlocks(cap=4 * MIB)
    blocks.enter()
    with pytest.raises(
        RuntimeError, match=r"DefaultCPUAllocator: can't allocate memory: .* 5242880"
    ) as caught:
        torch.zeros(5 * MIB, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    # As much as there is, and small blocks, which are not counted.
    alive = [block(4 * MIB), block(1000)]
    blocks.leave()
    assert blocks._counts()[0] == 4 * MIB
    assert [is_kept(tensor) for tensor in alive] == [True, False]


def test_in_no_pass_tensors_are_pytorchs_own() -> None:
    before, blocks, after = block(MIB), KeptBlocks(cap=2 * MIB), None
    blocks.enter()
    within = block(MIB)
    blocks.leave()
    blocks.enter()  # It is over for good.
    after = block(3 * MIB)
    assert [is_kept(tensor) for tensor in (before, within, after)] == [False, True, False]
    # A storage that grows takes memory as a new one does.
    within.resize_(4 * MIB)
    assert not is_kept(within)
    assert blocks._counts()[0] == 0


def test_a_pass_within_another_counts_for_both() -> None:
    outer, inner = KeptBlocks(cap=10 * MIB), KeptBlocks(cap=20 * MIB)
    outer.enter()
    first = block(2 * MIB)
    inner.enter()
    second = block(3 * MIB)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        block(6 * MIB)
    inner.leave()
    third = block(4 * MIB)
    outer.leave()
    assert (outer._counts()[0], inner._counts()[0]) == (9 * MIB, 3 * MIB)
    del first, second, third
    assert (outer._counts()[0], inner._counts()[0], outer._counts()[1]) == (0, 0, 9 * MIB)


def test_an_outer_pass_may_end_first() -> None:
    outer, inner = KeptBlocks(), KeptBlocks()
    outer.enter()
    inner.enter()
    outer.leave()
    within = block(MIB)
    inner.leave()
    without = block(MIB)
    assert (is_kept(within), is_kept(without)) == (True, False)


def test_two_threads_have_a_cap_each_and_may_free_each_others_blocks() -> None:
    chance = random.Random(0)
    passes = [KeptBlocks(cap=8 * MIB, keep=16 * MIB), KeptBlocks(cap=24 * MIB, keep=32 * MIB)]
    threads = [Entered(each) for each in passes]
    bystander = Entered(None)
    alive: list[list[Tensor]] = [[], []]
    for _ in range(200):
        who, nbytes = chance.randrange(2), chance.randrange(LEAST_BYTES, 4 * MIB)
        in_use, cap = sum(pages(tensor.nbytes) for tensor in alive[who]), (8 * MIB, 24 * MIB)[who]
        if chance.random() < 0.4 and alive[who]:
            tensor = alive[who].pop(chance.randrange(len(alive[who])))
            chance.choice([*threads, bystander])(lambda tensor=tensor: emptied(tensor))  # type: ignore[misc]
        elif in_use + pages(nbytes) <= cap:
            found = threads[who](lambda nbytes=nbytes: block(nbytes).fill_(1))  # type: ignore[misc]
            alive[who].append(found)
        else:
            with pytest.raises(RuntimeError, match=f"of the {cap} that"):
                threads[who](lambda nbytes=nbytes: block(nbytes))  # type: ignore[misc]
        assert [each._counts()[0] for each in passes] == [
            sum(pages(tensor.nbytes) for tensor in each) for each in alive
        ]
        assert_tiled()
    for each in passes:
        each.leave()


def test_blocks_are_freed_by_whoever_holds_them_last() -> None:
    before = extents()
    blocks, failed = KeptBlocks(), list[BaseException]()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            if seed % 2:
                blocks_of = KeptBlocks(cap=64 * MIB, keep=8 * MIB)
                blocks_of.enter()
            for _ in range(300):
                mine = block(chance.randrange(LEAST_BYTES, MIB)).fill_(seed)
                with lock:
                    shared.append(mine)
                    given = shared.pop(chance.randrange(len(shared)))
                del given, mine
            if seed % 2:
                blocks_of.leave()
        except BaseException as error:
            failed.append(error)

    lock, shared = threading.Lock(), [block(1) for _ in range(8)]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    shared.clear()
    assert_tiled()
    give_back()
    # But for what was used before: tensors of other tests, alive in the same process.
    assert extents() == before
    assert blocks._counts()[0] == 0


def test_tensors_are_saved_and_loaded() -> None:
    blocks = KeptBlocks()
    blocks.enter()
    tensor, file = torch.arange(MIB), io.BytesIO()
    torch.save({"tensor": tensor, "part": tensor[7:9]}, file)
    file.seek(0)
    loaded = torch.load(file)
    blocks.leave()
    assert is_kept(tensor)
    assert torch.equal(loaded["tensor"], tensor)
    assert loaded["part"].tolist() == [7, 8]
    assert torch.equal(tensor.clone().share_memory_(), tensor)


def test_an_heir_counts_the_blocks_of_an_earlier_part() -> None:
    first = KeptBlocks(6 * MIB, 6 * MIB)
    first.enter()
    left, freed = block(2 * MIB), block(MIB)
    first.leave()
    second = KeptBlocks(4 * MIB, 5 * MIB)
    second.inherit(first)
    second.enter()
    try:
        assert (first._counts()[0], second._counts()[0], second._counts()[1]) == (0, 3 * MIB, 3 * MIB)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            block(2 * MIB)
        del freed
        assert (second._counts()[0], free_block_bytes()) == (2 * MIB, MIB)
        del left
        assert (second._counts()[0], free_block_bytes()) == (0, 3 * MIB)
        assert_tiled()
    finally:
        second.leave()


@pytest.mark.parametrize("is_within", [True, False], ids=["both within", "the heir alone"])
def test_an_heir_within_another_pass_counts_for_both(is_within: bool) -> None:
    outer, first, second = KeptBlocks(cap=8 * MIB), KeptBlocks(), KeptBlocks()
    if is_within:
        outer.enter()
    first.enter()
    left = block(3 * MIB)
    first.leave()
    if not is_within:
        outer.enter()
    try:
        second.inherit(first)
        second.enter()
        assert [each._counts()[0] for each in (outer, first, second)] == [3 * MIB, 0, 3 * MIB]
        del left
        assert [each._counts()[0] for each in (outer, first, second)] == [0, 0, 0]
        second.leave()
        assert is_kept(block(8 * MIB))
    finally:
        second.leave()
        outer.leave()


def test_what_is_kept_can_be_changed_while_the_pass_runs() -> None:
    blocks = KeptBlocks(8 * MIB, 8 * MIB)
    blocks.enter()
    try:
        held, freed = block(2 * MIB), block(4 * MIB)
        del freed
        assert free_block_bytes() == 4 * MIB
        blocks.keep(3 * MIB)
        assert free_block_bytes() == MIB
        blocks.keep(8 * MIB)
        del held
        assert free_block_bytes() == 3 * MIB
    finally:
        blocks.leave()


def test_backward_counts_what_forward_has_left() -> None:
    baseline = Baseline.now()
    with DataLimit(96 * MIB, baseline=baseline, kept=32 * MIB):
        left = block(40 * MIB)
    with DataLimit(96 * MIB, baseline=baseline, kept=48 * MIB) as limit:
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            block(60 * MIB)
        freed = block(16 * MIB)
        del freed
        # Of 48 MiB, 40 are in use.
        assert free_block_bytes() == 8 * MIB
        limit.keep_blocks(41 * MIB)
        assert free_block_bytes() == MIB
    del left
