"""The inputs of a flat graph: the image, states by their keys, and constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from streamcnn.capture.capture import is_argument, outside_key, spatial_axes
from streamcnn.capture.flat.current_values import CurrentValues
from streamcnn.capture.flat.raw_calls import RawCalls
from streamcnn.errors import UnsupportedModel
from streamcnn.geometry.windows import Axes
from streamcnn.graph.fakes import is_fake
from streamcnn.graph.program import Ref


class GraphInputs:
    """Collects the inputs of ``flat``; ``keys`` are those of its placeholders, None for the image."""

    def __init__(
        self, flat: GraphModule, keys: Sequence[str | None], calls: RawCalls, values: CurrentValues
    ) -> None:
        self.image: FxNode | None = None
        self.states: dict[str, str] = {}
        """Keys of states by the names of their nodes."""
        self.constants: dict[str, Tensor] = {}
        self._flat = flat
        self._keys = iter(keys)
        self._calls = calls
        self._values = values
        self._first_reads: dict[str, FxNode] = {}
        """The first node that reads each constant, by the constant's name in the flat graph."""

    def add_placeholder(self, node: FxNode) -> None:
        """Add the next placeholder, as the image or a state."""
        key = next(self._keys)
        if key is None:
            self.image = node
        else:
            self.states[node.name] = key

    def add_constant(self, node: FxNode) -> None:
        """Add a tensor from outside the module that the graph reads.

        Raises
        ------
        UnsupportedModel
            If the tensor has no values, or requires a gradient while gradients are enabled.
        """
        if not node.users:
            return
        value = getattr(self._flat, str(node.target))
        if not isinstance(value, Tensor) or is_fake(value):
            raise UnsupportedModel(
                f"the forward pass reads a tensor that tracing cannot follow ({self._calls.source(node)}): "
                "a gradient taken inside, a torch.Generator of its own, or a storage that was exchanged"
            )
        if value.requires_grad and self._calls.ambient:
            raise UnsupportedModel(
                "the forward pass reads a tensor from outside that requires a gradient "
                f"({self._calls.source(node)}): register it as a parameter, or pass it to the model"
            )
        # The flat graph has a node for each read of a tensor.
        first = self._first_reads.setdefault(str(node.target), node)
        if first is not node:
            self._values.set_same(node, first)
            return
        self.constants[node.name] = value
        self._values.set(node, Ref(node.name))

    def take_changed_constants(self) -> None:
        """Make states of the constants that the pass changes."""
        for node in self._first_reads.values():
            if self._values.is_written(node):
                del self.constants[node.name]
                self.states[node.name] = outside_key(str(node.target))

    def maps(self, image_shape: tuple[int, ...]) -> dict[str, Axes]:
        """The further arguments that are maps and are not overwritten, with their spatial axes."""
        found = {}
        for node in self._flat.graph.nodes:
            if is_argument(self.states.get(node.name, "")):
                axes = spatial_axes(tuple(node.meta["val"].shape), image_shape)
                if axes is not None and not self._values.is_written(node):
                    found[node.name] = axes
        return found

    def counter_of(self, running: FxNode) -> Any:
        """The present value of the batch counter that belongs to a running mean."""
        key = self.states.get(self._values.itself(running).name, "")
        wanted = f"{key.rpartition('.')[0]}.num_batches_tracked".removeprefix(".")
        for node in self._flat.graph.nodes:
            if self.states.get(node.name) == wanted:
                return self._values.read(node)
        raise UnsupportedModel(
            f"a norm with momentum=None has no counter of batches beside {key or 'its running mean'}: "
            "set a momentum"
        )
