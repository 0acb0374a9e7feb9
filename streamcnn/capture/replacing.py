"""Functions of PyTorch's that are replaced while a call is captured, for the thread that captures it.

Other threads find them as they are: passes are carried out, and the user's other models run, meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ClassMethodDescriptorType
from typing import Any
from unittest.mock import patch


def replaced_here(owner: Any, name: str, replacement: Callable[..., Any]) -> AbstractContextManager[Any]:
    """A block in which an attribute of a module or class, a function, is another one for this thread."""
    original, here = vars(owner)[name], threading.get_ident()

    def function(*args: Any, **kwargs: Any) -> Any:
        return (replacement if threading.get_ident() == here else original)(*args, **kwargs)

    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == here:
            return replacement(cls, *args, **kwargs)
        return original.__get__(None, cls)(*args, **kwargs)

    is_method_of_class = isinstance(original, (classmethod, ClassMethodDescriptorType))
    return patch.object(owner, name, classmethod(method) if is_method_of_class else function)
