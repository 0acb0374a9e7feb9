"""One streamed pass: an execution under its ceiling, in both directions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from streamcnn.ceiling.device import Limit, ceiling_for
from streamcnn.ceiling.refusals import is_out_of_memory
from streamcnn.ceiling.rooms import Room
from streamcnn.data.reader import BatchReader
from streamcnn.data.source_batch import SourceBatch
from streamcnn.errors import BudgetExceeded
from streamcnn.graph.costs import meets_others
from streamcnn.graph.program import Ref, refs_in
from streamcnn.runtime.pass_meter import PassMeter
from streamcnn.runtime.plan_cache import Captured, Planned
from streamcnn.runtime.plan_run import PassOwner, PlanRun
from streamcnn.runtime.random_state import RandomState
from streamcnn.runtime.refused_memory import PROFILED, TOGETHER, refusal
from streamcnn.runtime.report import Report
from streamcnn.runtime.smaller_plans import SmallerPlans
from streamcnn.runtime.state_copies import assign, copied
from streamcnn.stores import Store
from streamcnn.support.interrupts import cleaning_up, undoing

Keep = Callable[[Store], Tensor]
"""Reads a stored result, and returns a stand-in for it."""


_waiting: WeakValueDictionary[int, Pass] = WeakValueDictionary()
"""Forward passes that wait for their backward pass, in all threads."""


def _all_waiting() -> list[Pass]:
    # Iteration over the dictionary itself would fail where another thread's pass begins or ends meanwhile.
    return [run for ref in _waiting.valuerefs() if (run := ref()) is not None]


class Pass:
    """One pass: an execution under its ceiling, and the report of both directions.

    A direction that is refused memory is begun again with smaller tiles, with the same result: until it
    succeeds, it changes nothing outside. A backward pass needs the stored maps of its own plan, so the
    forward pass is repeated first, with the same random numbers.
    """

    def __init__(
        self,
        planned: Planned,
        reader: BatchReader,
        captured: Captured,
        owner: PassOwner,
        shrink: SmallerPlans,
        keep: Keep | None,
    ) -> None:
        self.owner = owner
        self.keep = keep
        self.known = captured.states
        """The caller's tensors by key: parameters, buffers and further arguments."""
        self.before: dict[str, Tensor] = {}
        """Copies of the states that the pass changes, from which it reads, also when it recomputes."""
        self.is_spent = False
        """Whether a backward pass has consumed the stored maps."""
        self.reader = reader
        self.maps = captured.maps
        """Readers of maps that are read by regions beside the image, by key."""
        self.batches: tuple[SourceBatch, ...] = (reader, *self.maps.values())
        self.shrink = shrink
        # Before the baseline: threads that read images, with their large stacks, are no part of the pass.
        for batch in self.batches:
            batch.start()
        self.waiting_bytes = sum(other.current.execution.held_bytes for other in _all_waiting())
        # Plans count images as if they were still to be decoded, so bytes that they hold already count too.
        held = sum(batch.held_bytes for batch in self.batches)
        self.ceiling = ceiling_for(reader.device, counted=held)
        self.outputs = planned.program.outputs
        self.random_state = RandomState.now(reader.device)
        """The state from which a pass that is begun again draws the same numbers."""
        self.meter = PassMeter()
        self.current: PlanRun = self._run_of(planned)
        """The present run of a plan: another one once the pass is begun again."""

    def _run_of(self, planned: Planned) -> PlanRun:
        """A run of a plan, ready to begin."""
        program = planned.program
        read = set(program.states.values())
        changing = [key for key in program.updates if key in read and key not in self.before]
        self.before.update(copied({key: self.known[key] for key in changing}))
        present = {**self.known, **self.before}
        return PlanRun(planned, self.reader, self.maps, present, self.owner, self.ceiling)

    @property
    def anchors(self) -> list[Tensor]:
        """The user's own tensors whose gradients the backward pass gives, in order."""
        return [self.known[self.current.program.states[name]] for name in self.current.leaf_states]

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs, as the first plan's program names them."""
        return refs_in(self.outputs)

    @property
    def meets_others(self) -> bool:
        """Whether processes wait for each other during the pass."""
        return any(meets_others(node.target) for node in self.current.program.nodes.values())

    @property
    def present_names(self) -> dict[str, str]:
        """The outputs' present names, by their names in the first program: another tail renames nodes."""
        present = _positions(self.current.program.outputs)
        return dict(zip(_positions(self.outputs), present, strict=True))

    def forward(self) -> dict[str, Tensor]:
        """Run forward and, if that succeeds, update the module's buffers; return the outputs."""

        def undo() -> None:
            self.close()
            self.random_state.restore()

        return undoing(self._forward, undo)

    def _forward(self) -> dict[str, Tensor]:
        """Run a forward pass, and begin it again where it is refused memory."""
        while True:
            try:
                # Around the ceiling, which may find at its end that too much was held.
                values = self._limited("forward", self._run_forward)
                break
            except BudgetExceeded as error:
                self.random_state.restore()
                self._begin_again(error)
            # Only once the error is gone, since its traceback holds the tile's tensors.
            self.ceiling.empty_cache()
        self.shrink.keep()
        if self.keep is not None:
            stored = {name: self.keep(store) for name, store in self.current.execution.results.items()}
            values = {**values, **stored}
        present = self.present_names
        outputs = {name: values[present[name]] for name in self.output_names}
        if self.current.plan.training:
            _waiting[id(self)] = self
        else:
            self.close()
        # Last, so that nothing is left to be interrupted once the buffers have changed.
        return self.updated(values, outputs)

    def updated(self, values: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the states that the module changes their new values, all or none; return ``outputs``."""
        updates = self.current.program.updates
        unread = copied({q: self.known[q] for q in updates if q not in self.before})
        before = {q: unread[q] if q in unread else self.before[q] for q in updates}

        def give(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
            assign(self.known, found)
            return outputs

        new = {qualified: values[name] for qualified, name in updates.items()}
        return undoing(partial(give, new), partial(give, before))

    def backward(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the parameters and the image by node name, given those of the outputs.

        This may be called again; the forward pass is then repeated first.
        """
        return cleaning_up(partial(self._backward, gradients), self.close)

    def _backward(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a backward pass, and begin it again where it is refused memory."""
        repeat, self.is_spent = self.is_spent, True
        if repeat:
            self._restart(self.current.planned)
        while True:
            try:
                if repeat:
                    self._repeat_forward()
                found = self._limited("backward", partial(self._differentiate, gradients))
                self.shrink.keep()
                return found
            except BudgetExceeded as error:
                self._begin_again(error)
                repeat = True
            self.ceiling.empty_cache()

    def _differentiate(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.current.execution.backward(self._arriving(gradients))

    def _arriving(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs' gradients by present name, summed for outputs that share one."""
        found, present = dict[str, Tensor](), self.present_names
        for output, gradient in gradients.items():
            name = present[output]
            found[name] = found[name] + gradient if name in found else gradient
        return found

    def _begin_again(self, error: BudgetExceeded) -> None:
        """Begin again with smaller tiles, or raise ``error`` if there are none.

        If steps were trusted to compile no code, this begins with the same plan and counts code: libraries
        keep a limited number of kernels, and may have dropped some for another model's. If parts were
        compiled, it begins without them, since plans count bytes of single operators.
        """
        if self._why_last_try():
            raise error
        planned = self.current.planned
        as_before = self.current.is_trusting or planned.compiled.give_up()
        again = planned if as_before else self.shrink(planned.plan)
        planned.carried_out.clear()
        if again is None:
            raise error
        self._restart(again)
        self.meter.num_retries += 1
        self.meter.num_smaller_plans += not as_before

    def _why_last_try(self) -> str:
        """Why the pass is not begun again where it is refused memory; empty if it may be."""
        if self.meets_others:
            return TOGETHER
        # Smaller tiles mean more operators, and so more of the profiler's records.
        is_profiled = self.reader.device.type == "cpu" and torch._C._autograd._profiler_enabled()
        return PROFILED if is_profiled else ""

    def _restart(self, planned: Planned) -> None:
        """Prepare to run the pass once more."""
        before, self.current = self.current, self._run_of(planned)
        # The ambient autocast of a backward pass is not that of its forward pass.
        self.current.execution.autocast = before.execution.autocast
        assert self.current.leaf_states == before.leaf_states

    def _repeat_forward(self) -> None:
        """Run the forward pass once more for its stored maps, without changing buffers or random state."""
        present = RandomState.now(self.reader.device)

        def repeat() -> None:
            self.random_state.restore()
            with torch.enable_grad():
                self._limited("forward", self._run_forward)

        cleaning_up(repeat, present.restore)

    def _run_forward(self) -> dict[str, Tensor]:
        """Open images, which decodes those that are only decoded whole, and run the forward pass."""
        for batch in self.batches:
            batch.open()
        return self.current.execution.forward()

    def close(self) -> None:
        """Free all stores, their folder, and decoded images that no waiting pass reads, even if one fails."""
        _waiting.pop(id(self), None)
        used = [source for other in _all_waiting() for batch in other.batches for source in batch.sources]
        with ExitStack() as closing:
            closing.callback(self.current.close)
            for batch in self.batches:
                closing.callback(batch.release, but=used)

    def _limited(self, direction: str, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what ``run`` returns, with the budget enforced, memory measured and refusals explained."""
        start = time.perf_counter()
        plan = self.current.plan
        limit = self.ceiling.limit(
            plan.budget, reuse_heap=bool(plan.reuses_blocks), kept=self.current.kept_at_first
        )
        try:
            found = self._within(limit, run)
        except BaseException as error:
            is_limited = plan.budget is not None or self.ceiling.room is not None
            if is_limited and is_out_of_memory(error):
                # The pass may be begun again, and the bytes that it took by then are part of its peak.
                self.meter.note(limit)
                text = refusal(plan, direction, error, self._room(), why_last=self._why_last_try())
                raise BudgetExceeded(text) from error
            raise
        finally:
            self.meter.seconds += time.perf_counter() - start
        self.meter.note(limit)
        self.owner.last_report = self._report()
        return found

    def _within(self, limit: Limit, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Call ``run`` under a limit; if it fails or is interrupted, clean up both."""

        def in_block() -> dict[str, Tensor]:
            with limit:
                return run()

        def close() -> None:
            limit.close()
            self.close()
            # In case the disk is full.
            self.current.stores.spares.close()

        return undoing(in_block, close)

    def _room(self) -> Room | None:
        """The limit that leaves less than the user's budget, if one did."""
        room, budget = self.ceiling.room, self.owner.budget
        return room if room is not None and (budget is None or room.nbytes < budget) else None

    def _report(self) -> Report:
        return self.meter.report(
            self.current.plan,
            phases=tuple(self.current.execution.reports),
            baseline_bytes=self.ceiling.baseline_bytes,
            waiting_bytes=self.waiting_bytes,
            num_compiled=self.current.planned.compiled.num_parts if self.owner.compiles else None,
        )


def _positions(outputs: Any) -> list[str]:
    """The name at each place of a model's result; a value that is returned twice appears twice."""
    leaves = pytree.tree_leaves(outputs, is_leaf=lambda value: isinstance(value, Ref))
    return [leaf.name for leaf in leaves if isinstance(leaf, Ref)]
