"""From a captured graph to a :class:`Program`: every call lowered by its rule and classified.

The trace carries fake tensors along, under the autocast state that the model will run in, so every
node's shape and dtype is what running it would give. A call with a map among its operands is given to
its rule; without one, or if the rule refuses, the maps are gathered and the call becomes a global value.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

import streamcnn.capture.folded_images  # these three fill the registry
import streamcnn.capture.folded_losses
import streamcnn.capture.folded_products
import streamcnn.graph.ops  # noqa: F401  likewise
from streamcnn.capture.capture import RawGraph, RawNode, moved
from streamcnn.capture.folding import MERGING, Folded, is_folded, stream_folded, unfolded
from streamcnn.errors import UnsupportedModel
from streamcnn.geometry.regions import Region
from streamcnn.graph.autocast import as_recorded
from streamcnn.graph.costs import cost_of, draws
from streamcnn.graph.flattening import Whole
from streamcnn.graph.ops.reduction_types import Reduction
from streamcnn.graph.ops.rules import Call, NotStreamable, begins_maps, rule_for
from streamcnn.graph.program import (
    Access,
    Axes,
    Kind,
    Local,
    Node,
    Program,
    Ref,
    TensorSpec,
    refs_in,
    substitute,
)

_LEAST_POSITIONS = 64
"""Positions of a grid with which streaming begins again."""


class Trace:
    """A captured graph traced once, from which programs with different resident tails are made.

    Parameters
    ----------
    states
        The module's parameters and buffers by qualified name; only shape, dtype and device are used.
    dtype, device
        Those of the image.
    read
        Keys of further arguments that are maps to be read by regions, with their spatial axes.
    keeps_results
        Whether results that are maps stay stored, rather than being made whole.
    """

    def __init__(
        self,
        graph: RawGraph,
        states: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        read: Mapping[str, Axes] = MappingProxyType({}),
        *,
        keeps_results: bool = False,
    ) -> None:
        self._graph = graph
        self._keeps_results = keeps_results
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._marks: dict[str, _Mark] = {}
        """What had been recorded before each captured call."""
        with self._mode, torch.no_grad():
            self._tracer = tracer = _Tracer()
            tracer.add_image(graph.image, torch.empty(graph.image_shape, dtype=dtype, device=device))
            for name, qualified in graph.states.items():
                if qualified in read:
                    tracer.add_map(name, qualified, states[qualified], read[qualified])
                else:
                    tracer.add_state(name, qualified, states[qualified])
            for name, constant in graph.constants.items():
                tracer.add_state(name, name, constant)
            for name, axes in graph.maps.items():
                if name not in tracer.maps:
                    tracer.values[name] = tracer.promote(tracer.values[name], axes)
            for raw in graph.nodes:
                self._marks[raw.name] = tracer.mark()
                tracer.record(raw)

    def program(self, tail: str | None = None) -> Program:
        """The program in which everything from the captured call ``tail`` on runs resident, on whole maps.

        Programs share the nodes before their tails. ``None`` stands for no tail.
        """
        tracer = self._tracer
        if tail is not None:
            tracer = tracer.forked(self._marks[tail])
            position = next(i for i, raw in enumerate(self._graph.nodes) if raw.name == tail)
            with self._mode, torch.no_grad():
                for raw in self._graph.nodes[position:]:
                    tracer.record(raw)
        with self._mode:
            return tracer.program(self._graph, keeps_results=self._keeps_results)


@dataclass(frozen=True, slots=True)
class _Mark:
    """How much a tracer had recorded at some point: lengths of what only grows."""

    nodes: int
    values: int
    gathered: int
    promoted: int
    moved: int


class _Tracer:
    """Records nodes; see :class:`streamcnn.graph.ops.rules.Tracer` for what rules may call."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.fakes: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        """Captured node name to a ref, one with merged axes, a tuple of those, or a plain value."""
        self.states: dict[str, str] = {}
        self.maps: dict[str, str] = {}
        """What is read by regions beside the image."""
        self.moved: dict[str, Ref] = {}
        """Statistics as norms have moved them, by the name of what they were."""
        self.gathered: dict[str, Ref] = {}
        self.promoted: dict[tuple[str, Axes], Ref] = {}
        self.raw: RawNode | None = None
        self.note = ""
        self.resident = False
        self.num_images = 0
        self.sizes: set[tuple[int, ...]] = set()
        """Extents of all maps."""
        self.from_whole: set[str] = set()
        """Global values that were worked out from whole maps."""
        self.known: dict[Any, Any] = {}
        """Fake results of calls, and what they share, by what they are functions of: networks repeat their
        blocks."""

    def mark(self) -> _Mark:
        """How much has been recorded."""
        return _Mark(
            nodes=len(self.nodes),
            values=len(self.values),
            gathered=len(self.gathered),
            promoted=len(self.promoted),
            moved=len(self.moved),
        )

    def forked(self, mark: _Mark) -> _Tracer:
        """A tracer that has recorded what this one had at ``mark``, and goes on resident."""
        fork = _Tracer()
        fork.nodes = dict(islice(self.nodes.items(), mark.nodes))
        fork.fakes = {name: self.fakes[name] for name in fork.nodes}
        fork.values = dict(islice(self.values.items(), mark.values))
        fork.gathered = dict(islice(self.gathered.items(), mark.gathered))
        fork.promoted = dict(islice(self.promoted.items(), mark.promoted))
        fork.states, fork.maps = self.states, self.maps
        fork.moved = dict(islice(self.moved.items(), mark.moved))
        fork.known = self.known
        fork.resident = True
        return fork

    # --- recording -----------------------------------------------------------------------------------

    def add_image(self, name: str, image: Tensor) -> None:
        self.num_images = image.shape[0]
        self.values[name] = self._add(name, image, kind=Kind.IMAGE, axes=(2, 3))

    def add_map(self, name: str, key: str, tensor: Tensor, axes: Axes) -> None:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self.values[name] = self._add(name, fake, kind=Kind.IMAGE, axes=axes)
        self.maps[name] = key

    def add_state(self, name: str, qualified: str, tensor: Tensor) -> None:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        ref = self._add(name, fake, kind=Kind.STATE)
        self.values[name] = ref
        self.states[name] = qualified

    def record(self, raw: RawNode) -> None:
        """Lower one captured call."""
        self.raw = raw
        args = substitute(raw.args, self._value)
        kwargs = substitute(raw.kwargs, self._value)
        if raw.target is moved:
            self.values[raw.name] = self.moved[args[0].name]
            return
        if raw.target is operator.getitem:
            self.values[raw.name] = self._item(raw, *args)
            return
        self.values[raw.name] = self._lower(Call(raw.target, args, kwargs))

    def _value(self, name: str) -> Any:
        return self.values[name]

    def _item(self, raw: RawNode, value: Any, index: int) -> Any:
        if isinstance(value, tuple) and index < len(value):
            return value[index]
        raise UnsupportedModel(
            f"result {index} of an operator in {raw.source or 'the model'} has no streamed form: "
            f"allowed are results 0 to {len(value) - 1 if isinstance(value, tuple) else 0}"
        )

    def _lower(self, call: Call) -> Any:
        operands = [Ref(name) for name in refs_in((call.args, dict(call.kwargs)))]
        merged = is_folded(call)
        if merged or any(self.axes(ref) is not None for ref in operands):
            result = self._stream(call, merged=merged)
            if not isinstance(result, NotStreamable):
                return result
            call = self._gather_maps(call)
            self.note = result.reason
        elif begins_maps(call.target) and not self.resident:
            result = self._begin(call)
            if not isinstance(result, NotStreamable):
                return result
        rule = rule_for(call.target, without_maps=True)
        result = rule(self, call) if rule else self.global_value(call.target, *call.args, **call.kwargs)
        self.note = ""
        return result

    def _stream(self, call: Call, *, merged: bool) -> Any:
        if self.resident:
            return NotStreamable("")
        if merged:
            return stream_folded(self, call)
        result = self.stream(call)
        if isinstance(result, NotStreamable) and rule_for(call.target) in MERGING:
            merged_result = stream_folded(self, call)
            return result if isinstance(merged_result, NotStreamable) else merged_result
        return result

    def stream(self, call: Call) -> Any:
        """What the call's rule answers."""
        rule = rule_for(call.target)
        return NotStreamable("it has no rule") if rule is None else rule(self, call)

    def _begin(self, call: Call) -> Any:
        """Stream a call whose first operand was worked out from whole maps: what it gives is a map again."""
        ref = call.args[0]
        if ref.name not in self.from_whole:
            return NotStreamable("")
        result: Any = NotStreamable("")
        for axes in self._grids(self.spec(ref).shape):
            result = self.stream(Call(call.target, (self.promote(ref, axes), *call.args[1:]), call.kwargs))
            if not isinstance(result, NotStreamable):
                break
        return result

    def _grids(self, shape: tuple[int, ...]) -> Iterator[Axes]:
        """Which axes of a tensor may be those of a map again; any would be exact.

        With channels last they have a known map's extents. Of few positions nothing is gained.
        """
        if len(shape) != 4 or shape[0] != self.num_images:
            return
        if shape[2] * shape[3] >= _LEAST_POSITIONS:
            yield (2, 3)
        if shape[1] * shape[2] >= _LEAST_POSITIONS and shape[1:3] in self.sizes:
            yield (1, 2)

    def _gather_maps(self, call: Call) -> Call:
        args, kwargs = pytree.tree_map(self._whole, (call.args, dict(call.kwargs)))
        return Call(call.target, args, kwargs)

    def _whole(self, value: Any) -> Any:
        """A map as a global value; anything else as it is."""
        if isinstance(value, Folded):
            return unfolded(self, value)
        return self.gather(value) if isinstance(value, Ref) and self.axes(value) is not None else value

    def gather(self, ref: Ref) -> Ref:
        """The whole of a map as a global value, recorded once."""
        if ref.name not in self.gathered:
            node = self.nodes[ref.name]
            if node.kind is Kind.PROMOTED:
                self.gathered[ref.name] = node.args[0]
            else:
                fake = self.fakes[ref.name]
                self.gathered[ref.name] = self._add(f"whole_{ref.name}", fake, kind=Kind.GATHER, args=(ref,))
        return self.gathered[ref.name]

    # --- what rules may ask and record ---------------------------------------------------------------

    def spec(self, ref: Ref) -> TensorSpec:
        return self.nodes[ref.name].tensor

    def axes(self, ref: Ref) -> Axes | None:
        node = self.nodes[ref.name]
        return node.axes if node.is_map else None

    def recorded(self, ref: Ref) -> Call | None:
        node = self.nodes[ref.name]
        return Call(node.target, node.args, node.kwargs) if node.kind is Kind.LOCAL and node.target else None

    def fake(self, call: Call) -> Any:
        return self._called(call)[0]

    def _called(self, call: Call) -> tuple[Any, str]:
        """A call's fake result, and the operand in whose memory it is; empty if it has its own."""
        if isinstance(call.target, Whole):
            return pytree.tree_map_only(Tensor, self._made, call.target.like), ""

        def fake_of(name: str) -> Any:
            return self.fakes[name]

        args, kwargs = substitute(call.args, fake_of), substitute(dict(call.kwargs), fake_of)
        result, place = self._fake(call.target, args, kwargs)
        if call.target is operator.getitem:
            # The results of an operator are tensors of their own, unless it divides an operand into parts.
            whole = self.nodes[call.args[0].name]
            return result, whole.view_of if whole.kind is Kind.GLOBAL else whole.name
        if place is None:
            return result, ""
        refs = (leaf for leaf in pytree.tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Ref))
        # Of several results each is a leaf.
        names = [ref.name for ref in refs for _ in pytree.tree_leaves(self.fakes[ref.name])]
        return result, names[place]

    def fake_seen(self, call: Call) -> Any:
        def fake_of(value: Any) -> Any:
            if isinstance(value, Folded):
                fake = self.fakes[value.ref.name]
                return fake.new_empty(value.seen(fake.shape))
            return self.fakes[value.name] if isinstance(value, Ref) else value

        return self._fake(call.target, *pytree.tree_map(fake_of, (call.args, dict(call.kwargs))))[0]

    def _fake(self, target: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, int | None]:
        """A call's fake result, and which of the tensors among its arguments has the memory that it is in."""

        def call() -> tuple[Any, int | None]:
            result = target(*args, **kwargs)
            return result, _shares(result, (args, kwargs))

        casts = self.raw.casts if self.raw is not None else None
        key = (target, casts, _look(args), _look(kwargs))
        with as_recorded(grad=True, casts=casts):
            try:
                found: tuple[Any, int | None] = self._once(key, call)
                return found
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise UnsupportedModel(
                    f"{_target_name(self.raw)} in {self._where()} gives a value or a shape that depends on "
                    "the values of tensors (.item(), a boolean mask as an index, nonzero): keep it a tensor, "
                    "or compute with torch.where and masks of fixed shape"
                ) from error

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        try:
            if key not in self.known:
                self.known[key] = make()
        except TypeError:
            return make()
        return self.known[key]

    def _where(self) -> str:
        return (self.raw.source if self.raw is not None else "") or "the model"

    def _made(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self._device())

    def global_value(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result, view_of = self._called(Call(target, args, kwargs))
        is_single = not isinstance(result, (tuple, list))
        value = self._add(
            self._fresh(),
            result if is_single else tuple(result),
            kind=Kind.GLOBAL,
            target=target,
            args=args,
            kwargs=kwargs,
            view_of=view_of,
        )
        return value if is_single else self._items(value)

    def _items(self, whole: Ref) -> tuple[Ref, ...]:
        count = len(self.fakes[whole.name])
        return tuple(self.global_value(operator.getitem, whole, index) for index in range(count))

    def local(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: Tensor,
        axes: Axes,
        accesses: Mapping[str, Access],
        fill: float | None = None,
        positional: bool = False,
        heavy: bool = False,
    ) -> Ref:
        fake = torch.empty(like.shape, dtype=like.dtype, device=self._device())
        local = Local(dict(accesses), fill, positional, heavy)
        raw = self.raw
        in_place = raw.in_place if raw is not None and target is raw.target and local.pointwise else None
        return self._add(
            self._fresh(),
            fake,
            kind=Kind.LOCAL,
            target=target,
            args=tuple(args),
            kwargs=dict(kwargs or {}),
            axes=axes,
            local=local,
            in_place=in_place,
        )

    def reduce(self, reduction: Reduction, ref: Ref) -> tuple[Ref, ...]:
        node = self.nodes[ref.name]
        fake = self.fakes[ref.name]

        def finished() -> tuple[Tensor, ...]:
            # Partial results have one shape whatever the tile, and the smallest meets the fewest windows.
            assert node.axes is not None
            corner = functools.reduce(lambda x, axis: x.narrow(axis, 0, 1), node.axes, fake)
            partial = reduction.partial(corner, Region.whole((1, 1)))
            return reduction.finish(partial, node.tensor.dtype)

        results = self._once((reduction, _look(fake)), finished)
        whole = self._add(self._fresh(), results, kind=Kind.REDUCTION, args=(ref,), reduction=reduction)
        return self._items(whole)

    def promote(self, ref: Ref, axes: Axes) -> Ref:
        if (ref.name, axes) not in self.promoted:
            fake = self.fakes[ref.name]
            name = f"map_of_{ref.name}" if f"map_of_{ref.name}" not in self.nodes else self._fresh()
            self.promoted[ref.name, axes] = self._add(name, fake, kind=Kind.PROMOTED, args=(ref,), axes=axes)
        return self.promoted[ref.name, axes]

    def update(self, statistic: Ref, value: Ref) -> None:
        self.moved[statistic.name] = value

    # --- nodes ---------------------------------------------------------------------------------------

    def _device(self) -> torch.device:
        return next(fake.device for fake in self.fakes.values() if isinstance(fake, Tensor))

    def _fresh(self) -> str:
        base = self.raw.name if self.raw is not None else "value"
        name, count = base, 0
        while name in self.nodes:
            count += 1
            name = f"{base}.{count}"
        return name

    def _add(self, name: str, fake: Any, *, kind: Kind, **fields: Any) -> Ref:
        spec = tuple(map(_spec_of, fake)) if isinstance(fake, tuple) else _spec_of(fake)
        defaults: dict[str, Any] = {"target": None, "args": (), "kwargs": {}}
        source, line = (self.raw.source, self.raw.line) if self.raw is not None else ("", "")
        note = self.note if kind is Kind.GLOBAL else ""
        if note:
            note = f"{_target_name(self.raw)}: {note}"
            self.note = ""
        grad, casts = (True, None) if self.raw is None else (self.raw.grad, self.raw.casts)
        grad = grad and not cost_of(fields.get("target")).detaches
        # What only moves a value between maps and global values serves readers inside and outside of blocks.
        grad = grad or kind in (Kind.GATHER, Kind.PROMOTED)
        self.nodes[name] = node = Node(
            name=name,
            kind=kind,
            spec=spec,
            source=source,
            line=line,
            note=note,
            grad=grad,
            casts=casts,
            **{**defaults, **fields},
        )
        self.fakes[name] = fake
        if node.is_map:
            self.sizes.add(node.size)
        elif kind is Kind.GATHER or (kind is Kind.GLOBAL and not self.from_whole.isdisjoint(node.operands)):
            self.from_whole.add(name)
        return Ref(name)

    def program(self, graph: RawGraph, *, keeps_results: bool) -> Program:
        """The recorded program, without nodes that nothing needs."""
        outputs = substitute(graph.outputs, self._kept if keeps_results else self._final)
        updates = {qualified: self._final(name).name for qualified, name in graph.updates.items()}
        needed = _needed(self.nodes, (*refs_in(outputs), *updates.values(), *self._draws(), graph.image))
        self._refuse_unread_draws(needed)
        states = {name: qualified for name, qualified in self.states.items() if name in needed}
        return Program(
            nodes={name: node for name, node in self.nodes.items() if name in needed},
            image=graph.image,
            states={name: q for name, q in states.items() if name not in graph.constants},
            maps={name: key for name, key in self.maps.items() if name in needed},
            outputs=outputs,
            updates=updates,
            constants={name: c for name, c in graph.constants.items() if name in needed},
        )

    def _draws(self) -> Iterator[str]:
        """Small draws that nobody may read: they move the random state."""
        for node in self.nodes.values():
            if node.kind is Kind.GLOBAL and draws(node.target) and not self._reads_map(node):
                yield node.name

    def _reads_map(self, node: Node) -> bool:
        return any(self.nodes[name].kind is Kind.GATHER for name in node.operands)

    def _refuse_unread_draws(self, needed: set[str]) -> None:
        for node in self.nodes.values():
            unread = node.name not in needed and draws(node.target)
            if unread and node.kind is Kind.GLOBAL and self._reads_map(node):
                raise UnsupportedModel(
                    f"'{node.name}' ({node.source or 'the model'}) draws random numbers of a map's size that "
                    "nothing reads: remove it, since the numbers drawn later depend on it"
                )

    def _kept(self, name: str) -> Any:
        """A result of the model, stored if it is a map that is computed in tiles."""
        value = self.values[name]
        if isinstance(value, Ref) and self.nodes[value.name].kind is Kind.LOCAL:
            return self._add(f"result_{value.name}", self.fakes[value.name], kind=Kind.RESULT, args=(value,))
        return self._final(name)

    def _final(self, name: str) -> Any:
        """A result of the model, whole."""
        return pytree.tree_map(self._whole, self.values[name])


def _target_name(raw: RawNode | None) -> str:
    target = raw.target if raw is not None else None
    return str(target.overloadpacket) if isinstance(target, OpOverload) else str(target)


def _look(value: Any) -> Any:
    """What the shape and type of a call's result can depend on, in an argument."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_look, value))
    if isinstance(value, dict):
        return tuple((key, _look(item)) for key, item in value.items())
    return (type(value), value)


def _shares(result: Any, arguments: Any) -> int | None:
    """Which of the tensors in ``arguments`` has the memory that the first tensor of ``result`` is in."""
    results, tensors = (
        [leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves(each) if isinstance(leaf, Tensor)]
        for each in (result, arguments)
    )
    return tensors.index(results[0]) if results and results[0] in tensors else None


def _spec_of(value: Any) -> TensorSpec:
    assert isinstance(value, Tensor), f"expected a tensor, found {type(value).__name__}"
    return TensorSpec(tuple(value.shape), value.dtype)


def _needed(nodes: Mapping[str, Node], roots: Sequence[str]) -> set[str]:
    needed: set[str] = set()
    pending = list(roots)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending.extend(nodes[name].operands)
    return needed
