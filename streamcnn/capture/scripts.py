"""TorchScript while a call is captured: interpreted as written, operator by operator.

PyTorch compiles a script after a few runs. Parts of it then define gradients of their own and run on detached
tensors, so that tracing would see no gradient pass through them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from streamcnn.capture.replacing import replaced_here
from streamcnn.errors import UnsupportedModel

_METHOD: Any = torch._C.ScriptMethod
_FUNCTION: Any = torch._C.ScriptFunction
_call_method = vars(_METHOD)["__call__"]
_call_function = vars(_FUNCTION)["__call__"]


@contextmanager
def interpreted_scripts() -> Iterator[None]:
    """Run this thread's scripted modules and functions in the block without compiling them."""
    with (
        torch.jit.optimized_execution(False),  # type: ignore[attr-defined]
        replaced_here(_METHOD, "__call__", _method),
        replaced_here(_FUNCTION, "__call__", _function),
    ):
        yield


def _method(script: Any, *args: Any, **kwargs: Any) -> Any:
    given = _arguments(script.schema.arguments[1:], args, kwargs)
    if given is None:
        return _call_method(script, *args, **kwargs)  # It raises an error that says what is wrong.
    return _call_function(_uncompiled(script), script.owner, *given)


def _function(script: Any, *args: Any, **kwargs: Any) -> Any:
    given = _arguments(script.schema.arguments, args, kwargs)
    if given is None:
        return _call_function(script, *args, **kwargs)  # It raises an error that says what is wrong.
    return _call_function(_uncompiled(script), *given)


def _uncompiled(script: Any) -> Any:
    """A fresh copy of a script as a function; that of a method takes the module as its first argument."""
    graph = script.inlined_graph.copy()
    _refuse_blocks(graph)
    # A forked call would run in a thread of its own, and be recorded in any order.
    torch._C._jit_pass_inline_fork_wait(graph)
    return torch._C._create_function_from_graph(script.name, graph)


def _refuse_blocks(graph: Any) -> None:
    """Refuse scripts with blocks such as ``no_grad`` and autocast, which tracing cannot see.

    Raises
    ------
    UnsupportedModel
        If the script has such a block.
    """
    entered = [str(next(iter(node.inputs())).type()) for node in graph.findAllNodes("prim::Enter")]
    named = [kind.rpartition(".")[2] for kind in entered if "record_function" not in kind]
    named += ["set_grad_enabled" for _ in graph.findAllNodes("aten::set_grad_enabled")]
    if named:
        raise UnsupportedModel(
            f"a script of the model uses {named[0]}, which cannot be seen from outside of it: use it outside "
            "of the script, detach() what is to have no gradient, or use the module without torch.jit"
        )


def _arguments(declared: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """The values of all declared arguments in order; None if some are missing or undeclared."""
    named, found = dict(kwargs), list(args)
    for argument in declared[len(args) :]:
        if argument.name in named:
            found.append(named.pop(argument.name))
        elif argument.has_default_value():
            found.append(argument.default_value)
        else:
            return None
    return found if len(found) == len(declared) and not named else None


class ScriptedAttributes(dict[str, Any]):
    """The attributes of a scripted module, with buffers and parameters; empty if it is not scripted.

    Assigning an entry assigns the module's attribute.
    """

    def __init__(self, module: nn.Module) -> None:
        is_script = isinstance(module, torch.jit.ScriptModule) and "_concrete_type" in vars(module)
        script: Any = vars(module)["_c"] if is_script else None
        names = vars(module)["_concrete_type"].get_attributes() if is_script else ()
        super().__init__({name: script.getattr(name) for name in names})
        self._script = script

    def __setitem__(self, name: str, value: Any) -> None:
        self._script.setattr(name, value)
        super().__setitem__(name, value)
