"""Projected bytes of values that are not tiled: global values and the resident tail."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from streamcnn.graph.costs import Routine, cost_of
from streamcnn.graph.program import Kind, Program
from streamcnn.plan.level_bytes import HeldBytes, Ints, LevelBytes
from streamcnn.plan.reading import HELD, NO_READING, OPENING, READING, BatchCost
from streamcnn.plan.storage import OUTPUTS
from streamcnn.planning.backends import Backend
from streamcnn.planning.resident_bytes import ResidentBytes
from streamcnn.planning.staging import Staging

RUN_TIME = "reserved for the run time"
"""Name of the term for bytes that the first pass takes beside tensors, such as library code."""
_MOST_KEPT = 2**10
"""Results of `GlobalBytes.kept` that are cached, some kilobytes each."""
LOSS_COPIES = 3
"""Tensors as large as the outputs that the user holds in backward: they, a value of the loss, a gradient."""


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
        self.last = max(staging.segments, default=0)
        """The level of the resident tail."""
        self.num_kernels = _num_kernels(program, staging, max((self.last, *staging.levels.values())) + 1)
        """By level: number of convolutions among its global values."""
        readers = _readers_elsewhere(program, staging.levels)
        asked = {*readers, *program.output_names, *program.updates.values()}
        by_level = {
            level: ResidentBytes(program, names, backend, differentiated, asked)
            for level, names in {0: (), **staging.segments}.items()
        }
        staying = np.zeros_like(self.num_kernels)
        for level, each in by_level.items():
            staying[level] = each.staying
        self.held = self._held(program, staging, staying, self._arriving(program, staging, readers))
        """Bytes held beside the steps of a pass."""
        self.opening = LevelBytes.of(1, *self._always(1), (OPENING, np.array([reading.opening])))
        """Bytes while images that are decoded whole are read for the first time, before anything else; it has
        one level."""
        self.steps = {level: each.step() for level, each in by_level.items()}
        """By level: bytes of computing and differentiating its global values, beyond those of earlier levels;
        the last is the resident tail's."""
        self.reusable = max((step.reusable for step in self.steps.values()), default=0)
        """The most bytes of any step in blocks that may be kept for reuse."""
        self.step_levels, self.step_bytes = (
            np.array(each, np.int64)
            for each in zip(*((level, step.nbytes) for level, step in self.steps.items()), strict=True)
        )
        self._kept: dict[bytes, HeldBytes] = {}
        """By numbers of kernels: what :meth:`kept` returns, as most choices of tiles have one of few."""

    def kept(self, num_kernels: Ints) -> HeldBytes:
        """Bytes that the backend keeps, given the number of different convolutions in each level's phase."""
        key = num_kernels.tobytes()
        if key not in self._kept:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            num_all = self.num_kernels + num_kernels
            self._kept[key] = self.backend.kept(num_all, training=bool(self.differentiated))
        return self._kept[key]

    def _held(self, program: Program, staging: Staging, staying: Ints, arriving: Ints) -> HeldBytes:
        """Bytes held beside steps.

        Parameters
        ----------
        staying
            By level: bytes of its global values that are held until they are differentiated.
        arriving
            By level: bytes of the gradients that arrive at its global values.
        """
        num_levels = len(self.num_kernels)
        always = LevelBytes.of(num_levels, *self._always(num_levels))
        values = always + LevelBytes.of(num_levels, ("global values", staying.cumsum() - staying))
        forward = values + LevelBytes.of(num_levels, (READING, self._whole_image(program, staging.levels)))
        if not self.differentiated:
            return HeldBytes(forward, forward, values)
        outputs = LOSS_COPIES * sum(program.nodes[name].nbytes for name in program.output_names)
        others = LevelBytes.of(
            num_levels,
            ("gradients of global values", arriving.cumsum()),
            (OUTPUTS, np.full(num_levels, outputs)),
        )
        flowing, taken = self._gradient_maps(program, staging)
        states = _states_by_level(program, staging.levels, self.differentiated, num_levels)
        given = states[::-1].cumsum()[::-1]
        # A segment's own step counts the gradients that it gives.
        before = LevelBytes.of(num_levels, ("parameter gradients so far", given - states))
        parameters = LevelBytes.of(num_levels, ("parameter gradients", given))
        return HeldBytes(forward, forward + before + others + taken, values + parameters + others + flowing)

    def _arriving(self, program: Program, staging: Staging, readers: Mapping[str, set[Kind]]) -> Ints:
        """By level: bytes of the gradients that later phases and segments bring to its global values."""
        arriving = np.zeros_like(self.num_kernels)
        for name, kinds in readers.items():
            # Gradients of values that are only promoted are gradient maps, which are counted as such.
            if name in self.differentiated and kinds != {Kind.PROMOTED}:
                arriving[staging.levels[name]] += program.nodes[name].tensor.gradient_bytes
        return arriving

    def _gradient_maps(self, program: Program, staging: Staging) -> tuple[LevelBytes, LevelBytes]:
        """Bytes of gradients of the image and of promoted values, which are always in memory.

        The first result is for while phases run backward. The second is for while global values are
        differentiated, when each gradient map is copied out of its store.
        """
        num_levels, nodes = len(self.num_kernels), program.nodes
        flowing, taken = np.zeros(num_levels, np.int64), np.zeros(num_levels, np.int64)
        names = with_gradient_maps(program, self.differentiated)
        for name, last in last_readers(program, staging, names).items():
            made, nbytes = staging.levels[name], nodes[name].nbytes
            flowing[made + 1 : last + 1] += nbytes
            taken[made : last + 1] += nbytes
            taken[made] += nbytes
        term = "gradients of the image and of promoted values"
        return LevelBytes.of(num_levels, (term, flowing)), LevelBytes.of(num_levels, (term, taken))

    def _always(self, num_levels: int) -> tuple[tuple[str, Ints], ...]:
        """The terms that are the same at every moment."""
        return (
            (RUN_TIME, np.full(num_levels, self.backend.runtime_bytes)),
            (HELD, np.full(num_levels, self.reading.held)),
        )

    def _whole_image(self, program: Program, levels: Mapping[str, int]) -> Ints:
        """By level: bytes of reading an image as a whole, for operators on whole maps."""
        nbytes = np.zeros(len(self.num_kernels), np.int64)
        for node in program.nodes.values():
            if node.kind is Kind.GATHER and (read := node.operands[0]) in program.images:
                transient = self.reading.of_map(read, program.nodes[read].size).transient
                nbytes[levels[node.name]] = max(nbytes[levels[node.name]], transient)
        return nbytes


def _num_kernels(program: Program, staging: Staging, num_levels: int) -> Ints:
    """By level: number of convolutions among its global values."""
    found = np.zeros(num_levels, np.int64)
    for level, names in staging.segments.items():
        routines = (cost_of(program.nodes[name].target).routine for name in names)
        found[level] = sum(routine is Routine.CONVOLUTION for routine in routines)
    return found


def with_gradient_maps(program: Program, differentiated: Collection[str]) -> frozenset[str]:
    """The image and the values promoted to maps, as far as they have gradients."""
    promoted = (node.name for node in program.nodes.values() if node.kind is Kind.PROMOTED)
    return frozenset((program.image, *promoted)).intersection(differentiated)


def last_readers(program: Program, staging: Staging, names: Collection[str]) -> dict[str, int]:
    """The last level that reads each of the maps ``names``."""
    if not names:
        return {}
    reads = [(stage.level, name) for stage in staging.stages for name in stage.inputs if name in names]
    gathers = (node for node in program.nodes.values() if node.kind is Kind.GATHER)
    reads += [(staging.levels[n.name], n.operands[0]) for n in gathers if n.operands[0] in names]
    return {name: level for level, name in sorted(reads)}


def _readers_elsewhere(program: Program, levels: Mapping[str, int]) -> dict[str, set[Kind]]:
    """Global values that maps or other segments read, each with the kinds of these readers."""
    nodes, found = program.nodes, dict[str, set[Kind]]()
    for node in nodes.values():
        for name in node.operands:
            is_elsewhere = node.kind is not Kind.GLOBAL or levels[node.name] != levels[name]
            if nodes[name].kind is Kind.GLOBAL and is_elsewhere:
                found.setdefault(name, set()).add(node.kind)
    return found


def _states_by_level(
    program: Program, levels: Mapping[str, int], differentiated: Collection[str], num_levels: int
) -> Ints:
    """Bytes of parameter gradients, by the level of a parameter's last reader, which first gives it one."""
    last: dict[str, int] = {}
    for node in program.nodes.values():
        for name in node.operands:
            if name in program.states and name in differentiated:
                last[name] = max(last.get(name, 0), levels[node.name])
    states = np.zeros(num_levels, np.int64)
    for name, level in last.items():
        states[level] += program.nodes[name].tensor.gradient_bytes
    return states
