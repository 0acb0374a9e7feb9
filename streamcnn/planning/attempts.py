"""Attempts at a plan: for one resident tail each, the program is staged in several ways and searched."""

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
"""Input pixels of halo above which a stretch without a barrier is split: the values that are tried."""
HALO_SHARE = 0.25
"""The halo above which a stretch is split where a tile is given, as a share of the tile's shorter edge."""

Retrace = Callable[[str | None], Program]
"""Returns the program with everything from the named captured call on resident; ``None`` for no tail."""


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """The search over one program and the solution it found."""

    search: Search
    solution: Solution
    tail: Tail | None

    @property
    def seconds(self) -> float:
        """Projected time with the tail's, without operators that run on whole maps in any plan."""
        return self.solution.seconds + (self.tail.seconds if self.tail else 0.0)

    @property
    def rank(self) -> tuple[bool, int, float]:
        """Sort key, smaller is better: attempts that fit by time, others by bytes."""
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
        """The ways to tile the program with ``tail``; those of ``known`` are reused where they hold."""
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
            Upper bound in bytes, used if there is a ceiling and it is higher.
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
