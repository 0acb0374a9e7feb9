"""The current contents of a flat graph's values, where calls overwrite memory and views share it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.fx import Node as FxNode

from streamcnn.capture.flat.raw_calls import RawCalls
from streamcnn.capture.flat.saved_values import Overwrite
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.flattening import UPDATING
from streamcnn.graph.in_place import (
    changes_shape,
    exchanges_memory,
    functional_of,
    is_detached,
    is_view,
    revalued,
    scattered,
)
from streamcnn.graph.program import Ref
from streamcnn.graph.whole import GradientHook


class CurrentValues:
    """Values by the node of the flat graph that made them, as they are after the calls so far.

    Every view knows its base. A write to a view is scattered into its base, and so on up to the tensor that
    owns the memory; other views of that tensor are taken again when they are next read.
    """

    def __init__(self, calls: RawCalls) -> None:
        self._calls = calls
        self._values: dict[FxNode, Any] = {}
        """The present value of each node."""
        self._same: dict[FxNode, FxNode] = {}
        """In-place calls, and the value that each returns."""
        self._viewed: dict[FxNode, FxNode] = {}
        """Views, and the base of each."""
        self._seen: dict[FxNode, int] = {}
        """The number of writes to a node's memory when its value was taken."""
        self._writes: dict[FxNode, int] = {}
        self._holders: dict[str, FxNode] = {}
        """The node that each value belongs or belonged to, by the value's name."""
        self._unknown_writes: list[tuple[FxNode, int, str]] = []
        """Writes that no version counts: the memory's owner, the number of earlier calls, and the line."""
        self._hooked: dict[str, Ref] = {}
        """Values behind hooks on their gradients, by name, and the value in front of all hooks."""
        self._scatters: set[str] = set()
        """Calls that scatter a write to a view into its base."""

    # --- what calls do -------------------------------------------------------------------------------

    def set(self, node: FxNode, value: Any) -> None:
        """Set a node's value."""
        self._values[node] = value
        if isinstance(value, Ref):
            self._holders[value.name] = node

    def set_same(self, node: FxNode, other: FxNode) -> None:
        """Note that a node always has the value of another one."""
        self._same[node] = other

    def note_view(self, node: FxNode) -> None:
        """Note a node's base, if the node is a view."""
        parent = is_view(node)
        if parent is not None:
            parent = self.itself(parent)
            self._viewed[node] = parent
            self._seen[node] = self._writes.get(self.owner(parent), 0)

    def write(self, node: FxNode, written: FxNode, ref: Ref) -> None:
        """Give ``written`` the value ``ref``, which the last call made, and scatter it into its bases."""
        self._calls.note_overwritten(self._values[written].name)
        chain = [written]
        while chain[-1] in self._viewed:
            self._refuse_hooked(node, chain[-1])
            chain.append(self._viewed[chain[-1]])
        if _is_unknown(node, chain):
            self._unknown_writes.append((chain[-1], len(self._calls.nodes), self._calls.line(node)))
        new = {written: ref}
        for view, parent in pairwise(chain):
            before = self.read(parent)
            target, args = scattered(view, before, new[view], self._calls.source(node))
            name = self._calls.fresh(f"{node.name}_into")
            self._scatters.add(name)
            new[parent] = self._calls.append(node, name, target, self.resolve(args), {})
        self._keep_gradients(node, chain, new)
        owner = chain[-1]
        self._writes[owner] = self._writes.get(owner, 0) + 1
        for member, value in new.items():
            self.set(member, value)
            self._seen[member] = self._writes[owner]

    def set_hook(self, node: FxNode, target: GradientHook) -> None:
        """Pass the gradient of a node's present value through a hook; the hook set first is called first.

        The hook applies to all readers of the value, also to those from before it was set. It does not apply
        to a view's base, which to autograd does not depend on the view.
        """
        node = self.itself(node)
        held = self.read(node)
        value = self._hooked.get(held.name, held)
        spared = self._scatters if node in self._viewed else ()
        hooked, position = self._calls.insert_behind(value, target, spared)
        self._unknown_writes = [
            (owner, count + (count > position), line) for owner, count, line in self._unknown_writes
        ]
        self._hooked[held.name if held != value else hooked.name] = value
        self._holders.setdefault(value.name, node)
        for each, present in list(self._values.items()):
            if present == value:
                self.set(each, hooked)

    def _refuse_hooked(self, node: FxNode, view: FxNode) -> None:
        """Refuse to overwrite a view that has a hook: autograd would then skip the hook, and we would not."""
        held = self._values[view]
        if isinstance(held, Ref) and held.name in self._hooked:
            raise UnsupportedModel(
                f"the forward pass sets a hook on the gradient of a view ('{view.name}'), and then "
                f"overwrites it or a part of it ({self._calls.line(node) or self._calls.source(node)}): set "
                "the hook afterwards, or on a copy of the view (clone())"
            )

    def _keep_gradients(self, node: FxNode, chain: list[FxNode], new: dict[FxNode, Any]) -> None:
        """Make a write that autograd does not see change values only, and not the flow of gradients."""
        unseen = self._calls.ambient and not self._calls.grad
        for member in chain:
            value = member.meta.get("val")
            if unseen and isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                inside, self._calls.grad = self._calls.grad, self._calls.ambient
                name = self._calls.fresh(f"{node.name}_kept")
                args = (self._values[member], new[member])
                new[member] = self._calls.append(node, name, revalued, args, {})
                self._calls.grad = inside
            unseen = unseen or (self._calls.ambient and is_detached(member))

    def unknown_writes(self) -> Iterator[Overwrite]:
        """The writes that autograd does not see, such as those through ``.data``."""
        for owner, position, line in self._unknown_writes:
            memory = {name for name, node in self._holders.items() if self.owner(node) is owner}
            yield Overwrite(memory, position, line)

    # --- reading -------------------------------------------------------------------------------------

    def owns_memory(self, node: FxNode) -> bool:
        """Whether a value owns its memory, rather than being a view."""
        return node not in self._viewed

    def is_written(self, node: FxNode) -> bool:
        """Whether a value, or a view of it, has been written to."""
        return self._writes.get(node, 0) > 0

    def itself(self, node: FxNode) -> FxNode:
        """The value that an in-place call returns."""
        while node in self._same:
            node = self._same[node]
        return node

    def owner(self, node: FxNode) -> FxNode:
        """The value that owns a node's memory."""
        while node in self._viewed:
            node = self._viewed[node]
        return node

    def read(self, node: FxNode) -> Any:
        """The present value of ``node``; a view is taken again if its memory was written to since."""
        node = self.itself(node)
        if node in self._viewed:
            writes = self._writes.get(self.owner(node), 0)
            if self._seen[node] != writes:
                self.set(node, self._again(node))
                self._seen[node] = writes
        return self._values[node]

    def _again(self, node: FxNode) -> Ref:
        args, kwargs = self.resolved(node)
        if node.target is operator.getitem:
            parts = node.args[0]
            assert isinstance(parts, FxNode)
            args = (self._again(parts), *args[1:])
        target = node.target
        assert callable(target)
        if changes_shape(target):
            target = functional_of(node, self._calls.source(node))[0]
        return self._calls.append(node, self._calls.fresh(node.name), target, args, kwargs)

    def resolved(self, node: FxNode) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments, with nodes replaced by their present values."""
        args: tuple[Any, ...] = self.resolve(node.args)
        kwargs: dict[str, Any] = self.resolve(node.kwargs)
        return args, dict(kwargs)

    def resolve(self, value: Any) -> Any:
        """An argument, with the nodes in it replaced by their present values."""
        if isinstance(value, FxNode):
            return self.read(value)
        if isinstance(value, list):
            return list(map(self.resolve, value))
        if isinstance(value, tuple):
            return tuple(map(self.resolve, value))
        if isinstance(value, dict):
            return {key: self.resolve(each) for key, each in value.items()}
        return value


def _is_unknown(node: FxNode, chain: list[FxNode]) -> bool:
    """Whether autograd does not see a write: through ``.data``, by ``x.data = y``, or of statistics."""
    if exchanges_memory(node):
        return chain[-1].op == "placeholder"
    return node.target in UPDATING or any(map(is_detached, chain))
