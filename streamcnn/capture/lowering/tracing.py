"""From a captured graph to a :class:`Program`: every call lowered by its rule and classified.

The trace computes on fake tensors, under the autocast state of the pass, so every node has the shape and
dtype that it will have in the pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from streamcnn.capture.capture import RawGraph
from streamcnn.capture.lowering.calls import Lowering, Mark
from streamcnn.capture.lowering.recording import Recording
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.costs import draws
from streamcnn.graph.fakes import TRACING
from streamcnn.graph.program import Axes, Kind, Node, Program, reached, refs_in, substitute
from streamcnn.graph.together import with_updates_together
from streamcnn.graph.whole import GradientHook, OnlyResult, Whole


class Trace:
    """A captured graph traced once, from which programs with different resident tails are made.

    Parameters
    ----------
    states
        The module's parameters and buffers by qualified name; only shape, dtype and device are used.
    dtype, device
        The image's dtype and device.
    read
        Keys of further arguments that are read by regions, with their spatial axes.
    keeps_results
        Whether results that are maps stay in their stores, rather than being gathered.
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
        self._maps = {name: key for name, key in graph.states.items() if key in read}
        """Inputs that are read by regions, besides the image."""
        self._marks: dict[str, Mark] = {}
        """The point in the lowering before each captured call."""
        with self._on_fakes():
            self._lowering = lowering = Lowering()
            lowering.add_image(graph.image, torch.empty(graph.image_shape, dtype=dtype, device=device))
            for name, key in graph.states.items():
                if key in read:
                    lowering.add_map(name, states[key], read[key])
                else:
                    lowering.add_state(name, states[key])
            for name, constant in graph.constants.items():
                lowering.add_state(name, constant)
            for name, axes in graph.maps.items():
                if name not in self._maps:
                    lowering.read_as_map(name, axes)
            for raw in graph.nodes:
                self._marks[raw.name] = lowering.mark()
                lowering.lower(raw)

    def program(self, tail: str | None = None) -> Program:
        """The program in which everything from the captured call ``tail`` on runs resident, on whole maps.

        Programs share the nodes before their tails. With ``None`` there is no tail.
        """
        lowering = self._lowering
        if tail is not None:
            lowering = lowering.forked(self._marks[tail])
            position = next(i for i, raw in enumerate(self._graph.nodes) if raw.name == tail)
            with self._on_fakes():
                for raw in self._graph.nodes[position:]:
                    lowering.lower(raw)
        with self._on_fakes():
            return self._made_of(lowering)

    @contextmanager
    def _on_fakes(self) -> Iterator[None]:
        """Run calls in the block on fake tensors, without values."""
        with TRACING, self._mode, torch.no_grad():
            yield

    def _made_of(self, lowering: Lowering) -> Program:
        """The program of all calls, without unused nodes."""
        graph = self._graph
        outputs = substitute(graph.outputs, partial(lowering.result, keeps_maps=self._keeps_results))
        updates = {key: lowering.result(name).name for key, name in graph.updates.items()}
        nodes = lowering.recording.nodes
        roots = (*refs_in(outputs), *updates.values(), *_run_if_unread(nodes), graph.image)
        needed = set(reached(nodes, roots))
        _refuse_unread_draws(nodes, needed)
        unread = graph.states.keys() - self._maps.keys() - needed
        zeroed = frozenset(unread & _cut_off(lowering.recording, needed))
        needed |= zeroed
        read = {name: key for name, key in graph.states.items() if name in needed}
        nodes = {name: node for name, node in nodes.items() if name in needed}
        return Program(
            nodes=with_updates_together(nodes, updates.values(), refs_in(outputs)),
            image=graph.image,
            states={name: key for name, key in read.items() if name not in self._maps},
            maps={name: key for name, key in read.items() if name in self._maps},
            outputs=outputs,
            updates=updates,
            constants={name: c for name, c in graph.constants.items() if name in needed},
            zeroed=zeroed,
        )


def _cut_off(recording: Recording, needed: Collection[str]) -> set[str]:
    """What values depended on that were cut off from those that are needed."""
    nodes = {name: node for name, node in recording.nodes.items() if node.grad}
    cut = (name for kept, off in recording.cut.items() if kept in needed for name in off)
    return set(reached(nodes, cut))


def _run_if_unread(nodes: Mapping[str, Node]) -> Iterator[str]:
    """Nodes that run even if nothing reads them, since they change the random state: small draws, and the
    user's functions, which may draw."""
    for node in nodes.values():
        target = node.target
        is_users = isinstance(target, (Whole, OnlyResult)) and not isinstance(target, GradientHook)
        if node.kind is Kind.GLOBAL and (is_users or (draws(target) and not _reads_map(nodes, node))):
            yield node.name


def _reads_map(nodes: Mapping[str, Node], node: Node) -> bool:
    return any(nodes[name].kind is Kind.GATHER for name in node.operands)


def _refuse_unread_draws(nodes: Mapping[str, Node], needed: set[str]) -> None:
    for node in nodes.values():
        unread = node.name not in needed and draws(node.target)
        if unread and node.kind is Kind.GLOBAL and _reads_map(nodes, node):
            raise UnsupportedModel(
                f"'{node.name}' ({node.source or 'the model'}) draws random numbers of a map's size that "
                "nothing reads: remove it, since the numbers drawn later depend on it"
            )
