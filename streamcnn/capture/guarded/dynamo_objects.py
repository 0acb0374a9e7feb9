"""Python objects that Dynamo takes for simpler ones: deques, generators, errors, and numbers of own classes.

In PyTorch 2.13, Dynamo forgets the ``maxlen`` of a ``deque`` that the code reads, so that the code would see
too many items, and append to it in vain. It never runs the ``finally`` blocks of a generator that the code
leaves before its end, and runs one that is kept to its end at once. It makes the text of an error from its
arguments, whatever the error's class says. It looks for a number in a list without asking the objects there
whether they are equal, and takes an object of an ``int`` or ``str`` subclass for a plain one. Of a method
of an object made in the forward pass, it loses what changes in its closure and default arguments.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any, NoReturn
from unittest.mock import patch

from streamcnn.capture.guarded.presence import is_made, is_torchs
from streamcnn.graph.flattening import CannotFlatten

_PLAIN = (int, float, complex, str, bytes)
_END_OF_ITERATION = "CALL_INTRINSIC_1"
"""The instruction to which all of a generator's code leads if it raises, also without a ``try``."""


@contextmanager
def objects_as_they_are() -> Iterator[None]:
    """Make Dynamo treat such objects as Python does, or refuse them, for the block."""
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.variables import BuiltinVariable, builder, functions, lists

    generators = functions.LocalGeneratorObjectVariable
    made: list[Any] = []
    with ExitStack() as patches:

        def exchange(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
            patches.enter_context(patch.object(owner, name, replacement))

        exchange(builder.VariableBuilder, "__call__", _as_it_is(builder.VariableBuilder.__call__))
        exchange(BuiltinVariable, "call_str", _by_its_class(BuiltinVariable.call_str))
        for kind in _errors():
            if "tp_str_impl" in vars(kind):  # from PyTorch 2.14 on
                exchange(kind, "tp_str_impl", _of_its_class(kind.tp_str_impl))
        exchange(generators, "__init__", _noted(generators.__init__, made))
        exchange(generators, "reconstruct", _refuse_kept)
        exchange(OutputGraph, "compile_subgraph", _with_generators_ended(OutputGraph.compile_subgraph, made))
        called = functions.UserFunctionVariable
        exchange(called, "get_source", _with_places(called.get_source))
        exchange(called, "bind_args", _placed_first(called.bind_args))
        exchange(lists, "iter_contains", _asking_objects(vars(lists)["iter_contains"]))
        yield


def _as_it_is(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the making of Dynamo's variable for a value: keep the limit of deques, refuse own numbers."""

    def call(self: Any, value: Any) -> Any:
        from torch._dynamo.variables import ConstantVariable
        from torch._dynamo.variables.lists import DequeVariable

        found = wrap(self, value)
        if isinstance(value, deque) and isinstance(found, DequeVariable):
            found.maxlen = ConstantVariable.create(value.maxlen)
        if isinstance(value, _PLAIN) and not isinstance(value, Enum) and is_made(type(value)):
            raise CannotFlatten(f"the forward pass reads a number or text of class {type(value).__name__}")
        return found

    return call


def _by_its_class(call_str: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``str`` of a value: refuse an error whose class says something else than its arguments."""

    def call(self: Any, tx: Any, arg: Any) -> Any:
        _refuse_own_text(arg)
        return call_str(self, tx, arg)

    return call


def _of_its_class(text_of: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an error's text likewise."""

    def text(self: Any, *args: Any) -> Any:
        _refuse_own_text(self)
        return text_of(self, *args)

    return text


def _errors() -> tuple[Any, ...]:
    """Dynamo's classes for errors, whose modules differ between versions."""
    from torch._dynamo import variables

    return tuple(vars(variables)[f"{name}Variable"] for name in ("Exception", "UserDefinedExceptionObject"))


def _refuse_own_text(value: Any) -> None:
    if isinstance(value, _errors()):
        kind: Any = value.python_type()
        if kind.__str__ is not BaseException.__str__:
            raise CannotFlatten(f"the text of a {kind.__name__} is asked for")


def _noted(initialise: Callable[..., None], made: list[Any]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        made.append(self)

    return init


def _with_places(get_source: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap finding where a function comes from: say so of those to which a place was given."""

    def get(self: Any) -> Any:
        return get_source(self) or vars(self).get("given_place")

    return get


def _placed_first(bind_args: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap entering a function: give one that Dynamo does not know from anywhere a place among globals.

    Without a place, what its closure and default arguments hold would have no guards, and their changes
    would be lost.
    """

    def bind(self: Any, parent: Any, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.source import GlobalSource

        function = self.fn
        held = isinstance(function, types.FunctionType) and (
            function.__closure__ or function.__defaults__ or function.__kwdefaults__
        )
        if held and not self.get_source() and not is_torchs(function):
            name = parent.output.install_global_by_id("function", function)
            self.given_place = GlobalSource(name)
        return bind_args(self, parent, *args, **kwargs)

    return bind


def _refuse_kept(self: Any, codegen: Any) -> NoReturn:
    raise CannotFlatten("the forward pass returns or keeps a generator that it has made")


def _with_generators_ended(compile_subgraph: Callable[..., Any], made: list[Any]) -> Callable[..., Any]:
    """Wrap the end of a capture: refuse generators that were left inside a block, which Python then ends."""

    def compile_all(self: Any, *args: Any, **kwargs: Any) -> Any:
        for generator in made:
            if not _is_under_way(generator):
                continue
            handler = getattr(generator.inline_tracer.next_instruction, "exn_tab_entry", None)
            if handler is not None and handler.target.opname != _END_OF_ITERATION:
                raise CannotFlatten("a generator is left inside a try or with block")
        made.clear()
        return compile_subgraph(self, *args, **kwargs)

    return compile_all


def _is_under_way(generator: Any) -> bool:
    """Whether a generator has begun and not ended."""
    if hasattr(generator, "_frame_state_suspended"):  # since PyTorch 2.14
        return bool(generator._frame_state_suspended())
    tracer = generator.inline_tracer
    return not (tracer is None or tracer.generator_exhausted or generator._is_generator_just_started())


def _asking_objects(contains: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``item in items``: refuse a number as ``item`` among tensors and objects with their own ``==``."""

    def found(items: Iterable[Any], item: Any, *args: Any, **kwargs: Any) -> Any:
        items = list(items)
        is_number = item.is_python_constant() and item.as_python_constant() is not None
        if is_number and any(map(_compares_itself, items)):
            raise CannotFlatten("a number or text is looked for among objects that compare themselves")
        return contains(items, item, *args, **kwargs)

    return found


def _compares_itself(item: Any) -> bool:
    from torch._dynamo.variables import TensorVariable, UserDefinedObjectVariable

    item = item.realize()
    if isinstance(item, TensorVariable):
        return True
    return isinstance(item, UserDefinedObjectVariable) and type(item.value).__eq__ is not object.__eq__
