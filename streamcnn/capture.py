"""Capture: the user's module as a flat list of functional ATen calls.

``torch.export`` traces the module on fake tensors in its present mode, so no memory is used. This
module turns the exported graph into :class:`RawGraph`: in-place operators become functional ones and
buffer updates become named results. It decides nothing about streaming.
"""

from __future__ import annotations

import itertools
import logging
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node as FxNode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from streamcnn.errors import UnsupportedModel
from streamcnn.program import Ref

aten = torch.ops.aten

CUMULATIVE = math.nan
"""Stands for batch norm's ``momentum=None`` (a cumulative average) in a captured call."""


@dataclass(frozen=True, slots=True)
class RawNode:
    """One functional call."""

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str
    allocates: bool
    """Whether plain PyTorch makes a new tensor here, rather than a view or a change in place."""
    in_place: Callable[..., Any] | None = None
    """The call as the user's model has it, if that overwrites its first argument."""
    buffer: str | None = None
    """Qualified name of the buffer that takes the result, if the model changes one here."""


@dataclass(frozen=True, slots=True)
class RawGraph:
    """A captured module before any decision is taken."""

    nodes: tuple[RawNode, ...]
    image: str
    image_shape: tuple[int, ...]
    states: dict[str, str]
    """Node name to qualified name of a parameter or buffer."""
    constants: dict[str, torch.Tensor]
    outputs: Any
    updates: dict[str, str]
    """Qualified buffer name to the node that holds its new value."""


def capture(module: torch.nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> RawGraph:
    """The functional graph of ``module`` for an image of ``shape`` (N, C, H, W), in its present mode.

    Raises
    ------
    UnsupportedModel
        If ``torch.export`` cannot trace the module at this shape, with its own reason.
    """
    states = itertools.chain(module.parameters(), module.buffers())
    device = next((state.device for state in states), torch.device("cpu"))
    exported = _export(module, shape, dtype, device)
    return _Functionalizer(exported).run(shape)


def _export(
    module: torch.nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> ExportedProgram:
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(shape, dtype=dtype, device=device)
    try:
        with _marked_cumulative(module), _no_autocast(device), _quiet_export():
            return torch.export.export(module, (image,), strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(
            f"the model cannot be captured for an image of shape {tuple(shape)}: {reason}. "
            "Allowed are modules whose forward takes one image tensor and does not branch on its values; "
            "check that the plain model accepts this shape."
        ) from error


@contextmanager
def _marked_cumulative(module: torch.nn.Module) -> Iterator[None]:
    """Let batch norm with ``momentum=None`` be traced, whose forward reads a counter's value."""
    marked = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.momentum is None]
    for norm in marked:
        norm.momentum = CUMULATIVE
    try:
        yield
    finally:
        for norm in marked:
            norm.momentum = None


@contextmanager
def _no_autocast(device: torch.device) -> Iterator[None]:
    """Capture without casts: they are applied when operators run, as in eager mode."""
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep export's own log of a failed trace off the terminal; its reason is in our error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Functionalizer:
    """Rewrites an exported graph so that no call changes its arguments."""

    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        self.position = {node: index for index, node in enumerate(exported.graph.nodes)}
        self.current: dict[FxNode, FxNode | None] = {}
        """The node that holds a value now, after in-place changes."""
        self.nodes: list[RawNode] = []
        self.states: dict[str, str] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.updates: dict[str, str] = {}
        self.image: FxNode | None = None

    def run(self, shape: tuple[int, ...]) -> RawGraph:
        graph = self.exported.graph
        kinds = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        outputs: Any = None
        for node in graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, kinds[node.name])
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                outputs = self._outputs(node)
            else:
                raise UnsupportedModel(f"captured graph has a {node.op} node '{node.name}', which is unknown")
        assert self.image is not None
        return RawGraph(
            nodes=tuple(self.nodes),
            image=self.image.name,
            image_shape=tuple(shape),
            states=self.states,
            constants=self.constants,
            outputs=outputs,
            updates=self.updates,
        )

    def _placeholder(self, node: FxNode, spec: Any) -> None:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            self.states[node.name] = spec.target
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            self.constants[node.name] = self.exported.constants[spec.target]
        elif self.image is None:
            self.image = node
        else:
            raise UnsupportedModel(
                f"the model takes more than one input ('{self.image.name}' and '{node.name}'): "
                "allowed is one image tensor; wrap the model so that its forward takes the image alone"
            )

    def _outputs(self, node: FxNode) -> Any:
        signature = self.exported.graph_signature
        values = node.args[0]
        assert isinstance(values, (tuple, list))
        results = []
        for spec, value in zip(signature.output_specs, values, strict=True):
            if spec.kind.name == "BUFFER_MUTATION":
                assert isinstance(value, FxNode)
                assert spec.target is not None
                self.updates[spec.target] = self._ref(value).name
            else:
                results.append(self._resolve(value))
        return pytree.tree_unflatten(results, self.exported.call_spec.out_spec)

    def _call(self, node: FxNode) -> None:
        target = node.target
        if _is_check(target):
            return
        assert callable(target)
        if _overwrites(target):
            assert isinstance(target, OpOverload)
            self._in_place(node, target)
            return
        self._append(node, target)

    def _append(self, node: FxNode, target: Callable[..., Any], buffer: str | None = None) -> None:
        self.nodes.append(
            RawNode(
                name=node.name,
                target=target,
                args=tuple(self._resolve(value) for value in node.args),
                kwargs={key: self._resolve(value) for key, value in node.kwargs.items()},
                source=_source_of(node),
                allocates=not (_is_view(node) or _overwrites(node.target)),
                in_place=node.target if callable(node.target) and _overwrites(node.target) else None,
                buffer=buffer,
            )
        )

    def _in_place(self, node: FxNode, target: OpOverload) -> None:
        written = node.args[0]
        assert isinstance(written, FxNode)
        self._refuse_shared_memory(node, written)
        buffer = self.states.get(self._root(written).name)
        self._append(node, functional_of(target, node), buffer)
        self.current[written] = node
        if buffer is not None:
            self.updates[buffer] = node.name

    def _root(self, node: FxNode) -> FxNode:
        """The placeholder or call whose memory in-place operators have been changing."""
        while _overwrites(node.target):
            previous = node.args[0]
            assert isinstance(previous, FxNode)
            node = previous
        return node

    def _refuse_shared_memory(self, node: FxNode, written: FxNode) -> None:
        """An in-place change is only functional if no other name for the memory is read later."""
        for other in _same_memory(written):
            if other is not written and any(
                self.position[user] > self.position[node] for user in other.users
            ):
                raise UnsupportedModel(
                    f"'{node.name}' ({_source_of(node)}) changes a tensor in place that is also read through "
                    f"the view '{other.name}'; use the operator that returns a new tensor instead"
                )

    def _ref(self, node: FxNode) -> Ref:
        while (newer := self.current.get(node)) is not None:
            node = newer
        return Ref(node.name)

    def _resolve(self, value: Any) -> Any:
        def resolve(leaf: Any) -> Any:
            return self._ref(leaf) if isinstance(leaf, FxNode) else leaf

        return torch.fx.node.map_aggregate(value, resolve)


def functional_of(target: OpOverload, node: FxNode) -> Callable[..., Any]:
    """The operator that returns what the in-place ``target`` would have written.

    Raises
    ------
    UnsupportedModel
        If ATen has none.
    """
    name = target._schema.name.split("::")[1]
    if name.startswith("bernoulli_"):
        return aten.bernoulli.p
    if name == "copy_":
        return _copied
    packet = getattr(getattr(torch.ops, target.namespace), name.rstrip("_"), None)
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    if overload is None or not name.endswith("_"):
        raise UnsupportedModel(
            f"'{node.name}' ({_source_of(node)}) uses {target}, which changes its argument in place "
            "and has no functional form; use an operator that returns a new tensor instead"
        )
    return overload  # type: ignore[no-any-return]


def _copied(target: torch.Tensor, value: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return value.to(target.dtype).expand(target.shape)


def _is_check(target: object) -> bool:
    """Whether a call only asserts what export already knows."""
    return isinstance(target, OpOverload) and "_assert" in target._schema.name


def _overwrites(target: object) -> bool:
    """Whether an operator writes its result into its first argument."""
    if not isinstance(target, OpOverload) or not target._schema.arguments:
        return False
    alias = target._schema.arguments[0].alias_info
    return alias is not None and alias.is_write


def _is_view(node: FxNode) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload):
        return False
    alias = node.target._schema.arguments[0].alias_info if node.target._schema.arguments else None
    return alias is not None and not alias.is_write


def _same_memory(node: FxNode) -> set[FxNode]:
    """All nodes that may share memory with ``node`` through views."""
    family = {node}
    frontier = [node]
    while frontier:
        member = frontier.pop()
        relatives = [user for user in member.users if _is_view(user) and user.args[0] is member]
        if _is_view(member) and isinstance(member.args[0], FxNode):
            relatives.append(member.args[0])
        for relative in relatives:
            if relative not in family:
                family.add(relative)
                frontier.append(relative)
    return family


def _source_of(node: FxNode) -> str:
    """Module path in the user's model, if known."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return f"{path or 'model'} ({name.rsplit('.', 1)[-1]})"
