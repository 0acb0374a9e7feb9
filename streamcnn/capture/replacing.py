"""Replacement of PyTorch's functions while a call is captured, in the capturing thread alone.

Other threads, which carry out passes and run the user's other models meanwhile, get the original functions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ClassMethodDescriptorType
from typing import Any
from unittest.mock import patch

import torch


class _Place(threading.local):
    """Whether this thread is inside a block that replaces a function."""

    is_here = False


@contextmanager
def replaced_here(
    owner: Any, name: str, replacement: Callable[..., Any], *, lasting: bool = False
) -> Iterator[None]:
    """Replace the function ``name`` of a module or class, for this thread and the block.

    With ``lasting``, the same object is put there each time and in each thread, so that guards on it stay
    valid; ``replacement`` is then kept.
    """
    make = _lasting if lasting else _for_thread
    original = vars(owner)[name] if name in vars(owner) else getattr(owner, name)
    function, place = make(original, replacement)
    with patch.object(owner, name, function):
        outer, place.is_here = place.is_here, True
        try:
            yield
        finally:
            place.is_here = outer


def _for_thread(original: Any, replacement: Callable[..., Any]) -> tuple[Any, _Place]:
    """A function that calls ``replacement`` in threads inside the returned place, else the original."""
    place = _Place()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def is_here() -> bool:
        # Dynamo calls this itself, as it cannot follow it.
        return place.is_here

    def function(*args: Any, **kwargs: Any) -> Any:
        return (replacement if is_here() else original)(*args, **kwargs)

    # Dynamo looks some functions up by name.
    function.__name__ = original.__name__

    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        if is_here():
            return replacement(cls, *args, **kwargs)
        return original.__get__(None, cls)(*args, **kwargs)

    is_method_of_class = isinstance(original, (classmethod, ClassMethodDescriptorType))
    return classmethod(method) if is_method_of_class else function, place


_lasting = lru_cache(256)(_for_thread)
