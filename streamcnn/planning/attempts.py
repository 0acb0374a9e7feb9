"""Attempts at a plan: the program staged in several ways, and searched, for one resident tail each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from streamcnn.graph.program import Program, differentiated
from streamcnn.planning.candidates import TilingCandidates
from streamcnn.planning.search import Search, Solution
from streamcnn.planning.spec import Machine, PassSpec
from streamcnn.planning.split_points import choose_split_points
from streamcnn.planning.staging import Staging, divide
from streamcnn.planning.tails import Tail

DEFAULT_EDGE = 512
"""Tile edge where neither a budget nor a tile is given."""
HALO_LIMITS = (16, 64, 128, 256, 512)
"""Input pixels of halo at which a stretch without a barrier is split: the values that are tried."""
HALO_SHARE = 0.25
"""The same as a share of the tile's edge, where that is given."""

Retrace = Callable[[str | None], Program]
"""The program with everything from the named captured call on resident; ``None`` for no tail."""


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """The search over one program and what it found."""

    search: Search
    solution: Solution
    tail: Tail | None

    @property
    def seconds(self) -> float:
        """Projected time, the tail's included; what runs on whole maps in any case is left out."""
        return self.solution.seconds + (self.tail.seconds if self.tail else 0.0)

    @property
    def rank(self) -> tuple[bool, int, float]:
        """Smaller is better: what fits by time, what does not by bytes."""
        fits = self.solution.fits
        return not fits, self.solution.excess, self.seconds if fits else self.solution.nbytes


@dataclass(frozen=True, slots=True)
class Attempts:
    """Makes attempts at the plan of one pass."""

    retrace: Retrace
    spec: PassSpec
    machine: Machine

    @property
    def room(self) -> int | None:
        """Bytes that a plan may take; None if there is no ceiling."""
        return self.spec.room(self.machine.reserved)

    def tilings(self, tail: Tail | None, known: TilingCandidates | None = None) -> TilingCandidates:
        """The ways to tile the program with such a tail; ``known`` are those of another one."""
        program = self.retrace(tail.start if tail else None)
        return TilingCandidates(
            program,
            differentiated(program, self.spec.leaves & program.nodes.keys()),
            self.machine.hardware,
            self._tile,
            self.machine.backend,
            known,
            reading=self.spec.reading,
        )

    def make(self, tail: Tail | None, untailed: TilingCandidates, most: int | None = None) -> Attempt:
        """The best solution that only offloads.

        Parameters
        ----------
        untailed
            The ways to tile the program without a tail.
        most
            Bytes that it may take, if there is a ceiling and that is higher.
        """
        tilings = self.tilings(tail, untailed) if tail else untailed
        room = self.room
        if room is not None and most is not None:
            room = min(room, most)
        search = Search(tilings, room, self.machine.offload_tiers)
        return Attempt(search, search.best(_stagings(tilings.program, self._tile)), tail)

    @property
    def _tile(self) -> tuple[int, int] | None:
        if self.spec.tile is None and self.room is None:
            return DEFAULT_EDGE, DEFAULT_EDGE
        return self.spec.tile


def _stagings(program: Program, tile: tuple[int, int] | None) -> Iterator[Staging]:
    """The program staged with fewer and more split points, each way once."""
    limits = HALO_LIMITS if tile is None else (HALO_SHARE * min(tile),)
    for split_points in dict.fromkeys(choose_split_points(program, limit) for limit in limits):
        yield divide(program, split_points)
