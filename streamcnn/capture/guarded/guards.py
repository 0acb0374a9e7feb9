"""Guarded capture: a captured forward pass that is used again for exactly as long as it holds.

Whatever a forward pass reads besides tensors (attributes of any kind, hooks, methods, globals, modes) is
part of its capture. Dynamo, the front half of ``torch.compile``, follows the Python code of a call and
returns the tensor operations as a graph whose inputs are the parameters and buffers. At each later call it
checks, within milliseconds, that nothing the code has read has changed. Dynamo also replays the code's side
effects (counters, attributes, lists), after the graph has been carried out.

Dynamo hands the graph to us as to any compiler. One element, expanded to the image's shape, stands for the
image and takes no memory. The first sizes of images are captured one by one; after several, one capture
serves all further sizes where possible (:mod:`any_size`).
"""

from __future__ import annotations

import threading
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from streamcnn.capture.caller_modes import collector, function_modes_aside
from streamcnn.capture.capture import RawGraph
from streamcnn.capture.guarded.any_size import (
    MANY_SIZES,
    check_any_size,
    given_up_in_time,
    outline,
    with_symbols,
)
from streamcnn.capture.guarded.dynamo_graphs import KeyedGraph, keyed_graph
from streamcnn.capture.guarded.dynamo_leftovers import forget_backend, forget_with, references_kept_in
from streamcnn.capture.guarded.dynamo_settings import dynamo_as_wanted
from streamcnn.capture.guarded.guarded_image import CannotBeGuarded, as_image
from streamcnn.capture.guarded.unseen import Unseen
from streamcnn.capture.lines import line_of
from streamcnn.capture.refusals import first_line
from streamcnn.errors import StreamError
from streamcnn.support.processes import all_processes
from streamcnn.support.recent import Recent

Run = Callable[[RawGraph, Mapping[str, Tensor]], Sequence[Any]]
"""Carries a captured graph out, given the tensors of its states by key; its results in order, without those
that are only checked."""

MOST_GRAPHS = 32
"""Number of graphs kept that are captured for one image size each."""
_MOST_OF_ANY_SIZE = 4
"""Number of graphs kept for a kind of call that serve all further sizes; code that needs more, as it differs
in each pass, is captured for each size."""
_MOST_KINDS = 16
"""Number of kinds of calls for which such graphs are kept."""
_MOST_SIZES = 64
"""Number of sizes for which raw graphs of such a graph are kept."""


def _forward(net: nn.Module, image: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return net(as_image(image), *args, **kwargs)


class _Present(threading.local):
    """This thread's present call."""

    call: _GuardedCall | None = None


_present = _Present()


class GuardedForward:
    """The captured forward passes of one module, each with its guards."""

    def __init__(self) -> None:
        self._of_size: OrderedDict[tuple[_Kind, tuple[int, ...]], _Captures] = OrderedDict()
        """Captures for images of one size, the most recently used last."""
        self._of_any_size: OrderedDict[_Kind, _Captures | None] = OrderedDict()
        """Captures for all further sizes, the most recently used kind last; None for kinds whose sizes are
        captured one by one."""
        self._unseen = Unseen((), {})

    def __call__(
        self,
        net: nn.Module,
        image: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Run,
    ) -> Any:
        """Return ``net(image, *args, **kwargs)``, with the operators carried out by ``run``.

        ``image`` is a stand-in, whose values are not read.

        Raises
        ------
        CannotBeGuarded
            If the forward pass cannot be captured whole; nothing has been run or changed.
        """
        unseen = Unseen.by(net)
        if not unseen.is_same(self._unseen):
            self._unseen = unseen
            self._of_size.clear()
            self._of_any_size.clear()
        kind, size = _kind(net, image, (args, kwargs)), tuple(image.shape[2:])
        needs_size = False
        if (kind, size) not in self._of_size and (captures := self._for_further_sizes(kind)):
            call = _GuardedCall(net, args, kwargs, run)
            try:
                symbols = with_symbols(image, call.arguments)
                return _called(call, captures, image, symbols, given_up_in_time(self._seconds(kind)))
            except (CannotBeGuarded, StreamError):
                if call.has_begun:
                    raise
                needs_size = True
        call = _GuardedCall(net, args, kwargs, run)
        captures = self._for_size(kind, size)
        try:
            return _called(call, captures, image)
        finally:
            # If this size cannot be captured by itself either, the image is at fault.
            if needs_size and call.has_begun:
                self._of_any_size[kind] = None
            if not captures.count:
                self._of_size.pop((kind, size), None)

    @property
    def count(self) -> int:
        """Number of graphs kept."""
        return _count((*self._of_size.values(), *self._of_any_size.values()))

    def _for_size(self, kind: _Kind, size: tuple[int, ...]) -> _Captures:
        """The captures of one size, created if there are none; the least recently used sizes are dropped."""
        captures = self._of_size.setdefault((kind, size), _Captures(check=None))
        if captures.count >= MOST_GRAPHS:
            captures = self._of_size[kind, size] = _Captures(check=None)
        self._of_size.move_to_end((kind, size))
        while len(self._of_size) > 1 and _count(self._of_size.values()) >= MOST_GRAPHS:
            self._of_size.popitem(last=False)
        return captures

    def _for_further_sizes(self, kind: _Kind) -> _Captures | None:
        """The captures for all further sizes; None if sizes of this kind are to be captured one by one."""
        if kind not in self._of_any_size:
            if sum(known == kind for known, _ in self._of_size) < MANY_SIZES:
                return None
            self._of_any_size[kind] = _Captures(check=check_any_size)
        self._of_any_size.move_to_end(kind)
        while len(self._of_any_size) > _MOST_KINDS:
            self._of_any_size.popitem(last=False)
        captures = self._of_any_size[kind]
        if captures is not None and captures.count >= _MOST_OF_ANY_SIZE:
            captures = self._of_any_size[kind] = None
        return captures

    def _seconds(self, kind: _Kind) -> float:
        """Seconds of the slowest capture of one size."""
        of_kind = (captures.seconds for (known, _), captures in self._of_size.items() if known == kind)
        return max(of_kind, default=0.0)


def _count(kept: Iterable[_Captures | None]) -> int:
    return sum(captures.count for captures in kept if captures is not None)


_Kind = tuple[Any, ...]
"""Equal for calls that differ in the image's size at most."""


def _kind(net: nn.Module, image: Tensor, arguments: Any) -> _Kind:
    return net.training, torch.is_grad_enabled(), all_processes(), outline(image, arguments)


def _called(
    call: _GuardedCall, captures: _Captures, image: Tensor, *settings: AbstractContextManager[None]
) -> Any:
    """The result of a call, by an earlier capture or by a new one under further ``settings``."""
    with call.settings:
        kept = references_kept_in(captures.references)
        for each in (dynamo_as_wanted(), kept, collector.off(), *settings):
            call.settings.enter_context(each)
        outer, _present.call = _present.call, call
        try:
            result = captures.followed(call, image)
        finally:
            _present.call = outer
    if not call.has_begun:
        raise CannotBeGuarded("no tensor operation depends on the image")
    return result


class _Captures:
    """Graphs captured from one module's code: Dynamo's compiled function, and the backend that gets them.

    ``check`` raises for graphs that are not valid for the calls they are to serve.
    """

    def __init__(self, check: Callable[[GraphModule], None] | None) -> None:
        self._graphs = _Graphs(check)
        self._compiled: Callable[..., Any] | None = None
        self.references: list[ref[Any]] = []
        """References to objects that guards know by identity."""

    @property
    def count(self) -> int:
        """Number of graphs."""
        return self._graphs.count

    @property
    def seconds(self) -> float:
        """Seconds of the slowest capture."""
        return self._graphs.seconds

    def followed(self, call: _GuardedCall, image: Tensor) -> Any:
        """The result of a call; raises `CannotBeGuarded` if Dynamo cannot follow its code."""
        if self._compiled is None:
            self._compiled = _compiled(self._graphs)
        self._graphs.began = time.perf_counter()
        try:
            return self._compiled(call.net, image, *call.arguments)
        except StreamError:
            raise
        except Exception as error:
            if call.has_begun:
                raise
            line = line_of(str(error))
            raise CannotBeGuarded(f"{first_line(error)} ({line})" if line else first_line(error)) from error


class _Graphs:
    """Dynamo's backend. It has no reference to its owner, as the collector does not see Dynamo's cache."""

    def __init__(self, check: Callable[[GraphModule], None] | None) -> None:
        self._check = check
        self.count = 0
        self.seconds = 0.0
        self.began = 0.0

    def __call__(self, graph: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self._check is not None:
            self._check(graph)
        self.count += 1
        self.seconds = max(self.seconds, time.perf_counter() - self.began)
        return _Captured(graph)


def _compiled(graphs: _Graphs) -> Callable[..., Any]:
    import torch._dynamo

    torch._dynamo.allow_in_graph(as_image)  # type: ignore[no-untyped-call]
    # Dynamo keeps graphs with a code object, and names in its globals. A copy's own are freed with it.
    own = types.FunctionType(_forward.__code__.replace(), {**_forward.__globals__}, "forward")
    # Marks on images say whether their sizes are symbols; for all else settings do.
    forget_with(own)
    compiled = torch.compile(own, backend=graphs, fullgraph=True)
    forget_backend(graphs)
    return compiled


class _Captured:
    """The function that Dynamo calls instead of a graph's operations."""

    # Dynamo wraps it in functions that get a copy of its initial ``__dict__``. With one, the graph would
    # stay, with fake tensors and their weak references to the parameters.
    __slots__ = ("_keyed", "_module")

    def __init__(self, module: GraphModule) -> None:
        self._module: GraphModule | None = module
        self._keyed = Recent[tuple[int, ...], KeyedGraph](_MOST_SIZES)
        """Raw graphs by the sizes that are symbols."""

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        with function_modes_aside():
            return self._carried_out(inputs)

    def _carried_out(self, inputs: Sequence[Any]) -> Sequence[Any]:
        call = _present.call
        assert call is not None
        sizes = tuple(given for given in inputs if isinstance(given, int))

        def make() -> KeyedGraph:
            assert self._module is not None
            return keyed_graph(call.net, call.arguments, self._module, inputs)

        keyed = self._keyed.get(sizes, make)
        if not sizes:
            # Without symbols there is one raw graph only.
            self._module = None
        call.has_begun = True
        call.settings.close()
        return call.run(keyed.graph, keyed.states(inputs))


class _GuardedCall:
    """One call of the module."""

    def __init__(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: Run) -> None:
        self.net = net
        self.arguments = (args, kwargs)
        self.run = run
        self.settings = ExitStack()
        """Contexts that are active during capture, and left before the operators run."""
        self.has_begun = False
