"""Tiling candidates: the ways to tile one stage, each with its projected time and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from streamcnn.graph.program import Program
from streamcnn.plan.hardware import HardwareProfile
from streamcnn.plan.reading import NO_READING, BatchCost
from streamcnn.planning.backends import Backend
from streamcnn.planning.cost_model import (
    MapTraffic,
    StageTime,
    Work,
    all_works,
    stage_time,
    tile_traffic,
    works_on_tiles,
)
from streamcnn.planning.overlapping import OnTheWay, on_the_way
from streamcnn.planning.staging import Stage, is_differentiated
from streamcnn.planning.step_bytes import overhead_terms, steps, total_bytes
from streamcnn.planning.tiling import Outline, TileCounts, TiledStage, grid, most_parts, tile_stage

TILE_EDGES = (16384, 8192, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32)
"""Tile edges that are tried, in input pixels."""
FINE_BYTES = 2**22
"""Once a step takes no more than this beside the backend's bytes, no smaller tiles are tried: they would save
nothing."""

FEW_BANDS = (2, 3)
"""Numbers of bands that are tried in any case; further ones equal the numbers of square tiles."""
LEAST_ROWS = 256
"""Input pixels: if bands would be lower than this, square tiles are tried too, since low bands' halos cost
more."""


@dataclass(frozen=True, slots=True, eq=False)
class TilingCandidate:
    """One way to tile a stage."""

    tiled: TiledStage
    time: StageTime
    forward: int
    """Bytes of a forward step."""
    backward: int
    """Bytes of a backward step; 0 if there is none."""
    reusable: int
    """Bytes of a step in blocks that may be kept for reuse when they are freed, in the worse direction."""
    moved: Mapping[str, MapTraffic]
    """Traffic of all tiles with each stored input; of the maps that they store, only the transfers."""
    on_the_way: Mapping[str, OnTheWay]
    """Bytes of each map on the way while a tile is computed, if moving tiles overlaps with computing."""

    @property
    def nbytes(self) -> int:
        """Bytes of the larger step."""
        return max(self.forward, self.backward)


class TilingCandidates:
    """All ways to tile the stages of a program, each computed once."""

    def __init__(
        self,
        program: Program,
        differentiated: frozenset[str],
        hardware: HardwareProfile,
        tile: tuple[int, int] | None,
        backend: Backend,
        known: TilingCandidates | None = None,
        *,
        reading: BatchCost = NO_READING,
    ) -> None:
        self.program = program
        self.differentiated = differentiated
        self.hardware = hardware
        self.backend = backend
        self.reading = reading
        self.works: Mapping[str, Work] = all_works(program)
        self.works_on_tiles = works_on_tiles(program, self.works, backend)
        self._tile = tile
        self._known: dict[Stage, tuple[TilingCandidate, ...]] = {} if known is None else dict(known._known)

    def of(self, stage: Stage) -> tuple[TilingCandidate, ...]:
        """The ways to tile ``stage``, the coarsest first."""
        found = self._known.get(stage)
        if found is None or not self._is_same(found[0].tiled.outline):
            found = self._known[stage] = tuple(self._all(Outline.of(self.program, stage)))
        return found

    def _is_same(self, outline: Outline) -> bool:
        """Whether another program's outline of this stage holds here, because its nodes are the same."""
        names = (*outline.stage.nodes, *outline.stage.inputs)
        return all(outline.program.nodes[name] is self.program.nodes[name] for name in names)

    def _all(self, outline: Outline) -> Iterator[TilingCandidate]:
        # The backend's bytes are the same for smaller tiles.
        fine = FINE_BYTES + total_bytes(overhead_terms(outline, self.backend, backward=self._visits(outline)))
        grids = list(dict.fromkeys(self._grids(outline)))
        for index, tiled in enumerate(tile_stage(outline, *grids), start=1):
            if tiled.most_elements > self.backend.most_elements and index < len(grids):
                continue
            tiling = self._tiling(tiled)
            yield tiling
            if tiling.nbytes <= fine:
                return

    def _grids(self, outline: Outline) -> Iterator[TileCounts]:
        """Grids of square tiles, each preceded by as many bands of full rows; or the bands alone.

        Reading and writing a band moves few long runs of memory. A stage that reads an image gets no bands,
        since images are stored in chunks, which bands would read more than once.
        """
        has_bands = self._tile is None and not set(self.program.images).intersection(outline.stage.inputs)
        most_bands = most_parts(outline)[0] if has_bands else 1
        height = self.program.nodes[self.program.image].size[0]
        before = 0
        for tile in self._tiles():
            rows, cols = grid(outline, tile)
            num_tiles = rows * cols
            yield from ((n, 1) for n in (*FEW_BANDS, num_tiles) if before < n <= min(num_tiles, most_bands))
            is_preferred = self.backend.prefers_bands and height >= num_tiles * LEAST_ROWS
            if num_tiles > most_bands or not is_preferred:
                yield rows, cols
            before = num_tiles

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

    def _tiling(self, tiled: TiledStage) -> TilingCandidate:
        backward = self._visits(tiled.outline)
        forward, after = steps(tiled, self.backend, self.reading, backward=backward)
        return TilingCandidate(
            tiled,
            time=stage_time(tiled, self.works_on_tiles, self.hardware, self.backend, backward=backward),
            forward=forward.nbytes,
            backward=after.nbytes if after else 0,
            reusable=max(forward.reusable, after.reusable if after else 0),
            moved=tile_traffic(tiled, backward=backward),
            on_the_way=on_the_way(tiled),
        )
