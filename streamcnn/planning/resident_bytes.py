"""Projected bytes of operators on whole values, which run as in plain PyTorch.

Values live until their last reader has run, or longer if autograd has saved them (see
:class:`~streamcnn.graph.costs.Saves`). In the backward pass, saved values are freed one by one while the
parameters' gradients appear. A value's gradient lives from the value's last reader to the operator that made
the value. Views and the elements of a tuple take no memory of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from torch.utils._pytree import tree_leaves

from streamcnn.graph.costs import CallBytes, Operation, Routine, cost_of, is_view
from streamcnn.graph.program import Kind, Program, Ref
from streamcnn.plan.level_bytes import Ints
from streamcnn.plan.storage import MemoryTerm
from streamcnn.planning.backends import Backend
from streamcnn.planning.routines import num_sizes
from streamcnn.planning.step_bytes import StepBytes

_KINDS = (
    "saved by the resident tail",
    "parameter gradients",
    "operands, results and their gradients",
    "operator workspace",
)
"""The terms of what is held at one operator."""


class ResidentBytes:
    """Bytes of operators that run one after another on whole values, and are differentiated in reverse.

    Parameters
    ----------
    names
        Global values, in the order in which they are computed.
    differentiated
        All nodes that a gradient passes through; none without a backward pass.
    asked
        Values that are also read elsewhere, or are results: they stay, as far as they are among ``names``.
    """

    def __init__(
        self,
        program: Program,
        names: Sequence[str],
        backend: Backend,
        differentiated: Collection[str],
        asked: Collection[str] = (),
    ) -> None:
        self.program = program
        self.names = names
        self.backend = backend
        self.differentiated = frozenset(differentiated)
        self._places = {name: place for place, name in enumerate(names)}
        self._owners = {name: self._owner(name) for name in names}
        """By value: the value that owns its memory, which may have been made before these operators."""
        self._last = dict(self._places)
        """By value: the place of the last operator that reads its memory."""
        self._saved: dict[str, int] = {}
        """Values that autograd keeps, with the place of the first operator whose backward pass needs each."""
        for place, name in enumerate(names):
            operands = (self._owners[o] for o in program.nodes[name].operands if o in self._places)
            self._last.update(dict.fromkeys((*operands, self._owners[name]), place))
            for value in self._saved_by(name):
                self._saved.setdefault(value, place)
        self._asked = {self._owners[name] for name in asked if name in self._places}
        self._beside = self._each(self._saved_beside)
        """By operator: bytes that autograd saves beside operands and result."""

    @property
    def staying(self) -> int:
        """Bytes held when all operators have run."""
        # Results of reductions are needed again when the reductions are differentiated.
        reduced = {name for name in self.names if self.program.nodes[name].kind is Kind.REDUCTION}
        return sum(map(self._size, self._saved.keys() | self._asked | reduced)) + int(self._beside.sum())

    def step(self) -> StepBytes:
        """The peak: the operator, forward or backward, at which most memory is held."""
        directions = [self._forward(), *([self._backward()] if self.differentiated else [])]
        most = max(directions, key=lambda terms: terms.sum(axis=0).max(initial=0))
        name, held = "", [0] * len(_KINDS)
        if self.names:
            worst = int(most.sum(axis=0).argmax())
            name, held = self.names[worst], most[:, worst].tolist()
        num_kernels = num_sizes(self.program, self.names, Routine.CONVOLUTION)
        if self.differentiated:
            # Forward there is one kernel for each; backward, in a step of its own, there are two.
            num_kernels *= 2
        num_products = num_sizes(self.program, self.names, Routine.MATRIX_PRODUCT)
        sizes = (*map(self._size, self._saved), *self._beside.tolist())
        return StepBytes(
            terms=(*map(MemoryTerm, _KINDS, held), *self.backend.step_terms(num_kernels, num_products)),
            operator=name,
            reusable=sum(nbytes for nbytes in sizes if nbytes < self.backend.reusable_bytes),
        )

    def _forward(self) -> Ints:
        """(kinds, operators): bytes held while each operator runs."""
        saved = self._living(self._saved.keys(), self._saved) + self._beside.cumsum()
        values = self._living(self._last.keys() - self._saved.keys(), self._asked) + self._each(self._inner)
        return np.array((saved, np.zeros_like(saved), values, self._each(self._workspace)))

    def _backward(self) -> Ints:
        """(kinds, operators): bytes held while each operator is differentiated."""
        saved = self._array(self._saved_bytes()).cumsum() + self._beside.cumsum()
        given = self._array(self._state_bytes())[::-1].cumsum()[::-1]
        flow = self._living(self._last.keys() & self.differentiated, ())
        flow += self._each(self._gradient_copies) + 2 * self._each(self._inner)
        return np.array((saved, given, flow, self._each(partial(self._workspace, backward=True))))

    # --- values --------------------------------------------------------------------------------------

    def _owner(self, name: str) -> str:
        while view_of := self.program.nodes[name].view_of:
            name = view_of
        return name

    def _size(self, name: str) -> int:
        """Bytes of a value's own memory if it is made here; a tuple's are counted for its elements."""
        node = self.program.nodes[name]
        is_tuple = node.kind is Kind.GLOBAL and isinstance(node.spec, tuple)
        return node.nbytes if self._owners.get(name) == name and not is_tuple else 0

    def _living(self, values: Iterable[str], staying: Collection[str]) -> Ints:
        """By operator: bytes of ``values``, each from its own operator to its last reader, or to the end."""
        changes = np.zeros(len(self.names) + 1, np.int64)
        for name in self._places.keys() & values:
            nbytes = self._size(name)
            changes[self._places[name]] += nbytes
            changes[len(self.names) if name in staying else self._last[name] + 1] -= nbytes
        return changes[:-1].cumsum()

    def _saved_bytes(self) -> dict[str, int]:
        """Bytes that autograd keeps, by the first operator whose backward pass needs them."""
        found: dict[str, int] = {}
        for value, place in self._saved.items():
            found[self.names[place]] = found.get(self.names[place], 0) + self._size(value)
        return found

    def _each(self, nbytes: Callable[[str], int]) -> Ints:
        """By operator: what a function returns for it."""
        return np.array([nbytes(name) for name in self.names], np.int64)

    def _array(self, nbytes: Mapping[str, int]) -> Ints:
        """By operator: its bytes, or 0 if it has none."""
        return np.array([nbytes.get(name, 0) for name in self.names], np.int64)

    # --- one operator --------------------------------------------------------------------------------

    def _saved_by(self, name: str) -> Iterator[str]:
        """The values made here that autograd keeps for an operator's backward pass."""
        node, nodes = self.program.nodes[name], self.program.nodes
        if node.target is operator.getitem:
            if node.operands[0] in self._saved:
                yield name
        elif name in self.differentiated and not node.view_of and not is_view(node.target):
            saves = cost_of(node.target).saves
            if saves.result:
                yield name
            operands = [
                leaf.name for leaf in tree_leaves((node.args, dict(node.kwargs))) if isinstance(leaf, Ref)
            ]
            trained = [operand in self.differentiated for operand in operands]
            for operand, is_trained in zip(operands, trained, strict=True):
                is_factor = saves.factors and sum(trained) > is_trained
                if operand in self._places and not nodes[operand].is_map and (saves.operands or is_factor):
                    yield self._owners[operand]

    def _saved_beside(self, name: str) -> int:
        beside = cost_of(self.program.nodes[name].target).saves.beside
        return beside(self._call(name)) if beside and name in self.differentiated else 0

    def _inner(self, name: str) -> int:
        """Bytes of tensors that a call computes beside its result and drops again."""
        inner = cost_of(self.program.nodes[name].target).inner
        return inner(self._call(name)) if inner else 0

    def _call(self, name: str) -> Operation:
        node, fuses_attention = self.program.nodes[name], self.backend.fuses_attention
        return Operation.of(self.program, node, self.differentiated, fuses_attention=fuses_attention)

    def _workspace(self, name: str, *, backward: bool = False) -> int:
        """Bytes of an operator's workspace, for parameters and their gradients too."""
        node, nodes = self.program.nodes[name], self.program.nodes
        operands = (nodes[n] for n in node.operands)
        weights = sum(nodes[n].nbytes for n in node.operands if nodes[n].kind is Kind.STATE)
        # Maps that a reduction or a gather reads are in their stores, never here as a whole.
        values = sum(n.nbytes for n in operands if n.kind is not Kind.STATE and not n.is_map)
        itemsize = max((spec.dtype.itemsize for spec in node.specs), default=1)
        nbytes, cost = CallBytes(values, node.nbytes, 2 * weights, itemsize), cost_of(node.target)
        return (self.backend.backward_workspace if backward else self.backend.workspace)(cost, nbytes)

    def _gradient_copies(self, name: str) -> int:
        """Bytes of gradients beyond one per value, such as one that is added to a gradient that is there."""
        if name not in self.differentiated:
            return 0
        node, nodes, place = self.program.nodes[name], self.program.nodes, self._places[name]
        found = 0
        for operand in node.operands:
            if (
                operand not in self.differentiated
                or nodes[operand].kind is Kind.STATE
                or nodes[operand].is_map
            ):
                continue
            owner = self._owners.get(operand, operand)
            if owner not in self._places or self._last[owner] > place:
                found += nodes[owner].nbytes
            # Of an expanded value every repetition has a gradient.
            found += max(0, nodes[operand].nbytes - nodes[owner].nbytes)
        return found + (max(0, node.nbytes - nodes[self._owners[name]].nbytes) if node.view_of else 0)

    def _state_bytes(self) -> dict[str, int]:
        """Bytes of parameter gradients, by a parameter's last reader, which first gives it a gradient."""
        nodes = self.program.nodes
        last = {state: name for name in self.names for state in nodes[name].operands}
        found: dict[str, int] = {}
        for state, reader in last.items():
            if state in self.program.states and state in self.differentiated:
                found[reader] = found.get(reader, 0) + nodes[state].tensor.gradient_bytes
        return found
