"""Gather the inputs of a tile's computation, and scatter its outputs.

Only here do a tile's tensors meet stores, images and global values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from streamcnn.execution.combiner import Combiner
from streamcnn.execution.global_graph import GlobalGraph
from streamcnn.execution.maps import Maps
from streamcnn.execution.step import Computed, Input, Output, Sink, Source, Step
from streamcnn.geometry.regions import Region
from streamcnn.plan.plan import Phase, TileKind
from streamcnn.stores import Deferred, Incoming


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile of a phase."""

    phase: Phase
    row: int
    col: int

    @property
    def kind(self) -> TileKind:
        """The kind of the tile, which tiles computed alike share."""
        return self.phase.kind(self.row, self.col)

    def own(self, name: str) -> Region:
        """The part of an output that the tile is responsible for."""
        return self.phase.own(self.row, self.col, name)

    def needed(self, name: str) -> Region:
        """The region that the tile needs of a map."""
        return self.phase.needed(self.row, self.col, name)


class Exchange:
    """Gathers inputs of tiles and scatters their outputs, for one pass."""

    def __init__(self, maps: Maps, global_graph: GlobalGraph, combiner: Combiner) -> None:
        self._maps = maps
        self._global_graph = global_graph
        self._combiner = combiner
        self._cast: dict[str, Tensor] = {}
        """Global values in another type, for the tiles of a phase."""
        self._first: dict[tuple[str, Region], Incoming] = {}
        """Inputs of the next phase's first tile."""

    def gather(self, step: Step, tile: Tile, ahead: Sequence[Incoming] = ()) -> list[Tensor]:
        """The step's inputs for a tile, in a list that the caller may change; their memory may be a store's.

        ``ahead`` has the same inputs, if :meth:`prepare` was called for the tile.
        """
        if ahead:
            return [each.tile() for each in ahead]
        return [self._read(each, tile, step) for each in step.inputs]

    def prepare(self, step: Step, tile: Tile) -> list[Incoming]:
        """Prepare the step's inputs for a tile, to be read while the tile before it is computed."""
        return [self._incoming(each, tile, step) for each in step.inputs]

    def prepare_first(self, phase: Phase, names: Iterable[str]) -> list[Incoming]:
        """Prepare maps that a phase's first tile reads, while the last tile of the one before is computed."""
        tile = Tile(phase, 0, 0)
        parts = ((name, tile.needed(name)) for name in names)
        self._first = {(name, part): self._maps.reserve(name, part) for name, part in parts}
        return list(self._first.values())

    def _incoming(self, wanted: Input, tile: Tile, step: Step) -> Incoming:
        name = wanted.name
        match wanted.source:
            case Source.MAP:
                part = tile.needed(name)
                return self._first.pop((name, part), None) or self._maps.reserve(name, part)
            case Source.GRADIENT:
                return self._maps.reserve_gradient(name, tile.own(name))
            case Source.STORED:
                return self._maps.reserve(name, tile.own(name))
            case Source.VALUE | Source.TERM:
                return Deferred(partial(self._at_hand, wanted, step))

    def _read(self, wanted: Input, tile: Tile, step: Step) -> Tensor:
        if wanted.source in (Source.VALUE, Source.TERM):
            # Nearly all inputs: nothing is to be prepared.
            return self._at_hand(wanted, step)
        return self._incoming(wanted, tile, step).tile()

    def _at_hand(self, wanted: Input, step: Step) -> Tensor:
        """A global value, or a term of a gradient, which no tile has to be brought for."""
        if wanted.source is Source.VALUE:
            return self._value(wanted.name, step)
        return self._global_graph.gradient_terms[wanted.name][wanted.term]

    def _value(self, name: str, step: Step) -> Tensor:
        """A global value in the element type that a step takes."""
        value: Tensor = self._global_graph.values[name]
        if name not in step.casts:
            return value
        if name not in self._cast:
            self._cast[name] = value.to(step.casts[name])
        return self._cast[name]

    def scatter(self, step: Step, tile: Tile, outputs: Iterable[Computed]) -> None:
        """Write or combine a tile's outputs, each before the next one is asked for."""
        made = iter(outputs)
        for output in step.outputs:
            self._hand_on(output, tile, next(made))

    def _hand_on(self, output: Output, tile: Tile, value: Any) -> None:
        name = output.name
        match output.sink:
            case Sink.SHARE:
                self._maps.write(name, tile.own(name), value)
            case Sink.PARTIAL:
                self._combiner.merge(name, value)
            case Sink.VALUE_GRADIENT:
                self._combiner.add_value_gradient(name, value)
            case Sink.MAP_GRADIENT:
                assert output.part is not None
                self._combiner.add_map_gradient(name, _in_whole(output.part, tile.needed(name)), value)

    def end_phase(self) -> None:
        """Drop the cast values, which only the tiles of one phase need."""
        self._cast.clear()


def fetch(incoming: Iterable[Incoming]) -> None:
    """Begin to bring prepared inputs to the device."""
    for each in incoming:
        each.fetch()


def _in_whole(part: Region, needed: Region) -> Region:
    """Convert a part of a tile's needed region to positions of the whole map."""
    return Region(part.rows.shift(needed.rows.start), part.cols.shift(needed.cols.start))
