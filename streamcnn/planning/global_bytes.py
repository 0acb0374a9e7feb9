"""Projected bytes of what is not cut into tiles: global values, the resident tail, plain PyTorch.

The tail is ordinary PyTorch on whole maps, so what it holds is what autograd saves: see
:class:`~streamcnn.graph.costs.Saves`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from streamcnn.graph.costs import CallBytes, Operation, Routine, cost_of, is_view
from streamcnn.graph.program import Kind, Node, Program
from streamcnn.plan.level_bytes import HeldBytes, Ints, LevelBytes
from streamcnn.plan.reading import HELD, NO_READING, OPENING, READING, BatchCost
from streamcnn.plan.storage import MemoryTerm
from streamcnn.planning.backends import Backend
from streamcnn.planning.routines import num_sizes
from streamcnn.planning.staging import Staging

RUN_TIME = "reserved for the run time"
"""The name of the term of what a pass takes the first time that it runs, beside tensors."""
LOSS_COPIES = 3
"""Bytes of the model's outputs that the user holds in backward: they, a value of the loss, a gradient."""


@dataclass(frozen=True, slots=True)
class Step:
    """Projected bytes at the worst operator of a step."""

    terms: tuple[MemoryTerm, ...]
    operator: str
    """The operator at which most is held."""
    reusable: int
    """Bytes in blocks that may be kept for reuse when they are freed."""
    reading: int = 0
    """What reading a region of an image takes beside tensors, at another moment of the step perhaps."""

    @property
    def nbytes(self) -> int:
        """The sum of the terms."""
        return total_bytes(self.terms)


def total_bytes(*terms: Iterable[MemoryTerm]) -> int:
    """The sum of all terms."""
    return sum(term.nbytes for each in terms for term in each)


def resident_step(
    program: Program, names: Iterable[str], backend: Backend, differentiated: Collection[str]
) -> Step:
    """Operators run one after another on whole values, then differentiated in reverse.

    An operator holds what autograd has saved so far, its operands and its result, or their gradients, and a
    convolution's reordered copies. On the way back what autograd has saved gives way to the gradients of the
    parameters.
    """
    training = bool(differentiated)
    values = _Values(program, tuple(names), differentiated, backend)
    arriving = values.state_bytes(differentiated)
    gradients = sum(arriving.values())
    saved = most = before = arrived = flow = workspace = reusable = 0
    place = ""
    for name in values.names:
        kept = values.saved(name)
        saved += kept
        reusable += kept if kept < backend.reusable_bytes else 0
        around, copies = values.around(name), values.workspace(name)
        if saved + gradients + around + copies > most:
            most, place = saved + gradients + around + copies, name
            before, arrived, flow, workspace = saved, gradients, around, copies
        gradients -= arriving.get(name, 0)
    terms = (
        MemoryTerm("saved by the resident tail", before),
        MemoryTerm("parameter gradients", arrived),
        MemoryTerm("operands, results and their gradients", flow),
        MemoryTerm("operator workspace", workspace),
        # One kernel for each convolution forward, and two in the backward pass, which is a step of its own.
        *backend.step_terms(
            (2 if training else 1) * num_sizes(program, values.names, Routine.CONVOLUTION),
            num_sizes(program, values.names, Routine.MATRIX_PRODUCT),
        ),
    )
    return Step(terms, place, reusable)


class _Values:
    """What the operators of a step hold: views and parts of a tuple are no memory of their own."""

    def __init__(
        self, program: Program, names: Sequence[str], differentiated: Collection[str], backend: Backend
    ) -> None:
        self.program = program
        self.names = names
        self.differentiated = differentiated
        self.backend = backend
        inside = set(names)
        self.kept: set[str] = set()
        for name in names if differentiated else ():
            target, saves = program.nodes[name].target, cost_of(program.nodes[name].target).saves
            if saves.result:
                self.kept.add(self._owner(name))
            if saves.operands and not is_view(target):
                self.kept.update(
                    self._owner(operand) for operand in program.nodes[name].operands if operand in inside
                )

    def saved(self, name: str) -> int:
        """Bytes that stay when an operator has run."""
        node = self.program.nodes[name]
        if is_view(node.target) or not self.differentiated:
            return 0
        beside = cost_of(node.target).saves.beside
        return (node.nbytes if name in self.kept else 0) + (beside(self._call(node)) if beside else 0)

    def around(self, name: str) -> int:
        """Bytes of operands and result while an operator runs, or of their gradients."""
        node = self.program.nodes[name]
        if is_view(node.target):
            return 0
        inner = cost_of(node.target).inner
        return self._operands(node) + node.nbytes + (2 * inner(self._call(node)) if inner else 0)

    def _operands(self, node: Node) -> int:
        """Bytes of the operands that are no parameters."""
        operands = (self.program.nodes[name] for name in node.operands)
        # Maps that a reduction or a gather looks at are in their stores, and never here as a whole.
        return sum(n.nbytes for n in operands if n.kind is not Kind.STATE and not n.is_map)

    def _call(self, node: Node) -> Operation:
        return Operation.of(
            self.program, node, self.differentiated, fuses_attention=self.backend.fuses_attention
        )

    def workspace(self, name: str) -> int:
        """Bytes that an operator takes besides, for parameters and for their gradients."""
        node, nodes = self.program.nodes[name], self.program.nodes
        weights = sum(nodes[n].nbytes for n in node.operands if nodes[n].kind is Kind.STATE)
        nbytes = CallBytes(self._operands(node), node.nbytes, 2 * weights)
        return self.backend.workspace(cost_of(node.target), nbytes)

    def state_bytes(self, differentiated: Collection[str]) -> dict[str, int]:
        """Bytes of the parameters by the last operator that reads them, which first gives them a gradient."""
        nodes = self.program.nodes
        last = {state: name for name in self.names for state in nodes[name].operands}
        found: dict[str, int] = {}
        for state, reader in last.items():
            if state in self.program.states and state in differentiated:
                found[reader] = found.get(reader, 0) + nodes[state].tensor.gradient_bytes
        return found

    def _owner(self, name: str) -> str:
        """The operator whose memory a value is in."""
        node = self.program.nodes[name]
        while is_view(node.target) and node.operands:
            node = self.program.nodes[node.operands[0]]
        return node.name


def plain_bytes(program: Program, differentiated: Collection[str]) -> int:
    """Projected peak of plain PyTorch on the whole image, for a program without a resident tail.

    Training keeps every tensor of the forward pass; backward adds gradients of the largest one's operands
    and result, and the copies that a convolution works on.
    """
    image = program.nodes[program.image].nbytes
    made = (node for node in program.nodes.values() if node.kind in (Kind.LOCAL, Kind.GLOBAL))
    largest = max((node.nbytes for node in made), default=0)
    if not differentiated:
        return image + 3 * largest
    states = sum(program.nodes[name].nbytes for name in program.states if name in differentiated)
    return program.plain_bytes + image + states + 4 * largest


class GlobalBytes:
    """Bytes of global values, parameters' gradients and decoded images at every moment of a pass."""

    def __init__(
        self,
        program: Program,
        staging: Staging,
        differentiated: Collection[str],
        backend: Backend,
        reading: BatchCost = NO_READING,
    ) -> None:
        self.backend = backend
        self.reading = reading
        self.differentiated = differentiated
        nodes, segments = program.nodes, staging.segments
        self.last = max(segments, default=0)
        """The level of the resident tail."""
        self.num_kernels = np.zeros(max((self.last, *staging.levels.values())) + 1, np.int64)
        """By level: different convolutions among its global values."""
        for level, names in segments.items():
            routines = (cost_of(nodes[name].target).routine for name in names)
            self.num_kernels[level] = sum(routine is Routine.CONVOLUTION for routine in routines)
        self.held = self._held(program, staging)
        """What of this is held beside the steps of a pass."""
        self.opening = LevelBytes.of(1, *self._always(1), (OPENING, np.array([reading.opening])))
        """While images that are decoded whole are read for the first time, before anything else: its only
        level."""
        self.tail_step = resident_step(program, segments.get(self.last, ()), backend, differentiated)
        """What the resident tail takes beyond the global values before it."""

    def kept(self, num_kernels: Ints) -> HeldBytes:
        """What the backend keeps where phases have so many different convolutions by level."""
        return self.backend.kept(self.num_kernels + num_kernels, training=bool(self.differentiated))

    def _held(self, program: Program, staging: Staging) -> HeldBytes:
        num_levels = len(self.num_kernels)
        values = _values_by_level(program, staging, num_levels, training=bool(self.differentiated))
        levels = np.arange(num_levels)
        always = LevelBytes.of(num_levels, *self._always(num_levels))
        forward = always + LevelBytes.of(
            num_levels,
            ("global values", values[levels]),
            (READING, self._whole_image(program, staging.levels)),
        )
        # Those of the last level, the resident tail, are only there while no tile is.
        backward = always + LevelBytes.of(
            num_levels, ("global values", values[np.minimum(levels + 1, self.last)])
        )
        if not self.differentiated:
            return HeldBytes(forward, forward, backward)
        whole = [n for n in program.nodes.values() if n.kind is Kind.PROMOTED or n.name == program.image]
        # The image's is copied out of its store once more.
        inputs = 2 * sum(n.nbytes for n in whole if n.name in self.differentiated)
        outputs = LOSS_COPIES * sum(program.nodes[name].nbytes for name in program.output_names)
        others = LevelBytes.of(
            num_levels,
            ("gradients of the image and of promoted values", np.full(num_levels, inputs)),
            ("outputs in the loss", np.full(num_levels, outputs)),
        )
        states = _states_by_level(program, staging.levels, self.differentiated, num_levels)
        parameters = LevelBytes.of(num_levels, ("parameter gradients", states[::-1].cumsum()[::-1]))
        # The tail's own step counts the gradients of the parameters.
        return HeldBytes(forward, forward + others, backward + parameters + others)

    def _always(self, num_levels: int) -> tuple[tuple[str, Ints], ...]:
        """At every moment."""
        return (
            (RUN_TIME, np.full(num_levels, self.backend.runtime_bytes)),
            (HELD, np.full(num_levels, self.reading.held)),
        )

    def _whole_image(self, program: Program, levels: Mapping[str, int]) -> Ints:
        """By level: for an image as a whole, where an operator on whole maps reads it."""
        nbytes = np.zeros(len(self.num_kernels), np.int64)
        for node in program.nodes.values():
            if node.kind is Kind.GATHER and (read := node.operands[0]) in program.images:
                transient = self.reading.of_map(read, program.nodes[read].size).transient
                nbytes[levels[node.name]] = max(nbytes[levels[node.name]], transient)
        return nbytes


def _values_by_level(program: Program, staging: Staging, num_levels: int, *, training: bool) -> Ints:
    """Bytes of the global values of all levels below each, and of the gradients that flow among them."""
    sizes = [
        [program.nodes[n].nbytes for n in staging.segments.get(level, ())] for level in range(num_levels)
    ]
    values = np.cumsum([sum(each) for each in sizes])
    # Gradients flow back one operator at a time: two of the largest at once.
    flow = 2 * np.maximum.accumulate([max(each, default=0) for each in sizes]) if training else 0
    below: Ints = np.concatenate((np.zeros(1, np.int64), values + flow))
    return below


def _states_by_level(
    program: Program, levels: Mapping[str, int], differentiated: Collection[str], num_levels: int
) -> Ints:
    """Bytes of parameters by the level of their last reader, which first gives them a gradient."""
    last: dict[str, int] = {}
    for node in program.nodes.values():
        for name in node.operands:
            if name in program.states and name in differentiated:
                last[name] = max(last.get(name, 0), levels[node.name])
    states = np.zeros(num_levels, np.int64)
    for name, level in last.items():
        states[level] += program.nodes[name].tensor.gradient_bytes
    return states
