"""Recording of a raw graph's calls, each with a name and with the blocks around it."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from streamcnn.capture.capture import RawNode
from streamcnn.capture.lines import line_of
from streamcnn.graph.autocast import Casts
from streamcnn.graph.program import Ref, substitute

_BLOCKS = frozenset({"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "lazy_load_decompositions"})


def is_block(target: object) -> bool:
    """Whether a call only enters or leaves a block of the model, or does nothing."""
    return getattr(target, "__name__", "") in _BLOCKS and not isinstance(target, OpOverload)


class RawCalls:
    """The calls recorded for those of ``flat``; other parameters are as for ``functionalized``."""

    def __init__(
        self, flat: GraphModule, grad: bool, device: torch.device, path_of: Callable[[str], str]
    ) -> None:
        self.nodes: list[RawNode] = []
        self.grad = self.ambient = grad
        """Whether gradients are on: here, and where the pass begins."""
        self.enables_grad = False
        """Whether a block turns gradients on where they were off."""
        self._device = device
        self._path_of = path_of
        self._casts: list[Casts | None] = [None]
        self._names = {node.name for node in flat.graph.nodes}

    def enter_or_leave(self, node: FxNode) -> None:
        """Enter or leave a block of the model, such as ``no_grad`` or autocast."""
        name = getattr(node.target, "__name__", "")
        if name == "_set_grad_enabled":
            self.grad = bool(node.args[0])
            self.enables_grad = self.enables_grad or (self.grad and not self.ambient)
        elif name == "_enter_autocast":
            device, dtype, enabled = (*node.args, *(None,) * 3)[:3]
            self._casts.append(self._casts_in(str(device), dtype, bool(enabled)))
        elif name == "_exit_autocast":
            self._casts.pop()

    def _casts_in(self, device: str, dtype: Any, enabled: bool) -> Casts | None:
        if device != self._device.type:
            return self._casts[-1]
        return Casts(device, (dtype or torch.get_autocast_dtype(device)) if enabled else None)

    def append(
        self,
        node: FxNode,
        name: str,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        in_place: Any = None,
    ) -> Ref:
        """Record a call that stems from ``node``, and return its value."""
        self.nodes.append(
            RawNode(
                name=name,
                target=target,
                args=args,
                kwargs=kwargs,
                source=self.source(node),
                line=self.line(node),
                in_place=in_place,
                grad=self.grad,
                casts=self._casts[-1],
            )
        )
        return Ref(name)

    def insert_behind(
        self, value: Ref, target: Callable[..., Any], spared: Container[str]
    ) -> tuple[Ref, int]:
        """Make all calls that read ``value`` read ``target(value)`` instead, except ``spared`` ones, by name.

        Returns
        -------
        tuple[Ref, int]
            The new value, and the number of calls before it.
        """
        position = next((i + 1 for i, each in enumerate(self.nodes) if each.name == value.name), 0)
        made = Ref(self.fresh(f"{value.name}_hooked"))
        like = self.nodes[position - 1] if position else None
        grad = self.ambient if like is None else like.grad
        source, line = ("", "") if like is None else (like.source, like.line)
        call = RawNode(made.name, target, (value,), {}, source, grad=grad, line=line)

        def read(name: str) -> Ref:
            return made if name == value.name else Ref(name)

        for place in range(position, len(self.nodes)):
            node = self.nodes[place]
            if value.name in node.operands and node.name not in spared:
                args, kwargs = substitute(node.args, read), substitute(node.kwargs, read)
                self.nodes[place] = replace(node, args=args, kwargs=kwargs)
        self.nodes.insert(position, call)
        return made, position

    def note_overwritten(self, name: str) -> None:
        """Note that the last call's result overwrites the value ``name``."""
        self.nodes[-1] = replace(self.nodes[-1], overwrites=name)

    def fresh(self, base: str) -> str:
        """A new name that no call has, derived from ``base``."""
        name, count = base, 0
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        return name

    def line(self, node: FxNode) -> str:
        """Line of the user's code that made ``node``; empty if unknown."""
        return line_of(node.meta.get("stack_trace"))

    def source(self, node: FxNode) -> str:
        """Path and class of the submodule that made ``node``; empty if unknown."""
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return ""
        path, kind = list(stack.values())[-1]
        name = kind if isinstance(kind, str) else kind.__name__
        path = self._path_of(path)
        return f"{path or 'model'} ({name.rsplit('.', 1)[-1]})"
