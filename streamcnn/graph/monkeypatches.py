"""Functions and methods of PyTorch's that the user has replaced by others.

Those of ``torch`` and ``torch.nn.functional`` are called as anywhere. Under PyTorch's function modes, which a
capture needs, a replaced function that calls the original is called once more by that: the original asks for
the function of its name. So while an original runs, its name stands for itself; where that cannot be seen to,
the call is refused.
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
    """What may be called there; methods of the class itself are made anew for each look."""
    names = (name for name in dir(place) if name not in _SEEDING and callable(getattr(place, name)))
    found = {name: getattr(place, name) for name in names}
    return {n: f for n, f in found.items() if getattr(place, n) is f and not isinstance(f, type)}


# Dynamo itself replaces the first of them, when it is used first; a forward pass may call none.
_SEEDING = ("manual_seed", "set_rng_state", "seed")
_OURS = str(Path(__file__).parents[1])
_OWN = tuple((place, _functions_of(place)) for place in (torch, F, Tensor))


def replaced_functions() -> tuple[Any, ...]:
    """What stands where functions of PyTorch's have been, in order."""
    return tuple(
        found
        for place, own in _OWN
        for name, function in own.items()
        if (found := getattr(place, name, None)) is not function
    )


def is_replaced_method(name: str) -> bool:
    """Whether a method of tensors has been replaced."""
    own = _OWN[-1][1].get(name)
    return own is not None and getattr(Tensor, name) is not own


@contextmanager
def under_its_own_name(function: Callable[..., Any]) -> Iterator[None]:
    """A block in which an original finds itself under its name."""
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
    """Refuse what an original has asked for under its name, if that is not PyTorch's.

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
