"""Recording of a program's nodes, and the interface that rules get."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from streamcnn.capture.capture import RawNode
from streamcnn.capture.lowering.fake_calls import FakeCalls, look, target_name
from streamcnn.capture.lowering.folding import Folded
from streamcnn.capture.lowering.joined import Joined, first_ref, shape_seen
from streamcnn.geometry.regions import Region
from streamcnn.graph.costs import cost_of
from streamcnn.graph.ops.reduction_types import Reduction
from streamcnn.graph.ops.rules import Call, NotStreamable, rule_for
from streamcnn.graph.program import Access, Axes, Kind, Local, Node, Ref, TensorSpec, reached, substitute
from streamcnn.graph.whole import Whole

LIKE_OTHERS = frozenset({torch.ops.aten.to.other, torch.ops.aten.type_as.default})
"""Operators whose result is on the device of their second operand."""


@dataclass(frozen=True, slots=True)
class RecordingMark:
    """A point in a recording, as the lengths of mappings that only grow."""

    nodes: int
    gathered: int
    promoted: int
    moved: int


class Recording:
    """Nodes and their fake values; rules call the methods of :class:`streamcnn.graph.ops.rules.Tracer`.

    ``fake_calls`` is shared among recordings of one graph.
    """

    def __init__(self, fake_calls: FakeCalls) -> None:
        self.nodes: dict[str, Node] = {}
        self.fakes: dict[str, Any] = {}
        self.moved: dict[str, Ref] = {}
        """New values of statistics that norms update, by the name of the old value."""
        self.raw: RawNode | None = None
        """The captured call that is being recorded."""
        self.note = ""
        """Reason why the next global value runs on whole maps."""
        self.resident = False
        self.sizes: set[tuple[int, ...]] = set()
        """The sizes (h, w) of all maps."""
        self.from_whole: set[str] = set()
        """Global values that are computed from whole maps."""
        self.cut: dict[str, set[str]] = {}
        """By value: those beside it that the code has cut off."""
        self._gathered: dict[str, Ref] = {}
        self._promoted: dict[tuple[str, Axes], Ref] = {}
        self._fake_calls = fake_calls

    def mark(self) -> RecordingMark:
        """The present point, for :meth:`forked`."""
        return RecordingMark(
            nodes=len(self.nodes),
            gathered=len(self._gathered),
            promoted=len(self._promoted),
            moved=len(self.moved),
        )

    def forked(self, mark: RecordingMark) -> Recording:
        """A copy of the recording as it was at ``mark``, in which further calls run on whole maps."""
        fork = Recording(self._fake_calls)
        fork.nodes = dict(islice(self.nodes.items(), mark.nodes))
        fork.fakes = {name: self.fakes[name] for name in fork.nodes}
        fork.moved = dict(islice(self.moved.items(), mark.moved))
        fork.cut = {name: off & fork.nodes.keys() for name, off in self.cut.items() if name in fork.nodes}
        fork._gathered = dict(islice(self._gathered.items(), mark.gathered))
        fork._promoted = dict(islice(self._promoted.items(), mark.promoted))
        fork.resident = True
        return fork

    # --- what rules may ask --------------------------------------------------------------------------

    def spec(self, ref: Ref) -> TensorSpec:
        return self.nodes[ref.name].tensor

    def axes(self, ref: Ref) -> Axes | None:
        node = self.nodes[ref.name]
        return node.axes if node.is_map else None

    def is_of_maps(self, ref: Ref) -> bool:
        return any(self.nodes[name].is_map for name in reached(self.nodes, [ref.name]))

    def recorded(self, ref: Ref) -> Call | None:
        node = self.nodes[ref.name]
        return Call(node.target, node.args, node.kwargs) if node.kind is Kind.LOCAL and node.target else None

    def stream(self, call: Call) -> Any:
        """What the call's rule answers."""
        rule = rule_for(call.target)
        return NotStreamable("it has no rule") if rule is None else rule(self, call)

    def fake(self, call: Call) -> Any:
        return self._called(call)[0]

    def _called(self, call: Call) -> tuple[Any, str]:
        """A call's fake result, and the operand whose memory it shares; empty if none."""
        if isinstance(call.target, Whole):
            return pytree.tree_map_only(Tensor, self._made, call.target.like), ""

        def fake_of(name: str) -> Any:
            return self.fakes[name]

        args, kwargs = substitute(call.args, fake_of), substitute(dict(call.kwargs), fake_of)
        result, place = self._fake_calls.called(self.raw, call.target, args, kwargs)
        if call.target is operator.getitem:
            # An item shares its operator's memory only if the operator splits an operand into views.
            whole = self.nodes[call.args[0].name]
            return result, whole.view_of if whole.kind is Kind.GLOBAL else whole.name
        if place is None:
            return result, ""
        refs = (leaf for leaf in pytree.tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Ref))
        # A value of several results has one leaf for each.
        names = [ref.name for ref in refs for _ in pytree.tree_leaves(self.fakes[ref.name])]
        return result, names[place]

    def fake_seen(self, call: Call) -> Any:
        def fake_of(value: Any) -> Any:
            if isinstance(value, (Folded, Joined)):
                return self.fakes[first_ref(value).name].new_empty(shape_seen(self, value))
            return self.fakes[value.name] if isinstance(value, Ref) else value

        args, kwargs = pytree.tree_map(fake_of, (call.args, dict(call.kwargs)))
        return self._fake_calls.called(self.raw, call.target, args, kwargs)[0]

    def moves(self, call: Call) -> bool:
        """Whether a call moves its operand to or from a device other than the image's."""
        here = self._device()
        leaves = pytree.tree_leaves((call.args, dict(call.kwargs)))
        devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        asked = call.args[: 2 if call.target in LIKE_OTHERS else 1]
        fakes = [self.fakes[ref.name] for ref in asked if isinstance(ref, Ref)]
        devices += [fake.device for fake in fakes if isinstance(fake, Tensor)]
        return any(each.type != here.type or each.index not in (None, here.index) for each in devices)

    def _made(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self._device())

    # --- what rules may record -----------------------------------------------------------------------

    def global_value(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result, view_of = self._called(Call(target, args, kwargs))
        is_single = not isinstance(result, (tuple, list))
        value = self.add(
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
        return self.add(
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

    def gather(self, ref: Ref) -> Ref:
        """The whole of a map as a global value, recorded once."""
        if ref.name not in self._gathered:
            node = self.nodes[ref.name]
            if node.kind is Kind.PROMOTED:
                self._gathered[ref.name] = node.args[0]
            else:
                fake = self.fakes[ref.name]
                self._gathered[ref.name] = self.add(f"whole_{ref.name}", fake, kind=Kind.GATHER, args=(ref,))
        return self._gathered[ref.name]

    def cut_off(self, values: Iterable[Ref], kept: Ref) -> None:
        """Note values from which code kept only ``kept``: autograd gives them gradients of zero."""
        self.cut.setdefault(kept.name, set()).update(value.name for value in values)

    def reduce(self, reduction: Reduction, ref: Ref, *beside: Ref) -> tuple[Ref, ...]:
        node = self.nodes[ref.name]
        fake, given = self.fakes[ref.name], [self.fakes[each.name] for each in beside]

        def finished() -> tuple[Tensor, ...]:
            # A partial result's shape does not depend on the tile; the smallest tile costs the least.
            assert node.axes is not None
            corner = functools.reduce(lambda x, axis: x.narrow(axis, 0, 1), node.axes, fake)
            partial = reduction.given(given).partial(corner, Region.whole((1, 1)))
            return reduction.finish(partial, node.tensor.dtype)

        results = self._fake_calls.once((reduction, look(fake), *map(look, given)), finished)
        args = (ref, *beside)
        whole = self.add(self._fresh(), results, kind=Kind.REDUCTION, args=args, reduction=reduction)
        return self._items(whole)

    def promote(self, ref: Ref, axes: Axes) -> Ref:
        if (ref.name, axes) not in self._promoted:
            fake = self.fakes[ref.name]
            name = f"map_of_{ref.name}" if f"map_of_{ref.name}" not in self.nodes else self._fresh()
            self._promoted[ref.name, axes] = self.add(name, fake, kind=Kind.PROMOTED, args=(ref,), axes=axes)
        return self._promoted[ref.name, axes]

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

    def add(self, name: str, fake: Any, *, kind: Kind, **fields: Any) -> Ref:
        """Record a node for the present captured call; ``fields`` are further fields of a `Node`."""
        spec = tuple(map(_spec_of, fake)) if isinstance(fake, tuple) else _spec_of(fake)
        defaults: dict[str, Any] = {"target": None, "args": (), "kwargs": {}}
        source, line = (self.raw.source, self.raw.line) if self.raw is not None else ("", "")
        note = self.note if kind is Kind.GLOBAL else ""
        if note:
            note = f"{target_name(self.raw)}: {note}"
            self.note = ""
        grad, casts = (True, None) if self.raw is None else (self.raw.grad, self.raw.casts)
        grad = grad and not cost_of(fields.get("target")).detaches
        # A node that only moves a value between maps and global values has readers in any block.
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


def _spec_of(value: Any) -> TensorSpec:
    assert isinstance(value, Tensor), f"expected a tensor, found {type(value).__name__}"
    return TensorSpec(tuple(value.shape), value.dtype)
