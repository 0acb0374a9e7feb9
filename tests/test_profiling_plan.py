"""The plan as it is drawn: what the sketch takes from it, and where the shapes are."""

from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import pytest
from profiles import FACTORY, MIB, PHASES, SHAPE, SKETCH

from streamcnn import StreamingModel
from streamcnn.plan.plan import Plan
from streamcnn.profiling.plan_drawing import (
    COLUMN,
    HALO,
    RESIDENT,
    ROW,
    TIERS,
    TILE,
    WALL,
    describe_phase,
    draw_plan,
)
from streamcnn.profiling.shapes import Arc, Box, Drawing, Label, Lines
from streamcnn.profiling.sketch import count_kinds, sketch_plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The plan of a small model with tiles of 40 pixels."""
    names: dict[str, object] = {}
    exec(FACTORY, names)
    make = names["make"]
    assert callable(make)
    return StreamingModel(make().train(), tile=40).plan(SHAPE)


def of_color(drawing: Drawing, color: str) -> list[Box]:
    """Boxes of a colour, without the legend's."""
    boxes = [s for g in drawing.groups[1:] for s in g.shapes if isinstance(s, Box)]
    return [box for box in boxes if box.fill == color]


def texts(drawing: Drawing) -> list[str]:
    return [s.text for g in drawing.groups for s in g.shapes if isinstance(s, Label)]


def arcs(drawing: Drawing) -> list[Arc]:
    return [s for g in drawing.groups for s in g.shapes if isinstance(s, Arc)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("conv2d", "conv2d"),
        ("conv2d_12", "conv2d"),
        ("relu_", "relu"),
        ("relu__3", "relu"),
        ("max_pool2d", "max_pool2d"),
        ("batch_norm_1.5", "batch_norm"),
        ("batch_norm.5", "batch_norm"),
        ("adaptive_avg_pool2d_2", "adaptive_avg_pool2d"),
    ],
)
def test_the_kind_of_an_operator(name: str, kind: str) -> None:
    assert count_kinds([name]) == ((kind, 1),)


def test_kinds_are_counted_in_the_order_of_their_first() -> None:
    assert count_kinds(["relu_", "conv2d", "conv2d_1", "relu__1"]) == (("relu", 2), ("conv2d", 2))


def test_a_sketch_says_what_the_plan_says(plan: Plan) -> None:
    sketch = sketch_plan(plan)
    assert (sketch.image_shape, len(sketch.phases)) == (SHAPE, len(plan.phases))
    assert sketch.image == plan.phases[0].inputs[0]
    for drawn, phase in zip(sketch.phases, plan.phases, strict=True):
        assert drawn.level == phase.level
        assert sum(count for _, count in drawn.operators) == len(phase.nodes)
        assert sum(count for _, count in drawn.reductions) == len(phase.reductions)
        assert drawn.grid[0] * drawn.grid[1] == phase.num_tiles
        assert [(m.name, m.nbytes, m.tier) for m in drawn.stored] == [
            (name, plan.stores[name].nbytes, plan.stores[name].tier) for name in phase.stored
        ]
        assert drawn.halo == phase.halo


def test_a_sketched_tile_is_one_of_the_plan_in_shares_of_its_map(plan: Plan) -> None:
    phase, drawn = plan.phases[0], sketch_plan(plan).phases[0]
    assert drawn.extent == SHAPE[2:]
    for steps, whole, own, needed in zip(
        (phase.rows, phase.cols), SHAPE[2:], drawn.own, drawn.needed, strict=True
    ):
        step = steps[len(steps) // 2]
        (interval,) = {step.own[name] for name in step.own}
        reads = step.needed[phase.inputs[0]]
        assert own == (round(interval.start / whole, 4), round(interval.stop / whole, 4))
        assert needed == (round(reads.start / whole, 4), round(reads.stop / whole, 4))
        assert needed[0] < own[0] < own[1] <= needed[1]


def test_a_resident_tail_is_named_without_the_parts_of_its_batch_norms(plan: Plan) -> None:
    assert plan.num_resident == 0
    last = plan.segments[-1]
    nodes = ("whole_conv2d", "conv2d_3", "batch_norm_3", "batch_norm_3.1", "relu__7", "linear")
    segments = (*plan.segments[:-1], dataclasses.replace(last, nodes=nodes))
    tail = sketch_plan(dataclasses.replace(plan, num_resident=4, segments=segments)).tail
    assert tail == (("conv2d", 1), ("batch_norm", 1), ("relu", 1), ("linear", 1))
    assert sketch_plan(plan).tail == ()


def test_halo_and_tile_are_at_scale() -> None:
    drawing = draw_plan(SKETCH)
    tile, halo = of_color(drawing, TILE)[0], of_color(drawing, HALO)[0]
    assert tile.height / halo.height == pytest.approx(0.25 / 0.35)
    assert tile.width / halo.width == pytest.approx(0.5 / 0.55)
    assert halo.x < tile.x
    assert halo.y < tile.y
    assert tile.y - halo.y == pytest.approx(0.05 / 0.25 * tile.height)
    assert tile.height == pytest.approx(tile.width)  # 40 x 40 positions of 160 x 80


def test_a_halo_too_thin_to_be_seen_is_framed() -> None:
    thin = dataclasses.replace(PHASES[0], needed=PHASES[0].own)
    frames = of_color(draw_plan(dataclasses.replace(SKETCH, phases=(thin,))), HALO)
    none = dataclasses.replace(thin, halo=(0, 0))
    unframed = of_color(draw_plan(dataclasses.replace(SKETCH, phases=(none,))), HALO)
    assert [box.width - unframed[0].width for box in frames] == [0.0, 3.0]


def test_stored_maps_stand_in_proportion_to_their_bytes_in_the_colour_of_their_home() -> None:
    drawing = draw_plan(SKETCH)
    heights = {tier: [box.height for box in of_color(drawing, color)] for tier, color in TIERS.items()}
    (largest,) = heights["disk"]
    assert heights["memory"] == [pytest.approx(largest / 3), pytest.approx(largest / 6)]
    assert heights["host"] == [pytest.approx(largest / 6)]
    assert {"60.0 MiB", "30.0 MiB", "10.0 MiB"} <= set(texts(drawing))
    assert "map stored on disk" in texts(drawing)


def test_homes_that_are_not_used_are_not_in_the_legend() -> None:
    only = dataclasses.replace(SKETCH, phases=PHASES[:1])
    assert [text for text in texts(draw_plan(only)) if "stored" in text] == ["map stored on disk"]


def test_arrows_go_to_every_reader() -> None:
    spans = [round((arc.stop[0] - arc.start[0] + 10) / COLUMN) for arc in arcs(draw_plan(SKETCH))]
    # image to 1; 1 to 2; 1 and 2 to 3; 3 to the tail
    assert spans == [1, 1, 2, 1, 1]
    sags = [arc.sag for arc in arcs(draw_plan(SKETCH))]
    assert sags[2] > sags[1] == sags[3]


def test_a_barrier_is_behind_every_phase_that_reduces() -> None:
    drawing = draw_plan(SKETCH)
    walls = [
        s.strokes[0][0][0]
        for g in drawing.groups
        for s in g.shapes
        if isinstance(s, Lines) and s.color == WALL
    ]
    assert [wall - walls[0] for wall in walls] == [0, COLUMN]
    assert "2 batch_norm" in texts(drawing)


def test_what_does_not_fit_is_counted() -> None:
    shown = texts(draw_plan(SKETCH))
    assert {"40x40", "no halo", "halo 8", "160x80", "x3"} <= set(shown)
    assert "+ 4 more" in shown  # of five kinds three are named
    assert "a<b" not in shown


@pytest.mark.parametrize(("per_row", "rows"), [(None, 1), (4, 1), (3, 2), (2, 2), (1, 4)])
def test_a_plan_is_folded_into_rows(per_row: int | None, rows: int) -> None:
    drawing, flat = draw_plan(SKETCH, per_row), draw_plan(SKETCH)
    assert drawing.height - flat.height == (rows - 1) * ROW
    for group in drawing.groups:
        for shape in group.shapes:
            if isinstance(shape, Box):
                assert 0 <= shape.x <= shape.x + shape.width <= drawing.width
                assert 0 <= shape.y <= shape.y + shape.height <= drawing.height
    # An arrow between rows is in two pieces.
    crossing = {None: 0, 4: 0, 3: 2, 2: 2, 1: 4}[per_row]
    assert len(arcs(drawing)) == 5 + crossing
    assert len(of_color(drawing, RESIDENT)) == 1


def test_a_phase_in_words() -> None:
    assert describe_phase(PHASES[1]) == (
        "Phase 2: batch_norm, relu, 2 conv2d, max_pool2d, 3 a<b; reads conv2d; 1 tile (1x1) of 80x40 "
        "positions, halo 0x0; stores conv2d_1 20.0 MiB in memory, conv2d_2 10.0 MiB in host RAM; then a "
        "barrier: 2 batch_norm over the whole map."
    )


def test_the_drawing_is_well_formed() -> None:
    svg = ElementTree.fromstring(draw_plan(SKETCH).to_svg('a "plan" & more'))
    columns = [group for group in svg.iter("g") if group.get("data-info")]
    assert svg.get("aria-label") == 'a "plan" & more'
    assert len(columns) == 1 + len(PHASES) + 1
    assert columns[2].get("data-info") == describe_phase(PHASES[1])


def test_a_deep_network_is_wide_and_no_higher() -> None:
    many = tuple(
        dataclasses.replace(PHASES[2], level=level, inputs=(f"map{level - 1}",), stored=())
        for level in range(1, 221)
    )
    drawing = draw_plan(dataclasses.replace(SKETCH, phases=many))
    assert drawing.height == draw_plan(SKETCH).height
    assert drawing.width > 220 * COLUMN
    assert len(drawing.to_svg("plan")) < MIB
