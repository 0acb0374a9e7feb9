"""Functions and methods of PyTorch that the user has replaced.

Replacements in ``torch`` and ``torch.nn.functional`` are called as in plain PyTorch. A capture needs function
modes of PyTorch's, under which an original looks up the function of its own name. A replacement that calls
the original would then be called once more. So while an original runs, its name refers to the original; where
that cannot be arranged, the call is refused.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from streamcnn.errors import UnsupportedModel


def _functions_of(place: Any) -> dict[str, Any]:
    """The functions of a module or class by name, without those that are made anew at each access."""
    names = (name for name in dir(place) if name not in _SEEDING and callable(getattr(place, name)))
    found = {name: getattr(place, name) for name in names}
    return {n: f for n, f in found.items() if getattr(place, n) is f and not isinstance(f, type)}


# Dynamo itself replaces the first of these at its first use; a forward pass may call none of them.
_SEEDING = ("manual_seed", "set_rng_state", "seed")
_OURS = str(Path(__file__).parents[1])
_OWN = tuple((place, _functions_of(place)) for place in (torch, F, Tensor))


def replaced_functions() -> tuple[Any, ...]:
    """The present functions under all names that no longer hold PyTorch's own, in order."""
    return tuple(
        found
        for place, own in _OWN
        for name, function in own.items()
        if (found := getattr(place, name, None)) is not function
    )


def is_replaced_method(name: str) -> bool:
    """Whether a method of ``Tensor`` has been replaced."""
    own = _OWN[-1][1].get(name)
    return own is not None and getattr(Tensor, name) is not own


@contextmanager
def under_its_own_name(function: Callable[..., Any]) -> Iterator[None]:
    """Let an original find itself under its own name, for the block."""
    if not isinstance(function, types.FunctionType) or function.__module__ != F.__name__:
        yield
        return
    known = function.__globals__.get(function.__name__, function)
    if known is function:
        yield
        return
    with patch.dict(function.__globals__, {function.__name__: function}):
        yield


def refuse_replaced(function: Callable[..., Any]) -> None:
    """Make sure that ``function``, which an original looked up under its own name, is PyTorch's.

    Raises
    ------
    UnsupportedModel
        If it is the user's.
    """
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename.startswith(_OURS):
        return
    if any(found is function for found in replaced_functions()):
        raise UnsupportedModel(
            f"the forward pass calls a function or method of PyTorch's that '{code.co_qualname}' has "
            "replaced, and holds code that can only be captured without values: leave PyTorch's as it is, "
            "and call your own in a layer of your own or in a layer's method"
        )
