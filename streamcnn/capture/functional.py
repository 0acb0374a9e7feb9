"""Functionalisation: a flat graph, in which calls overwrite tensors, as one in which none does.

In-place operators become functional ones, and a write to a view is scattered into what it views. Norms write
their statistics like any other call. Reads and writes of the user's tensors keep their order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from streamcnn.capture.capture import (
    Given,
    RawGraph,
    RawNode,
    is_argument,
    moved,
    outside_key,
    spatial_axes,
)
from streamcnn.capture.collectives import in_their_order
from streamcnn.capture.lines import line_of
from streamcnn.errors import UnsupportedModel
from streamcnn.geometry.windows import Axes
from streamcnn.graph.autocast import Casts
from streamcnn.graph.flattening import UPDATING, GradientHook, is_fake, is_recomputed, on_meta
from streamcnn.graph.in_place import (
    OnCopy,
    asserted,
    changes_shape,
    functional_of,
    is_detached,
    is_view,
    overwritten,
    own_name,
    revalued,
    scattered,
)
from streamcnn.graph.program import Ref

_SIDE_EFFECTS = frozenset(
    {"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "lazy_load_decompositions"}
)


def functionalized(
    flat: GraphModule,
    keys: Sequence[str | None],
    image_shape: tuple[int, ...],
    *,
    grad: bool,
    device: torch.device,
    path_of: Callable[[str], str],
    hooks: Mapping[str, Sequence[Callable[..., Any]]] | None = None,
) -> RawGraph:
    """A flat graph with no call that changes its arguments.

    Parameters
    ----------
    keys
        For each input of the graph the key of a state, or ``None`` for the image.
    grad, device
        Whether gradients are on where the pass begins, and where it computes.
    path_of
        The qualified name of a submodule, given its place in the captured call; for messages.
    hooks
        Hooks on gradients by the name of the node that they are set on.

    Raises
    ------
    UnsupportedModel
        If a change in place has no functional form.
    """
    return _Functionalizer(flat, keys, grad, device, path_of, hooks or {}).run(image_shape)


class _Functionalizer:
    """Rewrites a flat graph; see :func:`functionalized`.

    Every value knows whose memory it views. A write to a view is scattered into what it views, up to the
    tensor that owns the memory; another view of that is taken anew when it is read the next time.
    """

    def __init__(
        self,
        flat: GraphModule,
        keys: Sequence[str | None],
        grad: bool,
        device: torch.device,
        path_of: Callable[[str], str],
        hooks: Mapping[str, Sequence[Callable[..., Any]]],
    ) -> None:
        self.flat = flat
        self.keys = list(keys)
        self.grad = self.ambient = grad
        self.device = device
        self.path_of = path_of
        self.casts: list[Casts | None] = [None]
        self.values: dict[FxNode, Any] = {}
        """What reading a node gives now."""
        self.same: dict[FxNode, FxNode] = {}
        """In-place calls and the value that they return."""
        self.viewed: dict[FxNode, FxNode] = {}
        """Views and what they view."""
        self.seen: dict[FxNode, int] = {}
        """How often the memory of a node had been written to when its value was taken."""
        self.writes: dict[FxNode, int] = {}
        self.names: set[str] = {node.name for node in flat.graph.nodes}
        self.nodes: list[RawNode] = []
        self.states: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.first_reads: dict[str, FxNode] = {}
        """By the name of a constant in the flat graph, the node that reads it first."""
        self.image: FxNode | None = None
        self.hooks = hooks
        self.checks: list[Ref] = []
        self.enables_grad = False

    def run(self, image_shape: tuple[int, ...]) -> RawGraph:
        outputs: tuple[Any, ...] = ()
        inputs = iter(self.keys)
        for node in self.flat.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, next(inputs))
            elif node.op == "get_attr":
                self._constant(node)
            elif node.op == "call_function":
                self._call(node)
            else:
                assert node.op == "output", node.op
                outputs = tuple(self._output(value) for value in _as_tuple(node.args[0]))
        if self.image is None:
            raise UnsupportedModel(
                "the model's result does not depend on the image: nothing can be streamed; "
                "call the module itself"
            )
        self._take_changed_constants()
        changed = [n for n in self.flat.graph.nodes if n.name in self.states and self.writes.get(n, 0)]
        return RawGraph(
            nodes=tuple(in_their_order(self.nodes)),
            image=self.image.name,
            image_shape=tuple(image_shape),
            states=self.states,
            maps=self._maps(image_shape),
            constants=self.constants,
            outputs=(*outputs, *self.checks),
            num_checks=len(self.checks),
            updates={self.states[node.name]: self.values[node].name for node in changed},
            enables_grad=self.enables_grad,
            changes_image=bool(self.writes.get(self.image, 0)),
        )

    # --- what goes in --------------------------------------------------------------------------------

    def _placeholder(self, node: FxNode, key: str | None) -> None:
        if key is None:
            self.image = node
        else:
            self.states[node.name] = key
        self.values[node] = self._hooked(node, Ref(node.name))

    def _constant(self, node: FxNode) -> None:
        if not node.users:
            return
        value = getattr(self.flat, str(node.target))
        if not isinstance(value, Tensor) or is_fake(value):
            raise UnsupportedModel(
                f"the forward pass reads a tensor that tracing cannot follow ({_source(node, self)}): "
                "a gradient taken inside, a torch.Generator of its own, or a storage that was exchanged"
            )
        if value.requires_grad and self.ambient:
            raise UnsupportedModel(
                "the forward pass reads a tensor from outside that requires a gradient "
                f"({_source(node, self)}): register it as a parameter, or pass it to the model"
            )
        # A tensor has a node at each place where it is read.
        first = self.first_reads.setdefault(str(node.target), node)
        if first is not node:
            self.same[node] = first
            return
        self.constants[node.name] = value
        self.values[node] = Ref(node.name)

    def _take_changed_constants(self) -> None:
        """Count tensors from outside among the states if the pass changes them."""
        for node in self.first_reads.values():
            if self.writes.get(node, 0):
                del self.constants[node.name]
                self.states[node.name] = outside_key(str(node.target))

    def _maps(self, image_shape: tuple[int, ...]) -> dict[str, Axes]:
        """Further arguments with spatial extent."""
        found = {}
        for node in self.flat.graph.nodes:
            if is_argument(self.states.get(node.name, "")):
                axes = spatial_axes(tuple(node.meta["val"].shape), image_shape)
                if axes is not None and not self.writes.get(node, 0):
                    found[node.name] = axes
        return found

    # --- calls ---------------------------------------------------------------------------------------

    def _call(self, node: FxNode) -> None:
        target = node.target
        assert callable(target)
        name = getattr(target, "__name__", "")
        if name in _SIDE_EFFECTS and not isinstance(target, OpOverload):
            self._block(name, node)
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
            # A call without either has failed, and the model has caught the error.
            self._plain(node)

    def _block(self, name: str, node: FxNode) -> None:
        """Enter or leave a block of the model."""
        if name == "_set_grad_enabled":
            self.grad = bool(node.args[0])
            self.enables_grad = self.enables_grad or (self.grad and not self.ambient)
        elif name == "_enter_autocast":
            device, dtype, enabled = (*node.args, *(None,) * 3)[:3]
            self.casts.append(self._casts(str(device), dtype, bool(enabled)))
        elif name == "_exit_autocast":
            self.casts.pop()

    def _casts(self, device: str, dtype: Any, enabled: bool) -> Casts | None:
        if device != self.device.type:
            return self.casts[-1]
        return Casts(device, (dtype or torch.get_autocast_dtype(device)) if enabled else None)

    def _plain(self, node: FxNode) -> None:
        parent = is_view(node)
        if parent is not None:
            parent = self._itself(parent)
            self.viewed[node] = parent
            self.seen[node] = self.writes.get(self._owner(parent), 0)
        target = node.target
        assert callable(target)
        args, kwargs = self._resolved(node)
        statistics = _statistics(node)
        if statistics and isinstance(args[6], float) and math.isnan(args[6]):
            args = (*args[:6], self._counter(statistics[0]), *args[7:])
        if changes_shape(target):
            target, args, kwargs = functional_of(node, _source(node, self))
            args, kwargs = self._resolve(args), self._resolve(kwargs)
        ref = self._append(node, node.name, target, args, kwargs)
        self.values[node] = self._hooked(node, ref)
        for statistic in statistics:
            self._refuse_twice(node, self._itself(statistic))
            new = self._fresh(f"{node.name}_moved")
            self._write(
                node,
                self._itself(statistic),
                self._append(node, new, moved, (self._read(statistic), ref), {}),
            )

    def _counter(self, running: FxNode) -> Any:
        """The counter of batches that belongs to a running mean, as it is now."""
        key = self.states.get(self._itself(running).name, "")
        wanted = f"{key.rpartition('.')[0]}.num_batches_tracked".removeprefix(".")
        for node in self.flat.graph.nodes:
            if self.states.get(node.name) == wanted:
                return self._read(node)
        raise UnsupportedModel(
            f"a norm with momentum=None has no counter of batches beside {key or 'its running mean'}: "
            "set a momentum"
        )

    def _write_several(self, node: FxNode, written: list[FxNode]) -> None:
        """A call that overwrites several values, in a list or one each."""
        functional, args, kwargs = functional_of(node, _source(node, self))
        values = [self._itself(each) for each in written]
        for value in values:
            self._refuse_twice(node, value)
        if isinstance(functional, OnCopy):
            if functional.returns_written or len(set(map(self._owner, values))) < len(values):
                raise UnsupportedModel(
                    f"'{node.name}' ({_source(node, self)}) uses {node.target}, which overwrites several "
                    "tensors and returns them, or has two in the same memory; use operators that return new "
                    "tensors instead"
                )
            self._write_beside_results(node, values, functional, args, kwargs)
            return
        results = self._append(node, node.name, functional, self._resolve(args), self._resolve(kwargs))
        self.values[node] = results
        for index, value in enumerate(values):
            name = self._fresh(f"{node.name}_{index}")
            item = self._append(node, name, operator.getitem, (results, index), {})
            self._write(node, value, item)

    def _hooked(self, node: FxNode, ref: Ref) -> Ref:
        """The value behind hooks on its gradient; the first one to be set sees it first."""
        for hook in reversed(self.hooks.get(node.name, ())):
            target = GradientHook(hook, on_meta(node.meta["val"]))
            ref = self._append(node, self._fresh(f"{node.name}_hooked"), target, (ref,), {})
        return ref

    def _check(self, node: FxNode) -> None:
        """A call that raises if a value is not as it should be."""
        value, *rest = self._resolve(node.args)
        if not isinstance(value, Ref) or "_async" not in str(node.target):
            return  # It says what is known already.
        message = next((each for each in rest if isinstance(each, str)), "")
        name = self._fresh(f"{node.name}_asserted")
        self.checks.append(self._append(node, name, asserted, (value, message), {}))

    def _write_in_place(self, node: FxNode, written: FxNode) -> None:
        """A call that overwrites ``written`` and returns it."""
        written = self._itself(written)
        self._refuse_twice(node, written)
        functional, args, kwargs = functional_of(node, _source(node, self))
        if isinstance(functional, OnCopy) and functional.num_results > 0:
            self._write_beside_results(node, [written], functional, args, kwargs)
            return
        # Only then does the call as it is do on a tile what the functional one does.
        is_plain = written not in self.viewed and args == node.args and own_name(node.target)
        args, kwargs = self._resolve(args), self._resolve(kwargs)
        ref = self._append(
            node,
            node.name,
            functional,
            args,
            kwargs,
            in_place=node.target if is_plain else None,
        )
        self.same[node] = written
        self._write(node, written, ref)

    def _write_beside_results(
        self,
        node: FxNode,
        written: Sequence[FxNode],
        functional: OnCopy,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """A call that overwrites ``written`` and returns something else, or nothing."""
        count = functional.num_results
        name = self._fresh(f"{node.name}_all")
        every = self._append(node, name, functional, self._resolve(args), self._resolve(kwargs))
        if count == 1:
            self.values[node] = self._append(node, node.name, operator.getitem, (every, 0), {})
        elif count > 1:
            self.values[node] = every
        for index, each in enumerate(written):
            name = self._fresh(f"{node.name}_written")
            new = self._append(node, name, operator.getitem, (every, count + index), {})
            self._write(node, each, new)

    def _write(self, node: FxNode, written: FxNode, ref: Ref) -> None:
        """Give ``written`` a new value, and everything that it is a view of."""
        chain = [written]
        while chain[-1] in self.viewed:
            chain.append(self.viewed[chain[-1]])
        new = {written: ref}
        for view, parent in pairwise(chain):
            before = self._read(parent)
            target, args = scattered(view, before, new[view], _source(node, self))
            name = self._fresh(f"{node.name}_into")
            new[parent] = self._append(node, name, target, args, {})
        self._keep_gradients(node, chain, new)
        owner = chain[-1]
        self.writes[owner] = self.writes.get(owner, 0) + 1
        for member, value in new.items():
            self.values[member] = value
            self.seen[member] = self.writes[owner]

    def _keep_gradients(self, node: FxNode, chain: list[FxNode], new: dict[FxNode, Any]) -> None:
        """A write that autograd does not see changes the values of tensors and not where gradients go."""
        unseen = self.ambient and not self.grad
        for member in chain:
            value = member.meta.get("val")
            if unseen and isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                inside, self.grad = self.grad, self.ambient
                name = self._fresh(f"{node.name}_kept")
                args = (self.values[member], new[member])
                new[member] = self._append(node, name, revalued, args, {})
                self.grad = inside
            unseen = unseen or (self.ambient and is_detached(member))

    def _refuse_twice(self, node: FxNode, written: FxNode) -> None:
        """Activation checkpointing runs its calls again, so that they change a state twice."""
        owner = self._owner(written)
        if is_recomputed(node) and owner.op in ("placeholder", "get_attr") and self.ambient:
            raise UnsupportedModel(
                f"'{self.states.get(owner.name, owner.name)}' changes inside checkpoint(), "
                "and plain PyTorch changes it twice, forward and backward: call the layers without "
                "checkpoint() (set_grad_checkpointing(False)); streaming recomputes activations itself"
            )

    def _append(
        self,
        node: FxNode,
        name: str,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        in_place: Any = None,
    ) -> Ref:
        self.nodes.append(
            RawNode(
                name=name,
                target=target,
                args=args,
                kwargs=kwargs,
                source=_source(node, self),
                line=line_of(node.meta.get("stack_trace")),
                in_place=in_place,
                grad=self.grad,
                casts=self.casts[-1],
            )
        )
        return Ref(name)

    # --- reading -------------------------------------------------------------------------------------

    def _itself(self, node: FxNode) -> FxNode:
        """The value that an in-place call returns."""
        while node in self.same:
            node = self.same[node]
        return node

    def _owner(self, node: FxNode) -> FxNode:
        while node in self.viewed:
            node = self.viewed[node]
        return node

    def _read(self, node: FxNode) -> Any:
        """What ``node`` holds now; a view is taken again if what it views has been written to since."""
        node = self._itself(node)
        if node in self.viewed:
            writes = self.writes.get(self._owner(node), 0)
            if self.seen[node] != writes:
                self.values[node] = self._again(node)
                self.seen[node] = writes
        return self.values[node]

    def _again(self, node: FxNode) -> Ref:
        args, kwargs = self._resolved(node)
        if node.target is operator.getitem:
            parts = node.args[0]
            assert isinstance(parts, FxNode)
            args = (self._again(parts), *args[1:])
        target = node.target
        assert callable(target)
        if changes_shape(target):
            target = functional_of(node, _source(node, self))[0]
        return self._append(node, self._fresh(node.name), target, args, kwargs)

    def _resolved(self, node: FxNode) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args: tuple[Any, ...] = self._resolve(node.args)
        kwargs: dict[str, Any] = self._resolve(node.kwargs)
        return args, dict(kwargs)

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, FxNode):
            return self._read(value)
        if isinstance(value, list):
            return list(map(self._resolve, value))
        if isinstance(value, tuple):
            return tuple(map(self._resolve, value))
        if isinstance(value, dict):
            return {key: self._resolve(each) for key, each in value.items()}
        return value

    def _output(self, value: Any) -> Any:
        if not isinstance(value, FxNode):
            return value
        itself = self._itself(value)
        if itself.name in self.states and itself.op == "placeholder":
            return Given(self.states[itself.name])
        return self._read(itself)

    def _fresh(self, base: str) -> str:
        name, count = base, 0
        while name in self.names:
            count += 1
            name = f"{base}_{count}"
        self.names.add(name)
        return name


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _statistics(node: FxNode) -> tuple[FxNode, ...]:
    """The running statistics that a norm moves."""
    if node.target not in UPDATING or not node.args[5]:
        return ()
    return tuple(each for each in node.args[3:5] if isinstance(each, FxNode))


def _is_profiling(target: object) -> bool:
    return isinstance(target, OpOverload) and target.namespace == "profiler"


def _is_check(target: object) -> bool:
    """Whether a call is one of PyTorch's assertions."""
    return isinstance(target, OpOverload) and "_assert" in target._schema.name


def _source(node: FxNode, functionalizer: _Functionalizer) -> str:
    """Module path in the user's model, if known."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    path = functionalizer.path_of(path)
    return f"{path or 'model'} ({name.rsplit('.', 1)[-1]})"
