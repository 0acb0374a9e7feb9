"""One run of a plan: the states that its program reads, its stores and its execution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from torch import Tensor

from streamcnn.ceiling.device import Ceiling
from streamcnn.data.map_reader import MapReader
from streamcnn.data.reader import BatchReader
from streamcnn.execution.eager import compute_eagerly
from streamcnn.execution.executor import Execution, Observer, PassHooks
from streamcnn.plan.plan import PassPart, Plan, StepShape
from streamcnn.runtime.pass_stores import PassStores, check_disk
from streamcnn.runtime.plan_cache import Planned
from streamcnn.runtime.report import Report
from streamcnn.stores import SpareFiles, SparePinned


class PassOwner(Protocol):
    """The model to which a pass reports, and its options."""

    budget: int | None
    spill: Path | None
    compiles: bool
    last_report: Report | None
    observer: Observer | None

    @property
    def spare_files(self) -> SpareFiles:
        """Files of earlier passes, for maps that this pass spills."""

    @property
    def spare_pinned(self) -> SparePinned:
        """Pinned memory of earlier passes, for maps that this pass offloads to host RAM."""


class PlanRun:
    """One run of a plan; a pass that is begun again makes another one.

    Parameters
    ----------
    planned
        The program and its plan.
    reader, maps
        Readers of the images, and of maps that are read by regions beside them, by key.
    tensors
        Parameters, buffers and further arguments by key.
    owner
        The model.
    ceiling
        Enforces the budget of the pass.

    Raises
    ------
    PlanDoesNotFit
        If the plan spills more than the disk has room for.
    """

    def __init__(
        self,
        planned: Planned,
        reader: BatchReader,
        maps: Mapping[str, MapReader],
        tensors: Mapping[str, Tensor],
        owner: PassOwner,
        ceiling: Ceiling,
    ) -> None:
        program, plan, spares = planned.program, planned.plan, owner.spare_files
        check_disk(plan, spares)
        self.planned = planned
        self.program, self.plan = program, plan
        self.is_trusting = ceiling.counts_code and bool(planned.carried_out)
        """Whether steps that have run before are assumed not to compile code again."""
        self.states = {name: tensors[key] for name, key in program.states.items()}
        """Parameters, buffers, further arguments and constants by node name."""
        self.states.update(program.constants)
        self.leaf_states = tuple(name for name in program.states if name in plan.differentiated)
        """States whose gradients the backward pass gives."""
        self.stores = PassStores(spares, owner.spare_pinned, reader.device, zeroed=plan.kept_bytes is None)
        self.execution = Execution(
            program,
            plan,
            self.states,
            {program.image: reader, **{name: maps[key] for name, key in program.maps.items()}},
            self.stores.open,
            transfers=self.stores.transfers,
            steps=planned.steps,
            make_compute=planned.compiled.steps if owner.compiles else compute_eagerly,
            runner=planned.compiled.segments if owner.compiles else None,
            hooks=PassHooks(
                before_part=_keeping(ceiling, plan),
                after_step=_checked(ceiling, planned.carried_out),
                observer=owner.observer,
            ),
        )

    @property
    def kept_at_first(self) -> int | None:
        """Bytes of tensors and free blocks before the first phase, when images are opened."""
        known = self.plan.kept_bytes
        if known is None:
            return None
        return min(nbytes for (kind, _), nbytes in known.items() if kind in ("read", "segment forward"))

    def close(self) -> None:
        """Free all stores and their folder, even if one of these fails."""
        # Called in reverse: the stores before their folder.
        with ExitStack() as closing:
            closing.callback(self.stores.close)
            closing.callback(self.execution.close)


def _keeping(ceiling: Ceiling, plan: Plan) -> Callable[[PassPart], None]:
    """A function to call before a part of a pass: it keeps as many free blocks as the part leaves room for.

    It has no reference to the pass, so that the pass can be freed.
    """

    def keep(part: PassPart) -> None:
        if plan.kept_bytes is not None:
            ceiling.keep_blocks(plan.kept_bytes[part])

    return keep


def _checked(ceiling: Ceiling, carried_out: set[StepShape]) -> Callable[[StepShape], None]:
    """A function to call after a step: it checks the ceiling. It has no reference to the pass either."""

    def after_step(shape: StepShape) -> None:
        ceiling.check(compiled=shape not in carried_out)
        carried_out.add(shape)

    return after_step
