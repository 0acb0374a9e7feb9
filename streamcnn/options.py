"""The ways to cut one stage into tiles, each with its projected time and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from streamcnn.cost_model import StageTime, Traffic, Work, all_works, input_traffic, stage_time
from streamcnn.libraries import Libraries
from streamcnn.memory_model import is_differentiated, library_terms, steps
from streamcnn.program import Program
from streamcnn.rates import Rates
from streamcnn.reading import NO_READING, BatchCost
from streamcnn.small_bytes import total_bytes
from streamcnn.staging import Stage
from streamcnn.tiling import Outline, Parts, TiledStage, cut, grid

TILE_EDGES = (16384, 8192, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32)
"""Tile edges that are tried, in input pixels."""
FINE_BYTES = 2**22
"""No smaller tiles are tried once a step takes no more than this beside what libraries take: they would
save nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One way to cut a stage."""

    tiled: TiledStage
    time: StageTime
    forward: int
    """Bytes of a forward step."""
    backward: int
    """Bytes of a backward step; 0 if there is none."""
    heap: int
    """Bytes of the larger one in blocks that the C library may keep when they are freed."""
    moved: Mapping[str, Traffic]
    """What all tiles move of each stored input."""

    @property
    def nbytes(self) -> int:
        """Bytes of the larger step."""
        return max(self.forward, self.backward)


class Options:
    """All ways to cut the stages of a program, worked out once each."""

    def __init__(
        self,
        program: Program,
        differentiated: frozenset[str],
        rates: Rates,
        tile: tuple[int, int] | None,
        libraries: Libraries,
        known: Options | None = None,
        *,
        reading: BatchCost = NO_READING,
    ) -> None:
        self.program = program
        self.differentiated = differentiated
        self.rates = rates
        self.libraries = libraries
        self.reading = reading
        self.works: Mapping[str, Work] = all_works(program)
        self._tile = tile
        self._known: dict[Stage, tuple[Option, ...]] = {} if known is None else dict(known._known)

    def of(self, stage: Stage) -> tuple[Option, ...]:
        """The ways to cut ``stage``, the coarsest first."""
        found = self._known.get(stage)
        if found is None or not self._is_same(found[0].tiled.outline):
            found = self._known[stage] = tuple(self._all(Outline.of(self.program, stage)))
        return found

    def _is_same(self, outline: Outline) -> bool:
        """Whether an outline of another program's stage, which begins alike, is true here."""
        names = (*outline.stage.nodes, *outline.stage.inputs)
        return all(outline.program.nodes[name] is self.program.nodes[name] for name in names)

    def _all(self, outline: Outline) -> Iterator[Option]:
        # Smaller tiles take no less of that.
        fine = FINE_BYTES + total_bytes(
            library_terms(outline, self.libraries, backward=self._visits(outline))
        )
        for parts in dict.fromkeys(grid(outline, tile) for tile in self._tiles()):
            option = self._option(outline, parts)
            yield option
            if option.nbytes <= fine:
                return

    def _visits(self, outline: Outline) -> bool:
        """Whether the backward pass visits the stage."""
        return is_differentiated(outline.stage, self.differentiated)

    def _tiles(self) -> Iterator[tuple[int, int]]:
        height, width = self.program.nodes[self.program.image].size
        if self._tile is not None:
            yield min(self._tile[0], height), min(self._tile[1], width)
            return
        yield height, width
        for edge in TILE_EDGES:
            if edge < max(height, width):
                yield min(edge, height), min(edge, width)

    def _option(self, outline: Outline, parts: Parts) -> Option:
        tiled = cut(outline, parts)
        backward = self._visits(outline)
        forward, after = steps(tiled, self.libraries, self.reading, backward=backward)
        return Option(
            tiled,
            time=stage_time(tiled, self.works, self.rates, backward=backward),
            forward=forward.nbytes,
            backward=after.nbytes if after else 0,
            heap=max(forward.heap, after.heap if after else 0),
            moved=input_traffic(tiled, backward=backward),
        )
