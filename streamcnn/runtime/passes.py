"""Capture, plan and carry out the passes of one model; plans are cached for the next pass of their kind."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol
from weakref import finalize

import torch
from torch import Tensor, nn

from streamcnn.capture.caller_modes import CallerModes
from streamcnn.capture.capture import Given, RawGraph
from streamcnn.capture.forward_pass import ForwardPass, stand_in
from streamcnn.capture.parts import BEFORE, VALUE, parts_of
from streamcnn.ceiling.device import room_for
from streamcnn.ceiling.kept_blocks import give_back
from streamcnn.ceiling.rooms import rounded_down
from streamcnn.data.reader import BatchReader, Image, Preprocess
from streamcnn.graph.autocast import autocast_state
from streamcnn.graph.costs import is_collective
from streamcnn.graph.program import substitute
from streamcnn.plan.plan import Plan
from streamcnn.plan.reading import NO_READING, BatchCost
from streamcnn.plan.storage import Tier
from streamcnn.planning.spec import Machine, PassSpec
from streamcnn.runtime.arguments import Arguments
from streamcnn.runtime.autograd_node import Streamed
from streamcnn.runtime.given_image import with_own_image
from streamcnn.runtime.machines import this_machine
from streamcnn.runtime.pass_stores import gain_of_a_larger_disk, memory_beside_the_budget, room_on_disk
from streamcnn.runtime.plan_cache import Captured, PlanCache, Planned
from streamcnn.runtime.plan_run import PassOwner
from streamcnn.runtime.smaller_plans import SmallerPlans
from streamcnn.runtime.state_checks import as_before, refuse_changes_of_the_image, refuse_shared_memory
from streamcnn.runtime.streamed_pass import Keep, Pass
from streamcnn.runtime.transforms import refuse_tangents
from streamcnn.stores import SpareFiles
from streamcnn.support.interrupts import undoing

_MUCH_LONGER = 1.1
"""The ratio to its time with unlimited room on disk above which a pass's time is reported to the user."""


class Owner(PassOwner, Protocol):
    """The model to which passes belong, and its options."""

    tile: tuple[int, int] | None
    preprocess: Preprocess | None
    resident_tail: bool


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """The properties of an image that planning knows."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    requires_grad: bool
    reading: BatchCost = NO_READING


@dataclass(frozen=True, slots=True, eq=False)
class ModuleCall:
    """A call of a module, except for the image."""

    net: nn.Module
    """The model's module, or one that contains it."""
    forward_pass: ForwardPass
    """Captures of the module's earlier calls."""
    given: Arguments
    """The module's arguments after the image."""


def wants_gradient(image: Image) -> bool:
    """Whether a pass must also give the gradient of the image."""
    return isinstance(image, Tensor) and image.requires_grad and torch.is_grad_enabled()


class Passes:
    """Plans and carries out calls of modules for one model, which each call names.

    It holds no reference to the model, so that the model can be freed.
    """

    def __init__(self) -> None:
        self._plans = PlanCache()
        self._smaller: dict[tuple[Any, ...], PassSpec] = {}
        """By a capture's settings and a spec that was refused memory: the smaller spec that succeeded."""
        self._told = set[str]()
        """Warnings that have been given already."""
        self._collected: finalize[[], Any] | None = None
        """Gives kept blocks back when the model is collected; None before the first pass."""

    def call_collectives(self) -> bool:
        """Whether a planned module calls ``torch.distributed`` in its own code."""
        nodes = chain.from_iterable(program.nodes.values() for program in self._plans.programs())
        return any(is_collective(node.target) for node in nodes)

    def planned(
        self,
        owner: Owner,
        call: ModuleCall,
        image: ImageSpec,
        device: torch.device,
        machine: Machine | None,
    ) -> Planned:
        """The captured program of a call, and its plan for ``machine``; ``None`` means this one."""
        given = call.given
        # A model without values is planned as it will be on the host.
        planned_on = torch.device("cpu") if device.type == "meta" else device

        def take(graph: RawGraph, states: Mapping[str, Tensor]) -> Planned:
            captured = Captured(graph, states, device, given.maps)
            spec = _spec(owner, captured, image)
            if machine is not None:
                return self._plans.plan(captured, spec, machine)
            here = this_machine(planned_on, spec.computed_in)
            return self._plan_here(captured, spec, here, owner.spare_files)[0]

        here = stand_in(image.shape, image.dtype, device, requires_grad=image.requires_grad)
        return call.forward_pass.until_captured(call.net, here, given.args, given.kwargs, take)

    def run(
        self,
        owner: Owner,
        call: ModuleCall,
        image: Image,
        reader: BatchReader,
        keep: Keep | None,
    ) -> Any:
        """The result of a call for whole images; ``keep`` reads stored results and returns stand-ins."""
        image_gradient = wants_gradient(image)
        if image_gradient and owner.preprocess is not None:
            raise ValueError(
                "the image requires a gradient and preprocess= is set: the gradient would be that of the "
                "preprocessed image; preprocess the image yourself, or detach it"
            )
        given, caller_modes = call.given, CallerModes()
        leaf = image if image_gradient else None
        running = _Running(self, owner, reader, leaf, caller_modes, keep)

        def run(graph: RawGraph, states: Mapping[str, Tensor]) -> Sequence[Any]:
            refuse_tangents(image, states)
            refuse_changes_of_the_image(graph, image)
            refuse_shared_memory(graph, states)
            results = running.in_parts(Captured(graph, states, reader.device, given.maps))
            asked = results[: len(results) - graph.num_checks]
            if keep is None and owner.preprocess is None:
                asked = with_own_image(asked, graph, image)
            return [states[each.key] if isinstance(each, Given) else each for each in asked]

        here = stand_in(reader.shape, reader.dtype, reader.device, requires_grad=image_gradient)
        if type(image) in (Tensor, nn.Parameter):
            # Attributes that the caller, not PyTorch, has set on the image.
            vars(here).update((n, value) for n, value in vars(image).items() if not n.startswith("_dynamo"))
        result = call.forward_pass(call.net, here, given.args, given.kwargs, run, caller_modes)
        return given.restored(result)

    def _plan_here(
        self, captured: Captured, spec: PassSpec, machine: Machine, spares: SpareFiles
    ) -> tuple[Planned, PassSpec, Machine]:
        """The plan within the budget, the process's other limits and the disk's room.

        The spec and the machine that it was made for are returned too. If a pass of this kind was refused
        memory before and succeeded with a smaller plan, the plan is that one.
        """

        room = room_for(captured.device)

        def present(spec: PassSpec) -> PassSpec:
            return self._smaller.get((captured.settings, spec), spec)

        def within(machine: Machine) -> tuple[Planned, PassSpec, Machine]:
            return *self._plans.plan_within(captured, spec, machine, room, present), machine

        fastest = found = within(machine)
        needed = fastest[0].plan.bytes_on(Tier.DISK)
        if needed and fastest[0].plan.fits and needed > (on_disk := room_on_disk(spares)):
            for nbytes in dict.fromkeys((rounded_down(on_disk), on_disk)):
                found = within(machine.with_room_on_disk(nbytes))
                if found[0].plan.bytes_on(Tier.DISK) <= on_disk:
                    self._tell_of_little_disk(fastest[0].plan, found[0].plan, nbytes, spares)
                    break
        return found

    def _tell_of_little_disk(self, fastest: Plan, taken: Plan, room: int, spares: SpareFiles) -> None:
        """Warn once of the time that a larger disk would save, if that is much."""
        if taken.projected_seconds > _MUCH_LONGER * fastest.projected_seconds:
            self._tell(gain_of_a_larger_disk(fastest, taken, room, spares))

    def _tell(self, text: str) -> None:
        """Give a warning once; none if the text is empty."""
        if text and text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=2)

    def prepare(self, captured: Captured, spec: PassSpec, owner: Owner) -> tuple[Planned, SmallerPlans]:
        """The plan of a pass that is to run here, and the maker of smaller plans."""
        machine = this_machine(captured.device, spec.computed_in)
        planned, spec, machine = self._plan_here(captured, spec, machine, owner.spare_files)
        self._tell(memory_beside_the_budget(planned.plan, owner.spare_files))
        if self._collected is None:
            self._collected = finalize(owner, give_back)
            self._collected.atexit = False
        return planned, SmallerPlans(self._plans, captured, spec, machine, self._smaller)


def _spec(owner: Owner, captured: Captured, image: ImageSpec, *, keeps_results: bool = False) -> PassSpec:
    """The spec of the pass for which a plan is wanted."""
    graph, states = captured.graph, captured.states
    trains = not keeps_results and (torch.is_grad_enabled() or graph.enables_grad)
    leaves = {name for name, key in graph.states.items() if trains and states[key].requires_grad}
    if image.requires_grad:
        leaves.add(graph.image)
    maps = captured.maps
    beside = ((name, maps[key].reading) for name, key in graph.states.items() if key in maps)
    return PassSpec(
        image_shape=image.shape,
        dtype=image.dtype,
        casts=autocast_state(captured.device),
        leaves=frozenset(leaves),
        budget=owner.budget,
        tile=owner.tile,
        tail=owner.resident_tail and not keeps_results,
        keeps_results=keeps_results,
        reading=replace(image.reading, maps=tuple(beside)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    """Carries out one call of a module."""

    passes: Passes
    owner: Owner
    reader: BatchReader
    image: Any
    """The image if its gradient is wanted; else None."""
    caller_modes: CallerModes
    keep: Keep | None

    def in_parts(self, captured: Captured) -> Sequence[Any]:
        """Run a captured forward pass, in parts if its results depend on each other; return its results."""
        graph = captured.graph
        differentiates = self.keep is None and (torch.is_grad_enabled() or graph.enables_grad)
        parts = parts_of(graph) if differentiates else ()
        if not parts:
            return self._whole(captured)
        before = {key: as_before(captured.states[key]) for key in graph.updates}

        def run() -> Sequence[Any]:
            values: dict[str, Any] = {}
            unchanged = {f"{BEFORE}{key}": state for key, state in before.items()}
            for part in parts:
                taken = {name: values[name] for name in part.taken}
                handed = {f"{VALUE}{name}": value for name, value in taken.items()}
                states = {**captured.states, **unchanged, **handed}
                piece = Captured(part.graph(graph, taken), states, captured.device, captured.maps)
                values |= zip(part.given, self._whole(piece), strict=True)
            results: tuple[Any, ...] = substitute(graph.outputs, values.__getitem__)
            return results

        def undo() -> None:
            with torch.no_grad():
                for key, state in before.items():
                    captured.states[key].copy_(state)

        return undoing(run, undo)

    def _whole(self, captured: Captured) -> Sequence[Any]:
        """Plan and run a captured forward pass as a whole; return its results."""
        reader = self.reader
        image = ImageSpec(reader.shape, reader.dtype, self.image is not None, reader.reading)
        spec = _spec(self.owner, captured, image, keeps_results=self.keep is not None)
        planned, shrink = self.passes.prepare(captured, spec, self.owner)
        reader.check(planned.plan)
        planned.plan.validate()
        if self.owner.compiles:
            planned.compiled.prepare(captured.device, spec.casts)
        run = Pass(planned, reader, captured, self.owner, shrink, self.keep)
        outputs = undoing(partial(self._outputs, run), partial(_undo, run, torch.is_grad_enabled()))
        by_name = dict(zip(planned.program.output_names, outputs, strict=True))
        results: tuple[Any, ...] = substitute(planned.program.outputs, by_name.__getitem__)
        return results

    def _outputs(self, run: Pass) -> tuple[Tensor, ...]:
        """Run a pass forward; return the tensors among the model's results, in order."""
        if not run.current.plan.training:
            with self.caller_modes.restored():
                values = run.forward()
            return tuple(values[name] for name in run.output_names)
        anchors = run.anchors
        if self.image is not None and run.current.program.image in run.current.plan.differentiated:
            anchors.append(self.image)
        with self.caller_modes.restored(), torch.enable_grad():
            outputs: tuple[Tensor, ...] = Streamed.apply(run, *anchors)  # type: ignore[no-untyped-call]
        return outputs


def _undo(run: Pass, grad: bool) -> None:
    """Clean up after a pass that has failed or was interrupted."""
    run.close()
    torch.set_grad_enabled(grad)
