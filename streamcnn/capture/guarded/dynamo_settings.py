"""Dynamo with the settings that captures need, whatever the user has set, and without log output."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

from streamcnn.capture.guarded.dynamo_objects import objects_as_they_are
from streamcnn.capture.guarded.dynamo_slips import code_followed_as_it_runs
from streamcnn.capture.guarded.presence import presence_guarded
from streamcnn.capture.lines import TORCH_FOLDER


@contextmanager
def dynamo_as_wanted() -> Iterator[None]:
    """Give Dynamo the settings that captures need, for the block."""
    from torch._dynamo import config, guards, symbolic_convert
    from torch._dynamo.variables.misc import RandomVariable
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    handlers = TorchInGraphFunctionVariable._get_handlers()
    many = 2**30
    with ExitStack() as settings:
        settings.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"torch\._dynamo")
        settings.enter_context(patch.dict(handlers, _plain_answers()))
        settings.enter_context(presence_guarded())
        settings.enter_context(code_followed_as_it_runs())
        settings.enter_context(objects_as_they_are())
        # Dynamo would ignore them, the second one until PyTorch 2.11.
        for setting in ("set_materialize_grads", "mark_dirty"):
            settings.enter_context(_unfollowed(torch.autograd.function.FunctionCtx, setting))
        # The generator's state would be part of the graph, and of no guard.
        settings.enter_context(patch.object(RandomVariable, "is_supported_random_obj", _never))
        for name in ("torch._dynamo", "torch._subclasses.fake_tensor"):
            settings.enter_context(silenced(name))
        # It parses whole files for a line of the log.
        settings.enter_context(patch.object(symbolic_convert, "get_funcname", _unnamed))
        # For another line it fills a buffer larger than the processor's caches, and times the guards.
        settings.enter_context(patch.object(guards, "profile_guard_manager", _untimed))
        settings.enter_context(
            config.patch(
                recompile_limit=many,
                accumulated_recompile_limit=many,
                suppress_errors=False,
                # A capture's garbage is collected together with the caller's.
                run_gc_after_compile=False,
                skip_nnmodule_hook_guards=False,
                force_parameter_static_shapes=True,
                automatic_dynamic_shapes=False,
                assume_static_by_default=True,
                # Where they are on, as in PyTorch 2.11, unchanged dicts of modules skip the guards on
                # closures, defaults and flags of parameters.
                use_recursive_dict_tags_for_guards=False,
                skip_guards_on_constant_func_defaults=False,
                skip_tensor_guards_with_matching_dict_tags=False,
            )
        )
        if hasattr(config, "invalidate_compile_context_weakrefs"):
            # From PyTorch 2.13 on, only this drops references to parameters of code that cannot be followed.
            settings.enter_context(config.patch(invalidate_compile_context_weakrefs=True))
        yield


def _unfollowed(owner: type, name: str) -> AbstractContextManager[Any]:
    """Keep Dynamo from following code that calls this method of PyTorch, for the block."""
    return patch.object(owner, name, torch._dynamo.disable(vars(owner)[name]))  # type: ignore[no-untyped-call]


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Silence one of PyTorch's loggers for the block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _never(value: object) -> bool:
    return False


def _unnamed(filename: str, lineno: int) -> None:
    return None


def _untimed(*_: Any) -> float:
    return 0.0


@cache
def _plain_answers() -> dict[Any, Callable[..., Any]]:
    """Dynamo's handlers for functions that tell whether code is being compiled; the user's code gets no."""
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    return {
        function: _said_to_torch_alone(handler)
        for function, handler in TorchInGraphFunctionVariable._get_handlers().items()
        if getattr(function, "__name__", "") in ("is_compiling", "is_dynamo_compiling", "is_exporting")
    }


def _said_to_torch_alone(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that answers PyTorch's own code as Dynamo does, and the user's code with no.

    The user's code then takes the branches that it takes in plain PyTorch.
    """
    from torch._dynamo.variables import ConstantVariable

    def handle(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if tx.f_code.co_filename.startswith(TORCH_FOLDER):
            return handler(self, tx, *args, **kwargs)
        return ConstantVariable.create(False)

    return handle
