"""Projected bytes, each sum spelled out with a comment per term."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import traced
from torch import nn

from streamcnn.graph.program import Program, differentiated
from streamcnn.plan.reading import READING, BatchCost, ReadingCost
from streamcnn.plan.storage import MemoryTerm, StorePlan, Tier
from streamcnn.plan.stored_bytes import StoredBytes
from streamcnn.planning.backends import CpuBackend, Fragmentation
from streamcnn.planning.backends.cpu import CACHED_KERNELS
from streamcnn.planning.global_bytes import GlobalBytes
from streamcnn.planning.memory_model import PeakPoint, peak_points
from streamcnn.planning.resident_bytes import ResidentBytes
from streamcnn.planning.staging import Staging, divide
from streamcnn.planning.step_bytes import steps
from streamcnn.planning.tiling import Outline, TiledStage, tile_stage

SHAPE = (2, 3, 40, 60)
BACKEND = CpuBackend(kernel_bytes=1000, code_bytes=10**6, matrix_bytes=10**7)
ROW = 4 * 2
"""Bytes of one position of one channel: float32, two images."""


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
    )


def tiled_stages(parts: tuple[int, int]) -> tuple[Program, Staging, list[TiledStage]]:
    program = traced(make_net(), SHAPE)[0]
    staging = divide(program)
    return (
        program,
        staging,
        [tiled for stage in staging.stages for tiled in tile_stage(Outline.of(program, stage), parts)],
    )


def terms_of(step: object) -> dict[str, int]:
    return {term.name: term.nbytes for term in step.terms}  # type: ignore[attr-defined]


def test_a_forward_step() -> None:
    _, _, (first, _) = tiled_stages((2, 3))
    step, _ = steps(first, BACKEND, backward=True)
    region = ROW * 3 * (20 + 1) * (20 + 2)  # 3 channels, one row of halo at the inner edge, two columns
    own = ROW * 8 * 20 * 20  # 8 channels of the convolution's result
    assert terms_of(step) == {
        # The image is read and converted.
        "input regions": 2 * region,
        # The result; the convolution itself needs less: its operand with padding, copies of both, weights.
        "live activations": own,
        # Copies of it while its statistics are worked out.
        "operator workspace": 2 * own,
        "parameters that autocast casts": 0,
        "address space of compiled code": BACKEND.code_bytes,
        "buffers of matrix products": 0,
    }
    assert 2 * own > 2 * region + own + 4 * 8 * 3 * 9
    assert step.operator == "conv2d"
    # All blocks are small, so all of them may be kept; code is not in blocks.
    assert step.reusable == step.nbytes - BACKEND.code_bytes


def test_parameters_that_autocast_casts_are_counted_once_each() -> None:
    with torch.autocast("cpu"):
        _, _, (first, second) = tiled_stages((2, 3))
    found = [terms_of(steps(tiled, BACKEND, backward=False)[0]) for tiled in (first, second)]
    assert [terms["parameters that autocast casts"] for terms in found] == [2 * 8 * 3 * 9, 2 * 4 * 8]


def test_a_backward_step_of_a_stored_convolution() -> None:
    _, _, (first, _) = tiled_stages((2, 3))
    _, step = steps(first, BACKEND, backward=True)
    region = ROW * 3 * 21 * 22
    own = ROW * 8 * 20 * 20
    weights = 4 * 8 * 3 * 9
    assert step is not None
    assert terms_of(step) == {
        # The image's region and its gradient, each read and converted.
        "input regions and their gradients": 2 * 2 * region,
        # The result is stored, so it is not computed again; the padded operand is.
        "autograd graph of a tile": region,
        # The sum of what arrives from the gradient map and the statistics.
        "arriving gradients": own,
        # Gradients of operand and result.
        "gradients of activations": own + region,
        "operator workspace": own + region + weights,
        # The gradient, and its copies in the layouts that convolutions work in.
        "a tile's parameter gradients": 3 * weights,
        # Of the value, and of the gradients of operand and weights.
        "address space of compiled code": 3 * BACKEND.code_bytes,
        "buffers of matrix products": 0,
    }


class ChannelsMixed(nn.Module):
    """Two linear layers over the channels of every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.up(x.permute(0, 2, 3, 1)).relu())
        return y.permute(0, 3, 1, 2).mean((2, 3))


@pytest.mark.parametrize("pixel", [1, 10**4])
def test_what_is_read_of_an_image_leaves_room_at_any_moment(pixel: int) -> None:
    """Blocks are not kept in the memory that reading takes, be the step's largest moment then or later."""
    _, _, stages = tiled_stages((2, 3))
    cost = BatchCost((ReadingCost(SHAPE[2:], pixel=pixel),))
    for step in steps(stages[0], BACKEND, cost, backward=True):
        assert step is not None
        assert (READING in terms_of(step)) == (pixel > 1)
        assert step.reading == pixel * 21 * 22
        point = PeakPoint("a phase", ("forward", 1), "conv2d", step.terms, step.reading)
        code = terms_of(step)["address space of compiled code"]
        assert point.beside_tensors({READING, "address space of compiled code"}) == code + step.reading
    for step in steps(stages[1], BACKEND, cost, backward=True):
        assert step is not None
        assert step.reading == 0


def test_matrix_products_take_buffers_on_every_thread() -> None:
    program = traced(ChannelsMixed(), SHAPE)[0]
    (stage,) = divide(program).stages
    (tiled,) = tile_stage(Outline.of(program, stage), (2, 3))
    forward, backward = steps(tiled, BACKEND, backward=True)
    assert backward is not None
    assert terms_of(forward)["buffers of matrix products"] == 2 * BACKEND.matrix_bytes
    # The gradients are products too, and find buffers there.
    assert terms_of(backward)["buffers of matrix products"] == 2 * BACKEND.matrix_bytes
    assert CpuBackend.on(8).matrix_bytes == 8 * CpuBackend.on(1).matrix_bytes


def test_kernels_are_kept_for_every_shape_of_tile() -> None:
    _, _, (first, second) = tiled_stages((3, 3))
    # The 3x3 convolution meets a border at the first and at the last tile, the 1x1 never does: 40 rows are
    # tiles of 13, 13 and 14, and 60 columns are three of 20.
    assert first.rows.num_shapes == 3
    assert first.cols.num_shapes == 2
    assert second.rows.num_shapes == 2
    assert second.cols.num_shapes == 1
    assert [first.rows.shapes, first.cols.shapes, second.cols.shapes] == [[0, 1, 2], [0, 1, 0], [0, 0, 0]]
    assert (first.num_kernels, second.num_kernels) == (6, 2)


def test_tiles_with_opposite_padding_have_one_shape_and_are_of_two_kinds() -> None:
    _, _, (first, second) = tiled_stages((3, 3))
    phases = [tiled.phase(differentiated=True) for tiled in (first, second)]
    cols = [[step.kind for step in phase.cols] for phase in phases]
    assert cols == [[0, 1, 2], [0, 0, 0]]
    assert [len(phase.col_kinds) for phase in phases] == [3, 1]


def test_no_more_kernels_are_kept_than_the_library_caches() -> None:
    backend = CpuBackend(kernel_bytes=1, code_bytes=0, matrix_bytes=0)
    few, many = np.array([0, 10, 60, 0, 30]), np.array([0, 10, 600, 0, 300])
    assert backend.kept(few, training=True).forward.total.tolist() == [0, 10, 70, 70, 100]
    # All of the forward pass, and two more for each of the levels that have been differentiated.
    assert backend.kept(few, training=True).backward.total.tolist() == [300, 300, 280, 160, 160]
    assert backend.kept(few, training=False).backward.total.tolist() == 5 * [100]
    kept = backend.kept(many, training=True)
    assert kept.forward.at(4) == (MemoryTerm("compiled kernels", 910),)
    assert kept.backward.at(4) == (MemoryTerm("compiled kernels", CACHED_KERNELS),)


def test_what_the_allocator_loses() -> None:
    assert Fragmentation(step_percent=10).of_step(1000) == 100
    # Holes of the largest step, or what the resident tail leaves behind if that is more.
    keeping = Fragmentation(fixed=5, per_stage=7, held=1.25)
    assert keeping.of_pass(10**9, 10**6, 0) == 5 + 1250 * 10**6
    assert keeping.of_pass(10**6, 10**9, 3) == 5 + 3 * 7 + 10**9
    # Where blocks are given back, nothing is held of the tail's.
    assert Fragmentation(step_percent=10).of_pass(10**9, 10**9, 3) == 0


def test_the_moments_of_a_pass() -> None:
    program, staging, tiled = tiled_stages((2, 3))
    (name,) = staging.stored
    nbytes = program.nodes[name].nbytes
    global_bytes = GlobalBytes(program, staging, traced(make_net(), SHAPE)[1], BACKEND)
    for tier, in_memory in ((Tier.MEMORY, nbytes), (Tier.DISK, 0)):
        store = StorePlan(tier, tier, nbytes, kept=True, last_reader=2, tile=(20, 20))
        found = peak_points(
            tiled, global_bytes, StoredBytes({name: store}, staging.levels), reuses_blocks=False
        )
        assert [point.name for point in found] == [
            "global values of level 0, forward",
            "phase 1, forward",
            "global values of level 1, forward",
            "phase 2, forward",
            "the resident tail, forward",
            "the resident tail, backward",
            "phase 2, backward",
            "global values of level 1, backward",
            "phase 1, backward",
            "global values of level 0, backward",
        ]
        for point in found:
            terms = terms_of(point)
            is_there = "level 0" not in point.name
            assert terms["stored maps"] == in_memory * is_there
            # Made in phase 2's backward pass, read and freed in phase 1's.
            if point.part[0].endswith("backward"):
                assert terms["gradient maps"] == in_memory * is_there
            assert point.nbytes == sum(terms.values())
        # oneDNN keeps a kernel of each convolution and shape, two more once its level is differentiated:
        kernels = [terms_of(point)["compiled kernels"] // BACKEND.kernel_bytes for point in found]
        # of the first convolution for two shapes of tiles, of the second for one.
        assert kernels == [0, 2, 2, 3, 3, 5, 5, 9, 9, 9]
        # Parameters get a gradient from their last reader on, in the order of the backward pass.
        names = "parameter gradients", "parameter gradients so far"
        gradients = [sum(terms_of(point).get(name, 0) for name in names) for point in found]
        # The second convolution's are read in phase 2, the first one's in phase 1, and the norm's for its
        # scale and shift, whose segment is counted alike in both directions.
        second, norm, first = 4 * 8 * 4, 2 * 8 * 4, 8 * 3 * 3 * 3 * 4
        every = second + norm + first
        assert gradients == [0, 0, norm, 0, 0, 0, second, second + norm, every, every]


def test_stored_maps_live_until_their_last_reader() -> None:
    levels = {"a": 1, "b": 2, "c": 3, "d": 5}
    stores = {
        # Read again in the backward pass, its gradient from phase 3 on down.
        "a": StorePlan(Tier.MEMORY, Tier.MEMORY, 1, kept=True, last_reader=3, tile=(1, 1)),
        # Gone after phase 3.
        "b": StorePlan(Tier.MEMORY, Tier.MEMORY, 10, kept=False, last_reader=3, tile=(1, 1)),
        # On disk.
        "c": StorePlan(Tier.DISK, Tier.DISK, 100, kept=True, last_reader=4, tile=(1, 1)),
        # In host RAM, which is not the device's memory.
        "d": StorePlan(Tier.HOST, Tier.HOST, 1000, kept=True, last_reader=5, tile=(1, 1)),
    }
    stored = StoredBytes(stores, levels)
    assert stored.held.forward.total.tolist() == [0, 1, 11, 11, 1, 1]
    # The map, and its gradient map while phases up to its last reader are differentiated.
    assert stored.held.backward.total.tolist() == [0, 2, 2, 2, 1, 1]
    assert stored.most == 11
    assert StoredBytes(stores, levels, Tier.DISK).held.backward.total.tolist() == [0, 0, 0, 200, 200, 100]
    assert StoredBytes(stores, levels, Tier.HOST).most == 2000


def test_dropped_maps_live_again_from_where_they_are_rematerialised() -> None:
    levels = {"a": 2, "last": 6}
    store = StorePlan(Tier.MEMORY, Tier.MEMORY, 1, kept=False, last_reader=3, tile=(1, 1), rematerialised=4)
    stored = StoredBytes({"a": store}, levels)
    assert stored.held.forward.total.tolist() == [0, 0, 1, 1, 0, 0, 0]
    # Before phase 4, for a map that is computed from it; its own gradient map from phase 3 on down.
    assert stored.held.backward.total.tolist() == [0, 0, 2, 2, 1, 0, 0]


def test_a_resident_tail_holds_what_autograd_saves() -> None:
    program, differentiated = traced(make_net(), SHAPE, tail="conv2d")  # all of it
    staging = divide(program)
    names = staging.segments[max(staging.segments)]
    image, wide, narrow = (ROW * channels * 40 * 60 for channels in (3, 8, 4))
    step = ResidentBytes(program, names, BACKEND, differentiated).step()
    terms = terms_of(step)
    # The first convolution saves the image, the norm its operand, ReLU its result, which is the second
    # convolution's operand. That one holds most: gradients of operand and result, and copies of both and of
    # its weights.
    assert step.operator == "conv2d_1"
    assert terms["operands, results and their gradients"] == wide + narrow
    assert terms["operator workspace"] == wide + narrow + 2 * 4 * 8 * 4
    assert terms["saved by the resident tail"] == pytest.approx(image + 2 * wide, abs=200)
    # The second convolution's weights; the norm's and the first convolution's have no gradient yet.
    assert terms["parameter gradients"] == 4 * 8 * 4
    assert terms["address space of compiled code"] == 2 * 2 * BACKEND.code_bytes
    inference = ResidentBytes(program, names, BACKEND, ()).step()
    assert terms_of(inference)["saved by the resident tail"] == 0


@pytest.mark.parametrize("tail", [None, "conv2d"], ids=["in tiles", "whole"])
def test_the_images_gradient_is_copied_out_in_the_end(tail: str | None) -> None:
    program, _ = traced(make_net(), SHAPE, tail=tail)
    everything = differentiated(program, [*program.states, program.image])
    held = GlobalBytes(program, divide(program), everything, BACKEND).held
    image = program.nodes[program.image].nbytes
    terms = {term.name: term.nbytes for term in held.segments.at(0)}
    assert terms["gradients of the image and of promoted values"] == 2 * image
    if tail is None:
        (flowing,) = (t for t in held.backward.at(1) if t.name.startswith("gradients of the image"))
        assert flowing.nbytes == image
