"""Functions of PyTorch's that are replaced while a call is captured, for the thread that captures it.

Other threads find them as they are: passes are carried out, and the user's other models run, meanwhile.
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
    """Where a function is replaced: in the threads that are within a block."""

    is_here = False


@contextmanager
def replaced_here(
    owner: Any, name: str, replacement: Callable[..., Any], *, lasting: bool = False
) -> Iterator[None]:
    """A block in which an attribute of a module or class, a function, is another one for this thread.

    If ``lasting``, what stands there is the same object each time and in each thread, so that guards hold
    which have seen it; ``replacement`` is then kept.
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
    """``replacement`` for threads in the place that comes with it, and the original for all others."""
    place = _Place()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def is_here() -> bool:
        # Dynamo asks this itself: it cannot follow how.
        return place.is_here

    def function(*args: Any, **kwargs: Any) -> Any:
        return (replacement if is_here() else original)(*args, **kwargs)

    # Dynamo looks some up by their names.
    function.__name__ = original.__name__

    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        if is_here():
            return replacement(cls, *args, **kwargs)
        return original.__get__(None, cls)(*args, **kwargs)

    is_method_of_class = isinstance(original, (classmethod, ClassMethodDescriptorType))
    return classmethod(method) if is_method_of_class else function, place


_lasting = lru_cache(256)(_for_thread)
