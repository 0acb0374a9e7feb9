"""Lowering of captured calls, one by one: by rules while they stream, else on whole maps.

A call with a map among its operands is given to its operator's rule. If there is no rule, or it refuses, the
maps are gathered and the call becomes a global value.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import streamcnn.capture.lowering.folded_axes  # these ten fill the registries
import streamcnn.capture.lowering.folded_equations
import streamcnn.capture.lowering.folded_images
import streamcnn.capture.lowering.folded_losses
import streamcnn.capture.lowering.folded_products
import streamcnn.capture.lowering.folded_recurrent
import streamcnn.capture.lowering.folded_shapes
import streamcnn.capture.lowering.folded_writing
import streamcnn.capture.lowering.joined_losses
import streamcnn.capture.lowering.joined_products
import streamcnn.graph.ops  # noqa: F401  likewise
from streamcnn.capture.capture import RawNode, moved
from streamcnn.capture.lowering.composed import COMPOSED
from streamcnn.capture.lowering.fake_calls import FakeCalls
from streamcnn.capture.lowering.folding import MERGING, Folded, is_folded, stream_folded, unfolded
from streamcnn.capture.lowering.joined import Joined, as_type, first_ref, is_joined, stream_joined
from streamcnn.capture.lowering.joined_calls import joins_tokens
from streamcnn.capture.lowering.recording import LIKE_OTHERS, Recording, RecordingMark
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.ops.rules import Call, NotStreamable, begins_maps, rule_for
from streamcnn.graph.program import Axes, Kind, Ref, refs_in, substitute

_CAST = torch.ops.aten.to.dtype
_COPY = torch.ops.aten.to.device
_LEAST_POSITIONS = 64
"""Positions of a grid with which streaming begins again."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A point in a lowering, to which it can be forked back."""

    recorded: RecordingMark
    values: int


class Lowering:
    """The lowering of a captured graph's calls, so far."""

    def __init__(self, recording: Recording | None = None) -> None:
        self.recording = Recording(FakeCalls()) if recording is None else recording
        self.values: dict[str, Any] = {}
        """By captured node: a ref, a :class:`Folded` ref, :class:`Joined` ones, a tuple, or a plain value."""
        self._num_images = 0

    def mark(self) -> Mark:
        """The present point, for :meth:`forked`."""
        return Mark(self.recording.mark(), len(self.values))

    def forked(self, mark: Mark) -> Lowering:
        """A copy of the lowering as it was at ``mark``, in which further calls run on whole maps."""
        fork = Lowering(self.recording.forked(mark.recorded))
        fork.values = dict(islice(self.values.items(), mark.values))
        return fork

    # --- what goes in --------------------------------------------------------------------------------

    def add_image(self, name: str, image: Tensor) -> None:
        self._num_images = image.shape[0]
        self.values[name] = self.recording.add(name, image, kind=Kind.IMAGE, axes=(2, 3))

    def add_map(self, name: str, tensor: Tensor, axes: Axes) -> None:
        """Add a further input that is a map, read by regions."""
        self.values[name] = self.recording.add(name, _like(tensor), kind=Kind.IMAGE, axes=axes)

    def add_state(self, name: str, tensor: Tensor) -> None:
        self.values[name] = self.recording.add(name, _like(tensor), kind=Kind.STATE)

    def read_as_map(self, name: str, axes: Axes) -> None:
        """Treat a state as a map from here on."""
        self.values[name] = self.recording.promote(self.values[name], axes)

    # --- calls ---------------------------------------------------------------------------------------

    def lower(self, raw: RawNode) -> None:
        """Lower one captured call."""
        self.recording.raw = raw
        args = substitute(raw.args, self._value)
        kwargs = substitute(raw.kwargs, self._value)
        if raw.target is moved:
            self.values[raw.name] = self.recording.moved[args[0].name]
            return
        if raw.target is operator.getitem:
            value = self._item(raw, *args)
        else:
            value = self.called(self._without_model(Call(raw.target, args, kwargs)))
        self.values[raw.name] = self._as_written(raw, value)

    def _without_model(self, call: Call) -> Call:
        """Make ``x.type_as(y)`` a cast or copy of ``x``, for which no value of ``y`` is read.

        A map does not move.
        """
        if call.target not in LIKE_OTHERS:
            return call
        value, other, *rest = call.args
        given, wanted = self._fake(value), self._fake(other)
        if given.device == wanted.device:
            return Call(_CAST, (value, wanted.dtype, *rest), call.kwargs)
        if not isinstance(value, Ref) or self.recording.axes(value) is not None:
            return call
        return Call(_COPY, (value, wanted.device, wanted.dtype, *rest), call.kwargs)

    def _fake(self, value: Ref | Folded | Joined) -> Any:
        return self.recording.fakes[first_ref(value).name]

    def _as_written(self, raw: RawNode, value: Any) -> Any:
        """A call's result in the dtype of the value it overwrites: ``x += y`` keeps the dtype of ``x``."""
        before = self.values.get(raw.overwrites)
        if before is None:
            # Nothing is overwritten, or nothing reads the old value.
            return value
        return as_type(self, value, self.recording.spec(first_ref(before)).dtype)

    def _value(self, name: str) -> Any:
        return self.values[name]

    def _item(self, raw: RawNode, value: Any, index: int) -> Any:
        if isinstance(value, tuple) and index < len(value):
            return value[index]
        raise UnsupportedModel(
            f"result {index} of an operator in {raw.source or 'the model'} has no streamed form: "
            f"allowed are results 0 to {len(value) - 1 if isinstance(value, tuple) else 0}"
        )

    def called(self, call: Call) -> Any:
        """The result of a call, streamed if it can be."""
        if call.target in COMPOSED:
            composed = COMPOSED[call.target](self, call)
            if composed is not NotImplemented:
                return composed
        operands = [Ref(name) for name in refs_in((call.args, dict(call.kwargs)))]
        merged = is_folded(call)
        recording = self.recording
        in_parts = is_joined(call)
        if in_parts or merged or any(recording.axes(ref) is not None for ref in operands):
            result = self._in_parts(call) if in_parts else self._stream(call, merged=merged)
            if not isinstance(result, NotStreamable):
                return result
            call = self._gather_maps(call)
            recording.note = result.reason
        elif begins_maps(call.target) and not recording.resident:
            result = self._begin(call)
            if not isinstance(result, NotStreamable):
                return result
        rule = rule_for(call.target, without_maps=True)
        if rule is None:
            result = recording.global_value(call.target, *call.args, **call.kwargs)
        else:
            result = rule(recording, call)
        recording.note = ""
        return result

    def _stream(self, call: Call, *, merged: bool) -> Any:
        if self.recording.resident:
            return NotStreamable("")
        if self.recording.moves(call):
            return NotStreamable("it moves a map to another device")
        if merged:
            result = stream_folded(self.recording, call)
            joined = joins_tokens(self, call) if isinstance(result, NotStreamable) else result
            return result if isinstance(joined, NotStreamable) else joined
        result = self.recording.stream(call)
        if any(self._has_no_positions(ref) for ref in pytree.tree_leaves(result) if isinstance(ref, Ref)):
            return NotStreamable("what it gives has no positions")
        if isinstance(result, NotStreamable) and rule_for(call.target) in MERGING:
            merged_result = stream_folded(self.recording, call)
            return result if isinstance(merged_result, NotStreamable) else merged_result
        return result

    def _in_parts(self, call: Call) -> Any:
        return NotStreamable("") if self.recording.resident else stream_joined(self, call)

    def _has_no_positions(self, ref: Ref) -> bool:
        axes = self.recording.axes(ref)
        return axes is not None and 0 in (self.recording.spec(ref).shape[axis] for axis in axes)

    def _begin(self, call: Call) -> Any:
        """Stream a call whose first operand was computed from whole maps; its result is a map again."""
        ref = call.args[0]
        if ref.name not in self.recording.from_whole or self.recording.moves(call):
            return NotStreamable("")
        result: Any = NotStreamable("")
        for axes in self._grids(self.recording.spec(ref).shape):
            promoted = self.recording.promote(ref, axes)
            result = self.recording.stream(Call(call.target, (promoted, *call.args[1:]), call.kwargs))
            if not isinstance(result, NotStreamable):
                break
        return result

    def _grids(self, shape: tuple[int, ...]) -> Iterator[Axes]:
        """Candidates for a tensor's spatial axes when it becomes a map again; any would be exact.

        Axes of channels-last tensors need the extents of a known map. Small maps are not worth streaming.
        """
        if len(shape) != 4 or shape[0] != self._num_images:
            return
        if shape[2] * shape[3] >= _LEAST_POSITIONS:
            yield (2, 3)
        if shape[1] * shape[2] >= _LEAST_POSITIONS and shape[1:3] in self.recording.sizes:
            yield (1, 2)

    def _gather_maps(self, call: Call) -> Call:
        args, kwargs = pytree.tree_map(self.whole, (call.args, dict(call.kwargs)))
        return Call(call.target, args, kwargs)

    def whole(self, value: Any) -> Any:
        """A map gathered to a global value; anything else unchanged."""
        if isinstance(value, Joined):
            parts = [self.whole(part) for part in value.parts]
            return self.recording.global_value(torch.ops.aten.cat.default, parts, value.axis)
        if isinstance(value, Folded):
            return unfolded(self.recording, value)
        is_map = isinstance(value, Ref) and self.recording.axes(value) is not None
        return self.recording.gather(value) if is_map else value

    # --- what comes out ------------------------------------------------------------------------------

    def result(self, name: str, *, keeps_maps: bool = False) -> Any:
        """A result of the model: whole, or with ``keeps_maps`` a stored map if it is computed in tiles."""
        value = self.values[name]
        recording = self.recording
        if keeps_maps and isinstance(value, Ref) and recording.nodes[value.name].kind is Kind.LOCAL:
            fake = recording.fakes[value.name]
            return recording.add(f"result_{value.name}", fake, kind=Kind.RESULT, args=(value,))
        return pytree.tree_map(self.whole, value)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
