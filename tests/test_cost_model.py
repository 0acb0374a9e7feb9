"""Projected time and arithmetic: counted operator by operator, position by position."""

from __future__ import annotations

import dataclasses

import plain_passes
import pytest
import torch
from helpers import traced
from torch import nn

from streamcnn import StreamingModel
from streamcnn.graph.program import Program
from streamcnn.plan.hardware import NOMINAL
from streamcnn.plan.plan import Plan
from streamcnn.plan.storage import Tier
from streamcnn.planning.backends import CpuBackend, CudaBackend
from streamcnn.planning.cost_model import (
    BACKWARD_WORK,
    PARAMETER_PASSES,
    MapTraffic,
    Traffic,
    all_works,
    output_traffic,
    plain_time,
    stage_time,
    tile_traffic,
    works_on_tiles,
)
from streamcnn.planning.staging import divide
from streamcnn.planning.tiling import Outline, tile_stage

SHAPE = (2, 3, 40, 60)
PIXELS = 40 * 60
HARDWARE = NOMINAL["cpu"]


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.ConvTranspose2d(8, 4, 2, stride=2, bias=False),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
    )


def program_of_net() -> Program:
    return traced(make_net(), SHAPE)[0]


def test_operations_of_every_kind_of_operator() -> None:
    works = all_works(program_of_net())
    flops = {name: work.flops for name, work in works.items()}
    assert flops["conv2d"] == 2 * (3 * 8 * 9) * 2 * PIXELS
    # Depthwise: one channel is read for each that is written.
    assert flops["conv2d_1"] == 2 * (8 * 9) * 2 * PIXELS
    assert works["conv2d_1"].grouped
    assert not works["conv2d"].grouped
    # Transposed: every position of the operand meets every weight.
    assert flops["conv_transpose2d"] == 2 * (8 * 4 * 4) * 2 * PIXELS
    # The operand is read and the result written, two images of float32.
    assert works["conv2d"].nbytes == 4 * 2 * PIXELS * (3 + 8)
    assert works["conv2d"].made == 4 * 2 * PIXELS * 8


def test_the_time_of_a_stage() -> None:
    program = program_of_net()
    stage = divide(program).stages[0]
    works = all_works(program)
    (tiled,) = tile_stage(Outline.of(program, stage), (2, 3))
    assert stage.nodes == ("conv2d",)
    once = (
        2 * (3 * 8 * 9) * 2 * PIXELS / HARDWARE.dense_flops + works["conv2d"].nbytes / HARDWARE.memory_bytes
    )
    forward = stage_time(tiled, works, HARDWARE, CpuBackend.on(1), backward=False)
    assert forward.seconds == pytest.approx(once + 6 * HARDWARE.operator_seconds)
    assert forward.fresh_seconds == pytest.approx(works["conv2d"].made / HARDWARE.fresh_bytes)
    # Its result is stored, so the backward pass only differentiates it.
    both = stage_time(tiled, works, HARDWARE, CpuBackend.on(1), backward=True)
    of_parameters = 6 * PARAMETER_PASSES * 3 * 8 * 9 * 4 / HARDWARE.memory_bytes
    assert both.seconds == pytest.approx((1 + BACKWARD_WORK) * forward.seconds + of_parameters)
    assert both.flops == (1 + BACKWARD_WORK) * works["conv2d"].flops


def test_a_card_fuses_activations_with_norms() -> None:
    torch.manual_seed(0)
    program = traced(plain_passes.Plain(8), (1, 8, 24, 24))[0]
    works = all_works(program)
    assert works_on_tiles(program, works, CpuBackend.on(1)) is works
    found = works_on_tiles(program, works, CudaBackend())
    fused = {name for name, work in found.items() if work.is_fused}
    assert fused == {"add", "relu"}
    nbytes = 8 * 24 * 24 * 4
    # The norm reads and writes the map for all of them; the sum reads another one.
    assert (found["add"].nbytes, found["relu"].nbytes) == (nbytes, 0)
    assert all(found[name] == works[name] for name in works.keys() - fused)
    assert all(found[name].flops == works[name].flops for name in works)


def test_a_card_is_given_work_ahead() -> None:
    """Either the card's time or the host's counts, whichever is longer."""
    program = program_of_net()
    stage = divide(program).stages[0]
    works = all_works(program)
    (tiled,) = tile_stage(Outline.of(program, stage), (2, 3))
    times = {
        seconds: stage_time(
            tiled,
            works,
            dataclasses.replace(HARDWARE, operator_seconds=seconds),
            CudaBackend(),
            backward=False,
        ).seconds
        for seconds in (0.0, 1e-9, 1.0)
    }
    assert times[0.0] == times[1e-9] < 1
    assert times[1.0] == 6


def test_what_is_moved_to_and_from_stores() -> None:
    program = program_of_net()
    first, second = divide(program).stages[:2]
    nbytes = program.nodes["conv2d"].nbytes
    # Written once; in the backward pass its gradient is read, and its values for the statistics.
    values, gradient = Traffic(nbytes, nbytes), Traffic(nbytes, 0)
    assert output_traffic(program, first, backward=True) == {"conv2d": MapTraffic(values, gradient)}
    assert output_traffic(program, first, backward=False) == {"conv2d": MapTraffic(Traffic(0, nbytes))}
    (tiled,) = tile_stage(Outline.of(program, second), (2, 3))
    traffic = tile_traffic(tiled, backward=True)
    moved = traffic.pop("conv2d")
    regions = moved.gradient.written
    # Read forward and backward; the gradient is added: read and written. Each of six tiles does so.
    assert moved == MapTraffic(Traffic(2 * regions, 0, 2 * 6), Traffic(regions, regions, 6))
    # What it stores is written once, and read as often as the stage's own output above.
    assert traffic == {name: MapTraffic(Traffic(0, 0, 2 * 6), Traffic(0, 0, 6)) for name in second.stored}
    assert regions == tiled.covered("conv2d") * nbytes // PIXELS > nbytes
    assert moved.seconds(HARDWARE, (Tier.DISK, Tier.MEMORY)) == pytest.approx(
        moved.values.seconds(HARDWARE, Tier.DISK) + moved.gradient.seconds(HARDWARE, Tier.MEMORY)
    )
    assert Traffic(10, 20, 7).seconds(HARDWARE, Tier.DISK) == pytest.approx(
        10 / HARDWARE.read_bytes[Tier.DISK]
        + 20 / HARDWARE.write_bytes[Tier.DISK]
        + 7 * HARDWARE.transfer_seconds[Tier.DISK]
    )


def brute_force_recomputation(plan: Plan, program: Program) -> float:
    """Operations of a plan over the plain ones, from the tiles that the executor runs."""
    works = all_works(program)
    done = 0.0
    for phase in plan.phases:
        for name in phase.nodes:
            positions = sum(
                phase.needed(row, col, name).rows.size * phase.needed(row, col, name).cols.size
                for row in range(len(phase.rows))
                for col in range(len(phase.cols))
            )
            passes = 1 + (BACKWARD_WORK + (name not in phase.skipped)) * phase.differentiated
            done += passes * positions / works[name].num_positions * works[name].flops
    return done / sum((1 + BACKWARD_WORK) * work.flops for work in works.values())


def test_recomputation_is_counted_tile_by_tile() -> None:
    model = StreamingModel(make_net(), tile=16)
    model.resident_tail = False
    planned = model.planned(SHAPE, torch.float32, image_gradient=False)
    expected = brute_force_recomputation(planned.plan, planned.program)
    assert planned.plan.recomputation == pytest.approx(expected, rel=1e-6)
    assert planned.plan.recomputation > 1.05


def test_plain_pytorch_takes_new_memory_for_large_blocks_alone() -> None:
    works = {"conv": dataclasses.replace(all_works(program_of_net())["conv2d"], made=2**25)}
    small = {"conv": dataclasses.replace(works["conv"], made=2**25 - 1)}
    more = (
        plain_time(works, HARDWARE, CpuBackend.on(1), backward=False, keeps_blocks=False).seconds
        - plain_time(small, HARDWARE, CpuBackend.on(1), backward=False, keeps_blocks=False).seconds
    )
    assert more == pytest.approx(2**25 / HARDWARE.fresh_bytes)
