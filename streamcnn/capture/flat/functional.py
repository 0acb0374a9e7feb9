"""Functionalisation: turns a flat graph whose calls overwrite tensors into one in which none does.

In-place operators become functional ones, and a write to a view is scattered into what it views. Norms write
their statistics like any other call. Reads and writes of the user's tensors keep their order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from streamcnn.capture.capture import Given, RawGraph, moved
from streamcnn.capture.collectives import in_their_order
from streamcnn.capture.flat.current_values import CurrentValues
from streamcnn.capture.flat.graph_inputs import GraphInputs
from streamcnn.capture.flat.overlaps import overlap_in_part
from streamcnn.capture.flat.raw_calls import RawCalls, is_block
from streamcnn.capture.flat.saved_values import refuse_saved
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.flattening import UPDATING, is_recomputed
from streamcnn.graph.in_place import (
    OnCopy,
    asserted,
    changes_shape,
    functional_of,
    is_elementwise,
    overwritten,
    own_name,
)
from streamcnn.graph.program import Ref
from streamcnn.graph.whole import GradientHook, hook_set, on_meta

_LAYOUTS = (
    torch.strided,
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)
"""Of tensors that a forward pass may hold."""


def functionalized(
    flat: GraphModule,
    keys: Sequence[str | None],
    image_shape: tuple[int, ...],
    *,
    grad: bool,
    device: torch.device,
    path_of: Callable[[str], str],
    hooks: Mapping[str, Callable[..., Any]] | None = None,
) -> RawGraph:
    """Rewrite a flat graph so that no call changes its arguments.

    Parameters
    ----------
    keys
        For each input of the graph, the key of a state, or ``None`` for the image.
    grad, device
        Whether gradients are enabled when the pass begins, and the device it computes on.
    path_of
        Gives a submodule's qualified name from its place in the captured call, for messages.
    hooks
        Hooks on gradients by the names of the calls of :func:`hook_set`.

    Raises
    ------
    UnsupportedModel
        If a change in place has no functional form.
    """
    calls = RawCalls(flat, grad, device, path_of)
    return _Functionalizer(flat, keys, calls, hooks or {}).run(image_shape)


class _Functionalizer:
    """Rewrites a flat graph; see :func:`functionalized`."""

    def __init__(
        self,
        flat: GraphModule,
        keys: Sequence[str | None],
        calls: RawCalls,
        hooks: Mapping[str, Callable[..., Any]],
    ) -> None:
        self.flat = flat
        self.calls = calls
        self.values = CurrentValues(calls)
        self.inputs = GraphInputs(flat, keys, calls, self.values)
        self.hooks = hooks
        self.checks: list[Ref] = []

    def run(self, image_shape: tuple[int, ...]) -> RawGraph:
        outputs: tuple[Any, ...] = ()
        inputs = self.inputs
        for node in self.flat.graph.nodes:
            self._refuse_layout(node)
            if node.op == "placeholder":
                inputs.add_placeholder(node)
                self.values.set(node, Ref(node.name))
            elif node.op == "get_attr":
                inputs.add_constant(node)
            elif node.op == "call_function":
                self._call(node)
            else:
                assert node.op == "output", node.op
                outputs = tuple(self._output(value) for value in _as_tuple(node.args[0]))
        if inputs.image is None:
            raise UnsupportedModel(
                "the model's result does not depend on the image: nothing can be streamed; "
                "call the module itself"
            )
        inputs.take_changed_constants()
        examples = {node.name: node.meta.get("val") for node in self.flat.graph.nodes}
        refuse_saved(self.calls.nodes, outputs, self.values.unknown_writes(), examples)
        states = inputs.states
        changed = [n for n in self.flat.graph.nodes if n.name in states and self.values.is_written(n)]
        return RawGraph(
            nodes=tuple(in_their_order(self.calls.nodes)),
            image=inputs.image.name,
            image_shape=tuple(image_shape),
            states=states,
            maps=inputs.maps(image_shape),
            constants=inputs.constants,
            outputs=(*outputs, *self.checks),
            num_checks=len(self.checks),
            updates={states[node.name]: self.values.read(node).name for node in changed},
            enables_grad=self.calls.enables_grad,
            changes_image=self.values.is_written(inputs.image),
        )

    def _refuse_layout(self, node: FxNode) -> None:
        """Refuse tensors in a library's private layout, whose memory cannot be counted."""
        value = getattr(self.flat, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
        for tensor in pytree.tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.layout not in _LAYOUTS:
                where = self.calls.line(node) or self.calls.source(node)
                raise UnsupportedModel(
                    f"the forward pass holds a tensor of layout {tensor.layout}"
                    f"{f' in {where!r}' if where else ''}, and dense and sparse ones are allowed: call "
                    "to_dense() on it"
                )

    def _call(self, node: FxNode) -> None:
        target = node.target
        assert callable(target)
        if is_block(target):
            self.calls.enter_or_leave(node)
        elif target is hook_set:
            self._set_hook(node)
        elif _is_check(target):
            self._check(node)
        elif _is_profiling(target):
            pass
        elif changes_shape(target):
            self._plain(node)
        elif len(written := overwritten(node)) == 1 and not isinstance(written[0], tuple):
            self._write_in_place(node, written[0])
        elif written:
            self._write_several(node, [each for part in written for each in _as_tuple(part)])
        elif node.users or "val" in node.meta:
            # A call without users and without a value raised an error, which the model caught.
            self._plain(node)

    def _plain(self, node: FxNode) -> None:
        self.values.note_view(node)
        target = node.target
        assert callable(target)
        args, kwargs = self.values.resolved(node)
        statistics = _statistics(node)
        if statistics and isinstance(args[6], float) and math.isnan(args[6]):
            args = (*args[:6], self.inputs.counter_of(statistics[0]), *args[7:])
        if changes_shape(target):
            target, args, kwargs = functional_of(node, self.calls.source(node))
            args, kwargs = self.values.resolve(args), self.values.resolve(kwargs)
        ref = self.calls.append(node, node.name, target, args, kwargs)
        self.values.set(node, ref)
        for statistic in statistics:
            self._refuse_twice(node, self.values.itself(statistic))
            new = self.calls.fresh(f"{node.name}_moved")
            self.values.write(
                node,
                self.values.itself(statistic),
                self.calls.append(node, new, moved, (self.values.read(statistic), ref), {}),
            )

    def _write_several(self, node: FxNode, written: list[FxNode]) -> None:
        """Record a call that overwrites several values, given in a list or as arguments of their own."""
        functional, args, kwargs = functional_of(node, self.calls.source(node))
        values = [self.values.itself(each) for each in written]
        for value in values:
            self._refuse_twice(node, value)
        if isinstance(functional, OnCopy):
            if functional.returns_written or len(set(map(self.values.owner, values))) < len(values):
                raise UnsupportedModel(
                    f"'{node.name}' ({self.calls.source(node)}) uses {node.target}, which overwrites several "
                    "tensors and returns them, or has two in the same memory; use operators that return new "
                    "tensors instead"
                )
            self._write_beside_results(node, values, functional, args, kwargs)
            return
        results = self.calls.append(
            node, node.name, functional, self.values.resolve(args), self.values.resolve(kwargs)
        )
        self.values.set(node, results)
        for index, value in enumerate(values):
            name = self.calls.fresh(f"{node.name}_{index}")
            item = self.calls.append(node, name, operator.getitem, (results, index), {})
            self.values.write(node, value, item)

    def _set_hook(self, node: FxNode) -> None:
        """Set a hook on the gradient of a value, unless the code has removed it again."""
        hook, on = self.hooks.get(node.name), node.args[0]
        if hook is not None:
            assert isinstance(on, FxNode)
            self.values.set_hook(on, GradientHook(hook, on_meta(self.values.itself(on).meta["val"])))

    def _check(self, node: FxNode) -> None:
        """Record an assertion about a value, to be checked when the pass runs."""
        value, *rest = self.values.resolve(node.args)
        if not isinstance(value, Ref) or "_async" not in str(node.target):
            return  # A check of what is known at capture has passed already.
        message = next((each for each in rest if isinstance(each, str)), "")
        name = self.calls.fresh(f"{node.name}_asserted")
        self.checks.append(self.calls.append(node, name, asserted, (value, message), {}))

    def _write_in_place(self, node: FxNode, written: FxNode) -> None:
        """Record a call that overwrites ``written`` and returns it."""
        written = self.values.itself(written)
        self._refuse_twice(node, written)
        self._refuse_overlap(node, written)
        functional, args, kwargs = functional_of(node, self.calls.source(node))
        if isinstance(functional, OnCopy) and functional.num_results > 0:
            self._write_beside_results(node, [written], functional, args, kwargs)
            return
        # Only then does the in-place operator compute on a tile what the functional one does.
        is_plain = self.values.owns_memory(written) and args == node.args and own_name(node.target)
        args, kwargs = self.values.resolve(args), self.values.resolve(kwargs)
        ref = self.calls.append(
            node,
            node.name,
            functional,
            args,
            kwargs,
            in_place=node.target if is_plain else None,
        )
        self.values.set_same(node, written)
        self.values.write(node, written, ref)

    def _write_beside_results(
        self,
        node: FxNode,
        written: Sequence[FxNode],
        functional: OnCopy,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Record a call that overwrites ``written`` and returns something else, or nothing."""
        count = functional.num_results
        name = self.calls.fresh(f"{node.name}_all")
        every = self.calls.append(
            node, name, functional, self.values.resolve(args), self.values.resolve(kwargs)
        )
        if count == 1:
            self.values.set(node, self.calls.append(node, node.name, operator.getitem, (every, 0), {}))
        elif count > 1:
            self.values.set(node, every)
        for index, each in enumerate(written):
            name = self.calls.fresh(f"{node.name}_written")
            new = self.calls.append(node, name, operator.getitem, (every, count + index), {})
            self.values.write(node, each, new)

    def _refuse_twice(self, node: FxNode, written: FxNode) -> None:
        """Refuse a change of a state under activation checkpointing, which would run it twice."""
        owner = self.values.owner(written)
        if is_recomputed(node) and owner.op in ("placeholder", "get_attr") and self.calls.ambient:
            raise UnsupportedModel(
                f"'{self.inputs.states.get(owner.name, owner.name)}' changes inside checkpoint(), "
                "and plain PyTorch changes it twice, forward and backward: call the layers without "
                "checkpoint() (set_grad_checkpointing(False)); streaming recomputes activations itself"
            )

    def _refuse_overlap(self, node: FxNode, written: FxNode) -> None:
        """Refuse to overwrite values with others of the same tensor that the call overwrites as well."""
        if not is_elementwise(node.target):
            return
        for other in map(self.values.itself, node.all_input_nodes):
            shares = other is not written and self.values.owner(other) is self.values.owner(written)
            if shares and overlap_in_part(written.meta["val"], other.meta["val"]):
                raise UnsupportedModel(
                    f"the forward pass overwrites part of a tensor with values of an overlapping part "
                    f"({self.calls.source(node)}), and what comes out depends on their order in memory: copy "
                    "these first (clone())"
                )

    def _output(self, value: Any) -> Any:
        if not isinstance(value, FxNode):
            return value
        itself = self.values.itself(value)
        if itself.name in self.inputs.states and itself.op == "placeholder":
            return Given(self.inputs.states[itself.name])
        return self.values.read(itself)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _statistics(node: FxNode) -> tuple[FxNode, ...]:
    """The running statistics that a norm updates."""
    if node.target not in UPDATING or not node.args[5]:
        return ()
    return tuple(each for each in node.args[3:5] if isinstance(each, FxNode))


def _is_profiling(target: object) -> bool:
    return isinstance(target, OpOverload) and target.namespace == "profiler"


def _is_check(target: object) -> bool:
    """Whether a call is one of PyTorch's assertions."""
    return isinstance(target, OpOverload) and "_assert" in target._schema.name
