"""Symbols in the place of sizes, and where Dynamo takes them for something else than their numbers.

Where it does it says nothing, and goes on with another number, type or branch than plain PyTorch: code that
comes to such a place is not followed with symbols.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch


class NotOfAnySize(Exception):
    """A capture holds for one size alone, or takes too long with symbols for sizes."""


@contextmanager
def refused_where_they_differ() -> Iterator[None]:
    """A block in which this thread's code is not followed further where a symbol is not as its number.

    Raises
    ------
    NotOfAnySize
        Within Dynamo, there.
    """
    from torch._dynamo import symbolic_convert, utils
    from torch._dynamo.variables.builtin import BuiltinVariable
    from torch._dynamo.variables.tensor import SymNodeVariable

    handlers = symbolic_convert.compare_op_handlers
    checked = _Checked(threading.get_ident())
    with ExitStack() as patches:
        for kind, name, differs in _OTHERWISE:
            patches.enter_context(patch.object(kind, name, checked(vars(kind)[name], differs)))
        identity = {name: checked(handlers[name], _compares_identity) for name in ("is", "is not")}
        patches.enter_context(patch.dict(handlers, identity))
        call = checked(BuiltinVariable.call_function, _calls_identity)
        patches.enter_context(patch.object(BuiltinVariable, "call_function", call))
        attribute = checked(SymNodeVariable.var_getattr, lambda symbol, tx, name: name == "__class__")
        patches.enter_context(patch.object(SymNodeVariable, "var_getattr", attribute))
        contains = utils.iter_contains
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("torch._dynamo") and (
                vars(module).get("iter_contains") is contains
            ):
                patches.enter_context(patch.object(module, "iter_contains", _contains(checked, contains)))
        yield


class _Checked:
    """Makes functions of Dynamo's that refuse some calls in one thread."""

    def __init__(self, thread: int) -> None:
        self._thread = thread

    def __call__(self, function: Callable[..., Any], differs: Callable[..., bool]) -> Callable[..., Any]:
        """``function``, but for calls with arguments for which symbols differ from numbers."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread and differs(*args, **kwargs):
                raise NotOfAnySize("the code does with a size what Dynamo does not do with a symbol")
            return function(*args, **kwargs)

        return call


def _contains(checked: _Checked, function: Callable[..., Any]) -> Callable[..., Any]:
    """``iter_contains``, which overlooks symbols where it searches for a constant."""
    known = checked(
        function, lambda items, search, *_, **__: not _is_symbol(search) and any(map(_is_symbol, items))
    )

    def call(items: Any, *args: Any, **kwargs: Any) -> Any:
        return known(list(items), *args, **kwargs)

    return call


def _compares_identity(tx: Any, operands: Any, *_: Any) -> bool:
    """Whether a symbol is compared with what may be the same object: to Dynamo it never is."""
    return any(map(_is_symbol, operands)) and not any(map(_is_none, operands))


def _calls_identity(function: Any, tx: Any, operands: Any, *_: Any) -> bool:
    return function.fn in (operator.is_, operator.is_not) and _compares_identity(tx, operands)


def _is_symbol(variable: Any) -> bool:
    from torch._dynamo.variables.tensor import SymNodeVariable

    return isinstance(variable, SymNodeVariable)


def _is_none(variable: Any) -> bool:
    return variable.is_python_constant() and variable.as_python_constant() is None


def _is_real(value: object) -> bool:
    return isinstance(value, (float, torch.SymFloat))


def _mixes(number: object, other: object) -> bool:
    """Whether one operand is an integer and the other one is not: of both the larger one keeps its type."""
    return _is_real(number) != _is_real(other)


def _rounds_to_tens(number: object, digits: int | None = None) -> bool:
    return digits is not None and digits < 0


_OTHERWISE: tuple[tuple[type, str, Callable[..., bool]], ...] = (
    (torch.SymInt, "__round__", _rounds_to_tens),
    (torch.SymInt, "__sym_max__", _mixes),
    (torch.SymInt, "__sym_min__", _mixes),
    (torch.SymFloat, "__sym_max__", _mixes),
    (torch.SymFloat, "__sym_min__", _mixes),
)
"""Methods of symbols, and for which operands they are not those of numbers."""
