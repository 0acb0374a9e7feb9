"""Projected bytes: what carrying out a plan takes, as sums of named terms.

All figures are bytes above the baseline of a loaded model. A phase's step is projected for its largest
tile; what lives across steps (stored maps, gradients, small values) is added per phase, and the plan's
projection is that of its worst moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from streamcnn.ops.convolution import is_convolution
from streamcnn.plan import AxisStep, Home, MemoryTerm, Phase, StorePlan
from streamcnn.program import Kind, Node, Program
from streamcnn.staging import Staging

ALLOCATOR_WASTE = {True: 4.0, False: 0.1}
"""What the C allocator loses to holes, as a share of the largest step, if it keeps freed blocks or not."""
RUNTIME_BYTES = 32 * 2**20
"""Threads' buffers, compiled kernels and the interpreter's own growth during a first pass."""
READ_COPIES = {Home.MEMORY: 1, Home.HOST: 1, Home.DISK: 2}
"""Copies of an input's region while a tile reads it: strided views are made contiguous by operators."""
REDUCTION_COPIES = 2
"""Temporary copies of a tile's own part while a reduction or its gradient is worked out."""


TAIL_COPIES = 2
"""Bytes that a resident operator takes, in copies of its result: the value and its gradient."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Projected bytes at one point of a pass."""

    name: str
    terms: tuple[MemoryTerm, ...]

    @property
    def nbytes(self) -> int:
        """The sum of the terms."""
        return sum(term.nbytes for term in self.terms)


def worst_moment(
    program: Program,
    staging: Staging,
    phases: Iterable[Phase],
    stores: Mapping[str, StorePlan],
    differentiated: frozenset[str],
    *,
    reuses_heap: bool,
) -> Moment:
    """The moment of a pass, forward and (if anything is differentiated) backward, that takes most."""
    phases = tuple(phases)
    last = max(staging.segments, default=0)
    small = small_values(program, staging, differentiated, before=last)
    tail = small_values(program, staging, differentiated, before=last + 1)
    largest = max((step_bytes(program, phase, stores) for phase in phases), default=0)
    waste = MemoryTerm("allocator waste", int(ALLOCATOR_WASTE[reuses_heap] * largest))
    always = (RUNTIME, waste)
    stored = stored_bytes(stores, staging.levels, last, backward=bool(differentiated))
    moments = [Moment("the resident tail", (*always, *stored, *tail))]
    for phase in phases:
        at = f"phase {phase.level}"
        live = stored_bytes(stores, staging.levels, phase.level, backward=False)
        terms = (*always, *small, *live, *forward_step(program, phase, stores))
        moments.append(Moment(f"{at}, forward", terms))
        if phase.differentiated:
            live = stored_bytes(stores, staging.levels, phase.level, backward=True)
            terms = (*always, *small, *live, *backward_step(program, phase, stores))
            moments.append(Moment(f"{at}, backward", terms))
    return max(moments, key=lambda moment: moment.nbytes)


RUNTIME = MemoryTerm("reserved for the run time", RUNTIME_BYTES)


def plain_bytes(program: Program, differentiated: frozenset[str]) -> int:
    """Projected peak of plain PyTorch on the whole image.

    Training keeps every tensor of the forward pass; backward adds gradients of the largest one's operands
    and result, and the copies that a convolution works on.
    """
    image = program.nodes[program.image].nbytes
    largest = max((node.nbytes for node in program.nodes.values() if node.kind is Kind.LOCAL), default=0)
    if not differentiated:
        return image + 3 * largest
    states = sum(program.nodes[name].nbytes for name in program.states if name in differentiated)
    return program.plain_bytes + image + states + 4 * largest


def small_values(
    program: Program, staging: Staging, differentiated: frozenset[str], *, before: int
) -> tuple[MemoryTerm, ...]:
    """Small values of the levels below ``before``, and the parameters' gradients.

    Those of the last level, the resident tail, are only there while no tile is.
    """
    smalls = [
        program.nodes[name] for level, names in staging.segments.items() if level < before for name in names
    ]
    values = sum(node.nbytes for node in smalls)
    largest = max((node.nbytes for node in smalls), default=0)
    states = sum(program.nodes[name].nbytes for name in program.states if name in differentiated)
    if not differentiated:
        return (MemoryTerm("small values", values),)
    return (
        # Their gradients flow back one operator at a time: two of the largest at once.
        MemoryTerm("small values", values + 2 * largest),
        MemoryTerm("parameter gradients", states),
    )


def stored_bytes(
    stores: Mapping[str, StorePlan], levels: Mapping[str, int], level: int, *, backward: bool
) -> tuple[MemoryTerm, ...]:
    """Stored maps and gradient maps in the device's memory while the phase of ``level`` runs."""
    made = {name: store for name, store in stores.items() if levels[name] <= level}
    maps = sum(
        store.nbytes
        for store in made.values()
        if store.home is Home.MEMORY
        and (store.kept if backward else store.kept or store.last_reader >= level)
    )
    if not backward:
        return (MemoryTerm("stored maps", maps),)
    gradients = sum(
        store.nbytes
        for store in made.values()
        if store.gradient_home is Home.MEMORY and store.kept and store.last_reader >= level
    )
    return (MemoryTerm("stored maps", maps), MemoryTerm("gradient maps", gradients))


def step_bytes(program: Program, phase: Phase, stores: Mapping[str, StorePlan]) -> int:
    """Bytes of the largest step of ``phase``, in whichever direction takes more."""
    terms = backward_step if phase.differentiated else forward_step
    return sum(term.nbytes for term in terms(program, phase, stores))


def forward_step(program: Program, phase: Phase, stores: Mapping[str, StorePlan]) -> tuple[MemoryTerm, ...]:
    """One tile of ``phase`` without autograd: values live from their operator to their last use."""
    tile = _LargestTile(program, phase)
    live = peak = workspace = 0
    alive: dict[str, int] = {}
    for name in phase.nodes:
        alive[name] = tile.made(name)
        live = sum(alive.values()) + tile.padded(name)
        needs = tile.workspace(name)
        if live + needs > peak + workspace:
            peak, workspace = live, needs
        for dead in phase.releases.get(name, ()):
            del alive[dead]
    own = max((tile.own(name) for name in tile.owned), default=0)
    return (
        MemoryTerm("input regions", tile.reads(stores)),
        MemoryTerm("live activations", peak),
        MemoryTerm("operator workspace", workspace),
        MemoryTerm("reductions and writing", REDUCTION_COPIES * own),
    )


def backward_step(program: Program, phase: Phase, stores: Mapping[str, StorePlan]) -> tuple[MemoryTerm, ...]:
    """One tile of ``phase`` with autograd: values are kept, gradients flow back operator by operator."""
    tile = _LargestTile(program, phase)
    values = sum(tile.made(name) + tile.padded(name) for name in phase.nodes if name not in phase.skipped)
    values += sum(tile.padded(name) for name in phase.skipped)
    flow = workspace = 0
    for name in phase.nodes:
        gradients = tile.nbytes(name) + tile.operands(name)
        if gradients + tile.workspace(name) > flow + workspace:
            flow, workspace = gradients, tile.workspace(name)
    own = sum(tile.own(name) for name in tile.owned)
    parameters = {n for name in phase.nodes for n in program.nodes[name].operands}
    weights = sum(program.nodes[n].nbytes for n in parameters if program.nodes[n].kind is Kind.STATE)
    return (
        MemoryTerm("input regions and their gradients", 2 * tile.reads(stores)),
        MemoryTerm("autograd graph of a tile", values),
        MemoryTerm("gradients of activations", flow),
        MemoryTerm("operator workspace", workspace),
        MemoryTerm("arriving gradients", (1 + REDUCTION_COPIES) * own),
        # The tile's own, and its copies in the layouts that convolutions work in.
        MemoryTerm("a tile's parameter gradients", 3 * weights),
    )


class _LargestTile:
    """Bytes of maps on the largest tile of a phase."""

    def __init__(self, program: Program, phase: Phase) -> None:
        self.program = program
        self.phase = phase
        self.rows = max(phase.rows, key=_extent)
        self.cols = max(phase.cols, key=_extent)
        self.owned = tuple(self.rows.own)

    def nbytes(self, name: str) -> int:
        """Bytes of what a tile needs of a map."""
        return self._area(name, self.rows.needed[name].size, self.cols.needed[name].size)

    def made(self, name: str) -> int:
        """Bytes that an operator's value adds: none if it overwrites its operand."""
        return 0 if name in self.phase.in_place else self.nbytes(name)

    def own(self, name: str) -> int:
        """Bytes of a tile's own part of an output."""
        return self._area(name, self.rows.own[name].size, self.cols.own[name].size)

    def _area(self, name: str, height: int, width: int) -> int:
        node = self.program.nodes[name]
        return node.nbytes // (node.size[0] * node.size[1]) * height * width

    def operands(self, name: str) -> int:
        """Bytes of the map operands of an operator."""
        local = self.program.nodes[name].local
        assert local is not None
        return sum(self.nbytes(operand) for operand in local.links)

    def padded(self, name: str) -> int:
        """Bytes of the padded copies that an operator reads at the border of the map."""
        local = self.program.nodes[name].local
        assert local is not None
        return 0 if local.pointwise or local.fill is None else self.operands(name)

    def workspace(self, name: str) -> int:
        """Bytes that an operator takes besides operands and result.

        Convolutions on the CPU reorder operands and result into blocked layouts.
        """
        node = self.program.nodes[name]
        if not is_convolution(node.target):
            return 0
        return self.nbytes(name) + self.operands(name) + _weights(self.program, node)

    def reads(self, stores: Mapping[str, StorePlan]) -> int:
        """Bytes of the input regions with their copies while being read."""
        total = 0
        for name in self.phase.inputs:
            store = stores.get(name)
            total += self.nbytes(name) * (READ_COPIES[store.home] if store else 2)
        return total


def _weights(program: Program, node: Node) -> int:
    return sum(program.nodes[n].nbytes for n in node.operands if not program.nodes[n].is_map)


def _extent(step: AxisStep) -> int:
    return sum(interval.size for interval in step.needed.values())
