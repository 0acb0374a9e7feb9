"""Code that Dynamo follows otherwise than it runs: blocks such as ``no_grad``, and parameters that come back.

In PyTorch 2.13, Dynamo leaves a ``no_grad`` or ``enable_grad`` block with the mode in which the object was
made, not the mode in which the block was entered. So a function that is decorated outside of a block and
called inside it ends the block. If a function that is decorated in the forward pass raises, Dynamo never
leaves its block; if the function is a generator, Dynamo leaves the block before the first step.

A parameter that code deletes and sets again, to use another weight for one call, is missing from the module
after the pass. Dynamo takes an attribute that hid a method of the class for a while to have existed before,
and fails to delete it. An ``OrderedDict`` of which only the order changes keeps its old order. Dynamo takes
the ``grad`` of a computed tensor, which is None, for a tensor. PyTorch 2.11 follows ``apply`` of an
``autograd.Function`` into PyTorch's own code if it is an attribute of a module.

Dynamo does not know ``saved_variables``, the old name of ``saved_tensors``, which old copies of
EfficientNet's activation read in their gradient. It does not enter locks, such as those of hooks that keep
features.

An index that is an integer tensor without axes, ``x[:, i]``, would end Dynamo's capture, since plain PyTorch
reads its value.

Python's ``max`` and ``min`` of two tensors return one of them. Dynamo takes the larger values of both,
position by position, and gives both a share of the gradient where they are equal.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch import Tensor

from streamcnn.capture.guarded.guarded_image import as_image
from streamcnn.graph.entries import assigned, indexed, is_entry
from streamcnn.graph.flattening import CannotFlatten

_APPLY = getattr(vars(torch.autograd.Function)["apply"], "__func__", None)
"""``Function.apply`` where it is written in Python, as it is before PyTorch 2.14."""
_READ = "method___getitem__"
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_OPERATORS_BY_ENTRIES = SimpleNamespace(**{**vars(operator), "getitem": indexed, "setitem": assigned})


@contextmanager
def code_followed_as_it_runs() -> Iterator[None]:
    """Make Dynamo follow such code as Python runs it, or refuse it, for the block."""
    from torch._dynamo import symbolic_convert
    from torch._dynamo.variables import BuiltinVariable, ctx_manager, dicts, functions, user_defined
    from torch._dynamo.variables import tensor as dynamo_tensors
    from torch._dynamo.variables.misc import AutogradFunctionContextVariable
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
    from torch._dynamo.variables.tensor import TensorVariable

    grad_mode = ctx_manager.GradModeVariable
    with ExitStack() as patches:
        for name, method in _methods_of(grad_mode).items():
            patches.enter_context(patch.object(grad_mode, name, method))
        for name, kind in vars(functions).items():
            if name.startswith("Wrapped") and "call_function" in vars(kind):
                called = _left_in_any_case(kind.call_function)
                patches.enter_context(patch.object(kind, "call_function", called))
        kept = _keeping_parameters(UnspecializedNNModuleVariable.call_method)
        patches.enter_context(patch.object(UnspecializedNNModuleVariable, "call_method", kept))
        # The method that finds attributes has another name from PyTorch 2.14 on.
        finder = "var_getattr" if hasattr(TensorVariable, "var_getattr") else "tp_getattro_impl"
        attribute = _as_autograd_has_it(getattr(TensorVariable, finder))
        patches.enter_context(patch.object(TensorVariable, finder, attribute))
        saved = _by_present_name(getattr(AutogradFunctionContextVariable, finder))
        patches.enter_context(patch.object(AutogradFunctionContextVariable, finder, saved))
        if hasattr(dynamo_tensors, "_ApplyBackwardHook"):
            # PyTorch 2.11 puts a hook in front of writes to the value that came before the hook was set.
            patches.enter_context(patch.object(TensorVariable, "_method_register_hook", _refuse_hook))
            method = functions.UserMethodVariable
            patches.enter_context(patch.object(method, "call_function", _applying(method.call_function)))
        chosen = _one_of_both(BuiltinVariable._call_min_max_binary)
        patches.enter_context(patch.object(BuiltinVariable, "_call_min_max_binary", chosen))
        translator = symbolic_convert.InstructionTranslatorBase
        for name in (_READ, "method___setitem__"):
            # Where Dynamo has no such methods, code with such an index is captured at every pass.
            if hasattr(TensorVariable, name):
                by_entries = _by_entries(getattr(TensorVariable, name))
                patches.enter_context(patch.object(TensorVariable, name, by_entries))
        subscripted = _by_method(BuiltinVariable.call_function)
        patches.enter_context(patch.object(BuiltinVariable, "call_function", subscripted))
        locked = _through_locks(translator.setup_or_before_with)
        patches.enter_context(patch.object(translator, "setup_or_before_with", locked))
        # Until PyTorch 2.13, Dynamo treats it like any other dict.
        ordered = getattr(user_defined, "OrderedDictVariable", dicts.ConstDictVariable)
        patches.enter_context(patch.object(ordered, "call_method", _reordering(ordered.call_method)))
        yield


def _methods_of(grad_mode: Any) -> dict[str, Any]:
    """What stands for methods of Dynamo's variable for ``no_grad``, ``enable_grad`` and ``set_grad_enabled``.

    A stack holds the modes in which the block was entered, as a decorated function may call itself. A mode
    that is set on creation, as by ``with set_grad_enabled(flag)``, needs no entry.
    """
    create, enter, leave, decorate = (
        getattr(grad_mode, name) for name in ("create", "enter", "exit", "call_function")
    )

    def make(tx: Any, target_value: Any, initialized: bool = False, **kwargs: Any) -> Any:
        made = create(tx, target_value, initialized, **kwargs)
        made.modes_before = None if initialized else []
        return made

    def enter_noting(self: Any, tx: Any) -> Any:
        if getattr(self, "modes_before", None) is not None:
            self.modes_before.append(torch.is_grad_enabled())
        return enter(self, tx)

    def leave_as_noted(self: Any, tx: Any, *args: Any) -> Any:
        if getattr(self, "modes_before", None):
            self.initial_values = [self.modes_before.pop()]
        return leave(self, tx, *args)

    def decorate_anew(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        made = decorate(self, tx, args, kwargs)
        self.modes_before = []
        return made

    return {
        "create": staticmethod(make),
        "enter": enter_noting,
        "exit": leave_as_noted,
        "call_function": decorate_anew,
    }


def _left_in_any_case(call_function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of a function decorated in the forward pass: leave its block also if it raises."""

    def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        from torch._dynamo.variables.functions import LocalGeneratorObjectVariable

        try:
            result = call_function(self, tx, args, kwargs)
        except Exception:
            self.context.exit(tx)
            raise
        if isinstance(result, LocalGeneratorObjectVariable):
            raise CannotFlatten("a generator is decorated in the forward pass")
        return result

    return call


def _keeping_parameters(call_method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of a module's method: refuse to delete what Dynamo does not restore."""

    def call(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "__delattr__" and args[0].is_python_constant():
            deleted, module = args[0].as_python_constant(), self.value
            if deleted in (*module._parameters, *module._buffers):
                raise CannotFlatten("the forward pass deletes a parameter or a buffer")
            if deleted not in vars(module) and hasattr(type(module), deleted):
                raise CannotFlatten("the forward pass uncovers an attribute of a module's class")
        return call_method(self, tx, name, args, kwargs)

    return call


def _as_autograd_has_it(found: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap reading a tensor's attribute: a computed tensor's ``grad`` is None, the image's is refused."""

    def get(self: Any, tx: Any, name: str) -> Any:
        from torch._dynamo.variables import ConstantVariable

        if self.source is None and name in ("grad", "_grad", "is_leaf"):
            if self.requires_grad and self.as_proxy().node.target is as_image:
                raise CannotFlatten(f"the forward pass reads {name} of the image")
            if name != "is_leaf" and not tx.output.side_effects.has_pending_mutation_of_attr(self, "grad"):
                return ConstantVariable.create(None)
        return found(self, tx, name)

    return get


def _by_present_name(found: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap reading an attribute of a Function's context: ``saved_variables`` is ``saved_tensors``."""

    def get(self: Any, tx: Any, name: str) -> Any:
        return found(self, tx, "saved_tensors" if name == "saved_variables" else name)

    return get


def _refuse_hook(self: Any, tx: Any, name: str, hook: Any) -> NoReturn:
    raise CannotFlatten(f"{name} of a tensor")


def _through_locks(enter: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap entering a block: enter locks like other blocks, since one thread captures at a time."""

    def setup_or_before_with(self: Any, inst: Any) -> None:
        from torch._dynamo.variables.ctx_manager import NullContextVariable

        given = self.stack[-1].realize()
        if isinstance(getattr(given, "value", None), _LOCKS):
            self.stack[-1] = NullContextVariable()
        enter(self, inst)

    return setup_or_before_with


def _by_entries(called: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap reading or writing ``x[key]``: an index that is a tensor without axes stays one."""

    def call(self: Any, tx: Any, key: Any, *value: Any) -> Any:
        from torch._dynamo.variables import tensor as dynamo_tensors

        if not _names_entry(key):
            return called(self, tx, key, *value)
        with patch.object(dynamo_tensors, "operator", _OPERATORS_BY_ENTRIES):
            return called(self, tx, key, *value)

    return call


def _by_method(call_function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of a built-in function: read ``x[key]`` by the method of ``x`` that is wrapped above."""

    def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.fn is operator.getitem and _example(args[0]) is not None and _names_entry(args[1]):
            method = getattr(args[0].realize(), _READ, None)
            return call_function(self, tx, args, kwargs) if method is None else method(tx, args[1])
        return call_function(self, tx, args, kwargs)

    return call


def _names_entry(key: Any) -> bool:
    from torch._dynamo.variables import TupleVariable

    key = key.realize()
    return any(is_entry(_example(each)) for each in (key.items if isinstance(key, TupleVariable) else [key]))


def _example(variable: Any) -> Any:
    """The fake tensor that stands for a tensor while Dynamo follows code; None for anything else."""
    from torch._dynamo.variables import TensorVariable

    variable = variable.realize()
    return variable.as_proxy().node.meta["example_value"] if type(variable) is TensorVariable else None


def _reordering(call_method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of an ``OrderedDict``'s method: write an entry that is moved to an end back."""

    def call(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        result = call_method(self, tx, name, args, kwargs)
        if name == "move_to_end":
            getattr(self, "_base_vt", self).should_reconstruct_all = True
        return result

    return call


def _applying(call_function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of a bound method, such as ``apply`` of an ``autograd.Function``."""

    def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        from torch._dynamo.variables.misc import AutogradFunctionVariable

        if self.fn is _APPLY and isinstance(self.obj, AutogradFunctionVariable):
            return self.obj.call_method(tx, "apply", list(args), kwargs)
        return call_function(self, tx, args, kwargs)

    return call


def _one_of_both(call_min_max: Callable[..., Any]) -> Callable[..., Any]:
    """``max`` or ``min`` of two values: the second one where it is beyond the first, else the first."""

    def call(self: Any, tx: Any, a: Any, b: Any) -> Any:
        from torch._dynamo.variables import ConstantVariable, TensorVariable, TorchInGraphFunctionVariable

        if a is None or b is None:
            return call_min_max(self, tx, a, b)
        given: list[Any] = [each.realize() for each in (a, b)]
        tensors = [each for each in given if type(each) is TensorVariable]
        if not tensors or any(type(each) not in (TensorVariable, ConstantVariable) for each in given):
            return call_min_max(self, tx, a, b)
        examples = [each.as_proxy().node.meta["example_value"] for each in tensors]
        is_whole = not examples[0].is_floating_point()
        rounds = is_whole and any(isinstance(getattr(each, "value", None), float) for each in given)
        if (
            rounds
            or {each.dtype for each in examples} != {examples[0].dtype}
            or any(map(Tensor.dim, examples))
        ):
            raise CannotFlatten(f"{self.fn.__name__}() of tensors of several values, or of several types")
        # ``b > a`` decides; PyTorch's functions take a tensor first.
        second, first = given
        is_larger = self.fn is max
        if type(first) is not TensorVariable:
            first, second, is_larger = second, first, not is_larger
        compare = TorchInGraphFunctionVariable(torch.gt if is_larger else torch.lt)
        is_beyond = compare.call_function(tx, [first, second], {})
        choose = TorchInGraphFunctionVariable(torch.where)
        return choose.call_function(tx, [is_beyond, given[1], given[0]], {})

    return call
