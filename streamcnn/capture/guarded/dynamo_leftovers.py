"""What Dynamo keeps for each capture until the process ends, tied to the capture instead.

Dynamo has whatever a guard knows by its identity call the guards when it is deleted. Classes and functions
never are, so that guards, graphs and fake tensors of every capture would stay: half a megabyte for a network
of six layers. ``torch.compile`` is called once for a function, but models are made and dropped by the
hundred, as in a search for hyperparameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any
from unittest.mock import patch
from weakref import finalize, ref


@contextmanager
def references_kept_in(kept: list[ref[Any]]) -> Iterator[None]:
    """Have references to what new guards know by identity kept in ``kept``, for the block."""
    from torch._dynamo.guards import CheckFunctionManager

    def id_ref(self: Any, value: object, name: str) -> int:
        if id(value) not in self._weakrefs:
            try:
                self._weakrefs[id(value)] = ref(value)
                # Another object may get this one's identity once it is deleted.
                kept.append(ref(value, lambda _: self.invalidate(obj_str=name)))
            except TypeError:
                pass  # A number, for instance, has no weak references.
        return id(value)

    with patch.object(CheckFunctionManager, "id_ref", id_ref):
        yield


def forget_with(function: FunctionType) -> None:
    """Have Dynamo forget a function's code when the function is deleted.

    Otherwise code that was compiled for it keeps it alive, and it keeps the compiled code, in a cache that
    the collector does not see.
    """
    finalize(function, _forget_code, function.__code__).atexit = False


def _forget_code(code: CodeType) -> None:
    from torch._dynamo.utils import guard_failures, orig_code_map

    guard_failures.pop(code, None)
    # A mapping by identity, without ``items``.
    for identity, original in list(orig_code_map.values.items()):
        if original is code:
            orig_code_map._remove_id(identity)


def forget_backend(backend: Callable[..., Any]) -> None:
    """Take a backend off the list of those that ``torch._dynamo.reset`` resets."""
    from torch._dynamo.eval_frame import cached_backends

    for key, known in list(cached_backends.items()):
        if getattr(known, "compiler_fn", None) is backend:
            cached_backends.pop(key, None)
