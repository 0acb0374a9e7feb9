"""One streamed pass: an execution under its ceiling, as one node of the user's autograd graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from streamcnn.ceiling.device import Ceiling, Limit, ceiling_for
from streamcnn.ceiling.refusals import is_out_of_memory
from streamcnn.data.reader import BatchReader
from streamcnn.errors import BudgetExceeded, PlanDoesNotFit
from streamcnn.executor import Execution, Observer
from streamcnn.plan import Home, Plan, StepKind
from streamcnn.planning import Planned
from streamcnn.program import Ref, refs_in
from streamcnn.report import Report
from streamcnn.stores import MemoryStore, SpillFolder, Store, StoreSpec, ZarrStore, free_bytes
from streamcnn.surroundings import saved_tensors_hooks_aside
from streamcnn.units import format_bytes


class Host(Protocol):
    """Whom a pass reports to, and where it may spill."""

    spill: Path | None
    last_report: Report | None
    observer: Observer | None


class Shrink(Protocol):
    """Plans a pass again that was refused memory."""

    def __call__(self, plan: Plan) -> Planned | None:
        """The same pass with smaller tiles; None if there is no such plan within the budget."""

    def keep(self) -> None:
        """What was planned last has gone through: later passes of the same kind are to begin with it."""


_waiting: WeakSet[Pass] = WeakSet()
"""Passes whose backward pass is still to come."""


class Pass:
    """One pass: an execution under its ceiling, and the report of both directions.

    A direction that is refused memory is begun again with smaller tiles, which gives the same result: until
    it succeeds, nothing outside has been changed. A backward pass needs the stored maps of its own tiles, so
    its forward pass is repeated first, with the random numbers that it had.
    """

    def __init__(
        self,
        planned: Planned,
        reader: BatchReader,
        states: Mapping[str, Tensor],
        host: Host,
        shrink: Shrink,
    ) -> None:
        self.host = host
        self.known = states
        self.before: dict[str, Tensor] = {}
        """Copies of the states that the pass changes: what it reads, now and when it computes again."""
        self.is_spent = False
        """Whether a backward pass has used the stored maps up."""
        self.reader = reader
        self.shrink = shrink
        # Before the baseline: threads that read images are no part of the pass, and their stacks are large.
        reader.start()
        self.execution: Execution
        self.waiting_bytes = sum(other.execution.held_bytes for other in _waiting)
        # What images hold already is planned for as if they were yet to be decoded, and counts as that.
        self.ceiling = ceiling_for(reader.device, counted=reader.held_bytes)
        self.outputs = planned.program.outputs
        self.random_state = _random_state(reader.device)
        self.seconds = 0.0
        self.num_retries = 0
        self.began = time.perf_counter()
        self.peak: int | None = None
        self.reading = "unknown"
        self.samples: list[tuple[float, int]] = []
        self._begin(planned)

    def _begin(self, planned: Planned) -> None:
        """Make ready to run a plan from its start."""
        self.planned = planned
        self.program, self.plan = planned.program, planned.plan
        # Some code is taken to be there: only on the CPU is it anything that memory is refused for.
        self.is_trusting = self.reader.device.type == "cpu" and bool(planned.compiled)
        read = set(self.program.states.values())
        for qualified in self.program.updates.keys() & read - self.before.keys():
            self.before[qualified] = self.known[qualified].detach().clone()
        present = {**self.known, **self.before}
        self.states = {name: present[qualified] for name, qualified in self.program.states.items()}
        self.states.update({name: c.to(self.reader.device) for name, c in self.program.constants.items()})
        self._present_names = dict(
            zip(_positions(self.outputs), _positions(self.program.outputs), strict=True)
        )
        self.leaf_states = tuple(name for name in self.program.states if name in self.plan.differentiated)
        _check_disk(self.plan, self.host.spill)
        self.stores = _Stores(self.host.spill, self.reader.device)
        self.execution = Execution(
            self.program,
            self.plan,
            self.states,
            self.reader,
            self.stores.open,
            after_step=_checked(self.ceiling, planned.compiled),
            observer=self.host.observer,
        )

    @property
    def anchors(self) -> list[Tensor]:
        """The user's own tensors whose gradients the backward pass gives, in order."""
        return [self.known[self.program.states[name]] for name in self.leaf_states]

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs, as the first plan's program names them."""
        return refs_in(self.outputs)

    def present_name(self, output: str) -> str:
        """An output's name in the present program: where another tail is resident, nodes have other names."""
        return self._present_names[output]

    def forward(self) -> dict[str, Tensor]:
        """Run forward and, if that succeeds, give the module's buffers their new values; the outputs."""
        while True:
            try:
                # Around the ceiling, which may find at its end that too much was held.
                with _random_state_kept(self.execution.device), self._ceiling("forward"):
                    self.reader.open()
                    values = self.execution.forward()
                break
            except BudgetExceeded as error:
                self._begin_again(error)
            # Not before the error is let go of: its traceback holds the tile's tensors.
            self.ceiling.give_back()
        self.shrink.keep()
        self._update(values)
        if self.plan.training:
            _waiting.add(self)
        else:
            self.close()
        return {name: values[self.present_name(name)] for name in self.output_names}

    def _update(self, values: Mapping[str, Tensor]) -> None:
        """Give the states that the module changes their new values."""
        with torch.no_grad():
            for qualified, name in self.program.updates.items():
                self.known[qualified].copy_(values[name])

    def backward(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by node name of the parameters and the image, given those of outputs.

        It may be called again: the forward pass is then repeated first.
        """
        repeat, self.is_spent = self.is_spent, True
        if repeat:
            self._restart(self.planned)
        try:
            while True:
                try:
                    if repeat:
                        self._repeat_forward()
                    with self._ceiling("backward"):
                        found = self.execution.backward(self._arriving(gradients))
                    self.shrink.keep()
                    return found
                except BudgetExceeded as error:
                    self._begin_again(error)
                    repeat = True
                self.ceiling.give_back()
        finally:
            self.close()

    def _arriving(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs' gradients by their present names, of which two outputs may share one."""
        found: dict[str, Tensor] = {}
        for output, gradient in gradients.items():
            name = self.present_name(output)
            found[name] = found[name] + gradient if name in found else gradient
        return found

    def _begin_again(self, error: BudgetExceeded) -> None:
        """Begin with smaller tiles, or raise ``error`` if there are none.

        If code was not looked for, begin as before, and look: libraries keep so much of it, and may have
        dropped some for another model's.
        """
        again = self.planned if self.is_trusting else self.shrink(self.plan)
        self.planned.compiled.clear()
        if again is None:
            raise error
        self._restart(again)
        self.num_retries += 1

    def _restart(self, planned: Planned) -> None:
        """Make ready to run the pass once more."""
        leaf_states, autocast = self.leaf_states, self.execution.autocast
        self._begin(planned)
        # The ambient autocast of a backward pass is not that of its forward pass.
        self.execution.autocast = autocast
        assert self.leaf_states == leaf_states

    def _repeat_forward(self) -> None:
        """The forward pass once more, for its stored maps: buffers and random state stay."""
        present = _random_state(self.reader.device)
        _set_random_state(self.random_state, self.reader.device)
        try:
            with self._ceiling("forward"), torch.enable_grad():
                self.reader.open()
                self.execution.forward()
        finally:
            _set_random_state(present, self.reader.device)

    def recomputed_from(self) -> list[Tensor]:
        """States without a gradient that the backward pass reads once more."""
        read = {
            operand
            for phase in self.plan.phases
            if phase.differentiated
            for name in phase.nodes
            for operand in self.program.nodes[name].operands
        }
        return [self.states[n] for n in self.program.states if n in read and n not in self.leaf_states]

    def close(self) -> None:
        """Free all stores and their folder, and the decoded images that no other pass waits with."""
        _waiting.discard(self)
        self.reader.release(but=[source for other in _waiting for source in other.reader.sources])
        self.execution.close()
        self.stores.close()

    @contextmanager
    def _ceiling(self, direction: str) -> Iterator[None]:
        """Enforce the budget, measure, and name the budget in an out-of-memory error."""
        start = time.perf_counter()
        limit = self.ceiling.limit(self.plan.budget, reuse_heap=self.plan.reuses_heap)
        try:
            with limit:
                yield
        except BaseException as error:
            self.close()
            if self.plan.budget is not None and is_out_of_memory(error):
                raise BudgetExceeded(_refusal(self.plan, direction, error)) from error
            raise
        finally:
            self.seconds += time.perf_counter() - start
        self._note(limit)

    def _note(self, limit: Limit) -> None:
        peak, at_most = limit.peak_bytes, limit.at_most_bytes
        if peak is not None and at_most is not None:
            # Also where the other direction's peak is larger, but samples may have missed one that was not.
            if self.peak is None or at_most > self.peak:
                self.reading = limit.reading
            self.peak = max(self.peak or 0, peak)
        self.samples.extend((when - self.began, nbytes) for when, nbytes in limit.samples)
        self.host.last_report = Report(
            budget=self.plan.budget,
            projected_bytes=self.plan.projected_bytes,
            measured_bytes=self.peak,
            reading=self.reading,
            seconds=self.seconds,
            phases=tuple(self.execution.reports),
            num_retries=self.num_retries,
            samples=tuple(self.samples),
            baseline_bytes=self.ceiling.baseline_bytes,
            waiting_bytes=self.waiting_bytes,
        )


def _refusal(plan: Plan, direction: str, error: BaseException) -> str:
    """What the user is told when memory was refused, or taken past the budget, and smaller tiles are none."""
    assert plan.budget is not None
    what = f"an allocation in the {direction} pass was refused: budget {format_bytes(plan.budget)}"
    if isinstance(error, BudgetExceeded):
        what = str(error)
    return (
        f"{what}, projected {format_bytes(plan.projected_bytes)} with tiles of "
        f"{plan.tile[0]}x{plan.tile[1]} pixels, and there is no plan with smaller ones. "
        "Nothing was changed; raise budget="
    )


def _check_disk(plan: Plan, spill: Path | None) -> None:
    """Refuse a plan that spills more than the disk has room for, rather than fill the disk half-way."""
    needed = plan.bytes_on(Home.DISK)
    if needed and needed > (free := free_bytes(spill)):
        raise PlanDoesNotFit(
            f"the plan spills {format_bytes(needed)} at a time, and {spill or 'the temporary folder'} has "
            f"{format_bytes(free)} left: pass spill= a folder on a larger disk, raise budget=, or free space"
        )


def _positions(outputs: Any) -> list[str]:
    """The name at each place of a model's result; the same one again where it is returned again."""
    leaves = pytree.tree_leaves(outputs, is_leaf=lambda value: isinstance(value, Ref))
    return [leaf.name for leaf in leaves if isinstance(leaf, Ref)]


def _checked(ceiling: Ceiling, compiled: set[StepKind]) -> Callable[[StepKind], None]:
    """What is done after a step of some kind. It does not know the pass, as the stores do not."""

    def after_step(kind: StepKind) -> None:
        ceiling.check(compiled=kind not in compiled)
        compiled.add(kind)

    return after_step


class _Stores:
    """Opens the stores of one pass. It does not know the pass, so that dropping that frees them at once."""

    def __init__(self, spill: Path | None, device: torch.device) -> None:
        self._parent = spill
        self._device = device
        self._folder: SpillFolder | None = None

    def open(self, spec: StoreSpec, home: Home, tile: tuple[int, int]) -> Store:
        """An empty store in ``home``."""
        if home is Home.DISK:
            self._folder = self._folder or SpillFolder(self._parent)
            return ZarrStore(spec, self._folder.new_folder(), tile, self._device)
        return MemoryStore(spec, torch.device("cpu") if home is Home.HOST else self._device, self._device)

    def close(self) -> None:
        """Remove the folder on disk, if there is one."""
        if self._folder is not None:
            self._folder.close()
            self._folder = None


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the random state back if the pass fails."""
    state = _random_state(device)
    try:
        yield
    except BaseException:
        _set_random_state(state, device)
        raise


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The random states of the host and of the device, if that is another."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


class Streamed(torch.autograd.Function):
    """A streamed pass as one node of the user's autograd graph."""

    @staticmethod
    def forward(ctx: Any, run: Pass, *anchors: Tensor) -> tuple[Tensor, ...]:
        # Hooks of the caller are for what this node saves, not for the graphs inside of it.
        with saved_tensors_hooks_aside():
            values = run.forward()
        names = run.output_names
        # Saved only so that autograd notices a state or the image being changed before backward.
        ctx.save_for_backward(*anchors, *run.recomputed_from())
        ctx.run = run
        ctx.places = [anchor.data_ptr() for anchor in run.anchors]
        # Aliases: the run keeps its values, and autograd makes an output keep the run.
        outputs = {name: values[name].detach() for name in names}
        # What the user does to a result is no matter to what is computed from it later.
        read = {operand for node in run.program.nodes.values() for operand in node.operands}
        outputs |= {n: outputs[n].clone() for n in names if run.present_name(n) in read}
        constant = (n for n in names if run.present_name(n) not in run.plan.differentiated)
        ctx.mark_non_differentiable(*(outputs[n] for n in constant))
        ctx.set_materialize_grads(False)
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run: Pass | None = ctx.run
        if run is None:
            raise RuntimeError(
                "this streamed output has been differentiated already and its stores are freed: "
                "pass retain_graph=True to the first backward(), or run the forward pass again"
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a streamed pass can only be differentiated once: call backward() or grad() without "
                "create_graph=True"
            )
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.run = None
        anchors = ctx.saved_tensors[: len(ctx.needs_input_grad) - 1]
        if ctx.places != [anchor.data_ptr() for anchor in run.anchors]:
            raise RuntimeError(
                "the .data of a parameter was replaced between forward and backward: run the "
                "forward pass again"
            )
        arriving = {n: g for n, g in zip(run.output_names, grads, strict=True) if g is not None}
        with saved_tensors_hooks_aside():
            found = run.backward(arriving)
        image = (run.program.image,) if run.program.image in run.plan.differentiated else ()
        gradients = (found.get(name) for name in (*run.leaf_states, *image))
        # The image may be on the host while its gradient was summed where the model is.
        on_device = zip(gradients, anchors, strict=True)
        return None, *(None if g is None else g.to(anchor.device) for g, anchor in on_device)
