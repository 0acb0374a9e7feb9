"""The plan: everything that is decided about a pass, as frozen data.

It is the only message from planning to execution. Names are those of the program's nodes; sizes are bytes;
nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from streamcnn.errors import PlanDoesNotFit
from streamcnn.geometry.regions import Region
from streamcnn.plan.explain import explain_plan
from streamcnn.plan.storage import OUTPUTS, MemoryTerm, StorePlan, Tier
from streamcnn.plan.stored_bytes import StoredBytes
from streamcnn.plan.tiles import AxisKind, AxisStep
from streamcnn.support.units import format_bytes

StepShape = tuple[str, str, int, int, int]
"""The shape of a step: ``"phase"`` or ``"segment"``, direction, level, and the tile's shape along rows and
along columns. Libraries compile their code once for each."""
PassPart = tuple[str, int]
"""A part of a pass: ``"forward"``, ``"backward"`` or ``"again"`` with the level of a phase;
``"segment forward"`` or ``"segment backward"`` with that of a segment; ``("read", 0)``, the first read of
images that are decoded whole."""
TileKind = tuple[int, int]
"""A tile's kind along rows and along columns: what is computed is the same for all tiles of a kind."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of local operators between barriers, carried out tile by tile."""

    level: int
    nodes: tuple[str, ...]
    """Local operators to run, in order."""
    inputs: tuple[str, ...]
    """Maps read from stores."""
    stored: tuple[str, ...]
    """Maps written to stores."""
    reductions: tuple[str, ...]
    """Reductions fed by this phase."""
    rows: tuple[AxisStep, ...]
    cols: tuple[AxisStep, ...]
    row_kinds: tuple[AxisKind, ...]
    col_kinds: tuple[AxisKind, ...]
    releases: Mapping[str, tuple[str, ...]]
    """For each operator, the values that nothing after it reads."""
    consumed: frozenset[str]
    """Operators whose value another operator of the phase reads."""
    skipped: tuple[str, ...]
    """Convolutions that the backward pass need not compute again, since only their stored value is used."""
    in_place: frozenset[str]
    """Operators that overwrite their first operand, which nothing else reads."""
    differentiated: bool
    """Whether the backward pass visits the phase."""
    halo: tuple[int, int]
    """The most rows and columns of an input that a tile needs beyond its even share."""

    @property
    def num_tiles(self) -> int:
        """Steps per pass over the phase."""
        return len(self.rows) * len(self.cols)

    def kind(self, row: int, col: int) -> TileKind:
        """The kind of tile (row, col)."""
        return self.rows[row].kind, self.cols[col].kind

    def shape(self, direction: str, row: int, col: int) -> StepShape:
        """The shape of tile (row, col) as a step in ``direction``."""
        return "phase", direction, self.level, self.rows[row].shape, self.cols[col].shape

    def own(self, row: int, col: int, name: str) -> Region:
        """The part of output ``name`` that tile (row, col) is responsible for."""
        return Region(self.rows[row].own[name], self.cols[col].own[name])

    def needed(self, row: int, col: int, name: str) -> Region:
        """The part of ``name`` that tile (row, col) computes or reads."""
        return Region(self.rows[row].needed[name], self.cols[col].needed[name])


@dataclass(frozen=True, slots=True)
class Segment:
    """Global values computed at one level, after the phase of that level."""

    level: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a pass over images of one shape; see :meth:`explain`."""

    image_shape: tuple[int, int, int, int]
    dtype: str
    training: bool
    tile: tuple[int, int]
    """Largest extents (h, w) of a tile in input pixels: those asked for, or else the first phase's."""
    phases: tuple[Phase, ...]
    rematerialised: Mapping[int, tuple[Phase, ...]]
    """By level: phases that run again before its backward phase, in this order, to rematerialise maps."""
    segments: tuple[Segment, ...]
    stores: Mapping[str, StorePlan]
    levels: Mapping[str, int]
    """Level of every node of the program."""
    differentiated: frozenset[str]
    """Nodes whose gradient is wanted or passed on."""
    budget: int | None
    reuses_blocks: bool | None
    """Whether freed blocks are kept for reuse, which is faster and wastes memory; None where the device's
    allocator leaves no choice."""
    kept_bytes: Mapping[PassPart, int] | None
    """Bytes that tensors and kept blocks may take together in each part of a pass; None where the device's
    own allocator decides that."""
    terms: tuple[MemoryTerm, ...]
    """Projected bytes of the worst step, term by term."""
    worst: str
    """The step that needs most memory."""
    worst_operator: str
    """The operator at which that step holds most memory, with its place in the user's model."""
    plain_bytes: int
    """Projected peak of plain PyTorch on the whole image at once."""
    projected_seconds: float
    """Projected time of a forward pass and, if the plan trains, its backward pass."""
    plain_seconds: float
    """The projected time of plain PyTorch on the whole image at once, if there were memory for it."""
    recomputation: float
    """Ratio of floating-point operations to those of plain PyTorch: 1 where nothing is computed twice."""
    num_resident: int
    """Number of operators in the resident tail, which run on whole maps after the last tile."""
    overlapped: frozenset[PassPart] = frozenset()
    """Parts of the pass that move tiles to and from other tiers while they compute others."""
    trailing: frozenset[PassPart] = frozenset()
    """Parts whose last tile may still be on its way to other tiers while the next phase begins."""
    leading: frozenset[PassPart] = frozenset()
    """Parts during whose last tile the inputs of the next phase's first tile come from other tiers."""
    image_held_bytes: int = 0
    """Bytes of the budget that images take as long as the pass needs them, such as a decoded PNG."""
    image_read_bytes: int = 0
    """Bytes on top of ``image_held_bytes`` while the largest region of the image is read."""
    residents: tuple[str, ...] = ()
    """Operators run on whole maps for want of a rule, with the reason."""
    limited_by: str = field(default="", compare=False)
    """The limit of the process, its control groups or the card that set ``budget`` below the user's own, and
    what to do about it; empty where ``budget`` is the user's."""

    @property
    def projected_bytes(self) -> int:
        """Projected peak in bytes: on a CPU above the baseline, on a GPU all that the process holds."""
        return sum(term.nbytes for term in self.terms)

    @property
    def fits(self) -> bool:
        """Whether the projected bytes stay within the budget."""
        return self.budget is None or self.projected_bytes <= self.budget

    def bytes_on(self, tier: Tier) -> int:
        """The most bytes of stored maps and gradient maps that are in ``tier`` at one time."""
        return StoredBytes(self.stores, self.levels, tier).most

    @property
    def digest(self) -> str:
        """A short fingerprint: equal plans have equal digests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def validate(self) -> None:
        """Check that the plan fits.

        Raises
        ------
        PlanDoesNotFit
            If it does not, naming the worst step, its largest terms and what to change.
        """
        if self.fits:
            return
        assert self.budget is not None
        largest = sorted(self.terms, key=lambda term: -term.nbytes)[:3]
        named = ", ".join(f"{term.name} {format_bytes(term.nbytes)}" for term in largest)
        needed, beyond = self.projected_bytes, self.projected_bytes - self.budget
        advice = f"Raise budget= to at least {needed} bytes ({format_bytes(needed)}),"
        if self.limited_by:
            advice = f"A larger budget= does not help: {self.limited_by}. Or"
        if largest[0].name == OUTPUTS:
            advice = (
                "The loss has the model's result whole: stream it with model.streamed_loss, as "
                f"--task segmentation does. Or: {advice[0].lower()}{advice[1:]}"
            )
        raise PlanDoesNotFit(
            f"no plan for an image of shape {self.image_shape} fits in {format_bytes(self.budget)}: the "
            f"smallest needs {format_bytes(beyond)} more, in {self.worst}, at {self.worst_operator}, with "
            f"tiles of {self.tile[0]}x{self.tile[1]} pixels (largest terms: {named}). {advice} leave tile= "
            "to the planner, or use a smaller batch, a narrower model or fewer resident operators."
        )

    def explain(self) -> str:
        """The plan in words, one line per phase."""
        return explain_plan(self)

    def to_json(self) -> str:
        """The plan as one JSON object: sizes in bytes, without the tiles' intervals."""
        fields = {
            "image_shape": list(self.image_shape),
            "dtype": self.dtype,
            "training": self.training,
            "tile": list(self.tile),
            "budget": self.budget,
            **({} if self.reuses_blocks is None else {"reuses_blocks": self.reuses_blocks}),
            **({} if self.kept_bytes is None else {"kept_bytes": _by_words(self.kept_bytes)}),
            "projected_bytes": self.projected_bytes,
            "plain_bytes": self.plain_bytes,
            "worst": self.worst,
            "worst_operator": self.worst_operator,
            "projected_seconds": self.projected_seconds,
            "plain_seconds": self.plain_seconds,
            "recomputation": self.recomputation,
            "bytes_on": {tier.value: self.bytes_on(tier) for tier in Tier},
            "terms": {term.name: term.nbytes for term in self.terms},
            "image_held_bytes": self.image_held_bytes,
            "image_read_bytes": self.image_read_bytes,
            "num_resident": self.num_resident,
            "residents": list(self.residents),
            **{
                name: sorted(map(_in_words, parts))
                for name in ("overlapped", "trailing", "leading")
                if (parts := getattr(self, name))
            },
            "stores": {name: asdict(store) for name, store in self.stores.items()},
            "phases": [_phase_as_json(phase) for phase in self.phases],
            "rematerialised": {
                level: [_phase_as_json(phase) for phase in phases]
                for level, phases in self.rematerialised.items()
            },
        }
        return json.dumps(fields)


def _phase_as_json(phase: Phase) -> dict[str, object]:
    return {
        "level": phase.level,
        "tiles": [len(phase.rows), len(phase.cols)],
        "halo": list(phase.halo),
        "nodes": list(phase.nodes),
        "inputs": list(phase.inputs),
        "stored": list(phase.stored),
        "reductions": list(phase.reductions),
    }


def _by_words(kept_bytes: Mapping[PassPart, int]) -> dict[str, int]:
    return {_in_words(part): nbytes for part, nbytes in kept_bytes.items()}


def _in_words(part: PassPart) -> str:
    """A part of a pass as a key in JSON."""
    kind, level = part
    return f"{kind} {level}"
