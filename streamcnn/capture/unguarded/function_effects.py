"""Side effects of the user's ``autograd.Function`` while it runs on fake tensors.

The function runs again when the pass is carried out, and would then move a counter, append to a list or draw
a number from Python once more; so it is refused. Checked are all modules, and everything that the function's
code names: its class, globals and closures, and objects among those.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import types
from collections import deque
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from streamcnn.errors import UnsupportedModel

_CONTAINERS = (dict, list, set, deque)
_CODE = (type, types.ModuleType, types.FunctionType, types.MethodType)
# Loggers cache their levels. All modules are checked separately, and tensors elsewhere.
_NOT_LOOKED_INTO = (*_CODE, nn.Module, Tensor, logging.Logger)
_STEPS = ("forward", "setup_context")


@contextlib.contextmanager
def nothing_changed(net: nn.Module, function: type) -> Iterator[None]:
    """Refuse side effects of ``function``, whose code runs on fake tensors in the block.

    Raises
    ------
    UnsupportedModel
        If the code changed something beside its results; the change is undone first.
    """
    held = [(holder, _contents(holder)) for holder in _holders(net, function)]
    kind = dict(vars(function))
    drawn = (random.getstate(), np.random.get_state())
    # The function prints again when the pass is carried out.
    with contextlib.redirect_stdout(io.StringIO()), _collectives_numbered_apart():
        yield
    changed = [(holder, before) for holder, before in held if not _is_same(holder, before)]
    attributes = {name for name in {*kind, *vars(function)} if vars(function).get(name) is not kind.get(name)}
    draws = random.getstate() != drawn[0] or not _are_equal(np.random.get_state(), drawn[1])
    if not (changed or attributes or draws):
        return
    for holder, before in changed:
        _put_back(holder, before)
    for name in attributes:
        setattr(function, name, kind[name]) if name in kind else delattr(function, name)
    random.setstate(drawn[0])
    np.random.set_state(drawn[1])
    what = "draws numbers from Python or NumPy" if draws else "changes what is outside of it"
    raise UnsupportedModel(
        f"the forward of {function.__name__} (autograd.Function) {what}, and it is carried out apart from "
        "the code around it: do so in the forward of the module, and pass it what it needs"
    )


@contextlib.contextmanager
def _collectives_numbered_apart() -> Iterator[None]:
    """Let PyTorch draw numbers of collectives on fake tensors from a generator of its own, for the block."""
    numbering = sys.modules.get("torch.distributed._meta_registrations")
    if not hasattr(numbering, "random"):
        yield
        return
    with patch.object(numbering, "random", random.Random()):
        yield


def _holders(net: nn.Module, function: type) -> list[Any]:
    """Containers and closure cells that the code may change, each once."""
    found: dict[int, Any] = {}
    pending = [vars(module) for module in net.modules()]
    pending += list(_named_by(function))
    while pending:
        value = pending.pop()
        if isinstance(value, _CONTAINERS):
            if id(value) not in found:
                found[id(value)] = value
                pending += value.values() if isinstance(value, dict) else value
        elif isinstance(value, types.CellType):
            found[id(value)] = value
        elif isinstance(value, tuple):
            pending += value
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, _NOT_LOOKED_INTO):
            pending.append(vars(value))
    return list(found.values())


def _named_by(function: type) -> Iterator[Any]:
    """The globals and closure cells that the code of ``function`` names."""
    for step in _STEPS:
        run = getattr(function, step)
        if not isinstance(run, types.FunctionType) or run.__module__.startswith(f"{torch.__name__}."):
            continue
        for name in _names_in(run.__code__):
            yield run.__globals__.get(name)
        for cell in run.__closure__ or ():
            yield cell
            yield _contents(cell)


def _names_in(code: types.CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _contents(holder: Any) -> Any:
    if isinstance(holder, types.CellType):
        try:
            return holder.cell_contents
        except ValueError:
            # The cell is still empty.
            return None
    return dict(holder) if isinstance(holder, dict) else list(holder)


def _is_same(holder: Any, before: Any) -> bool:
    now = _contents(holder)
    if isinstance(holder, types.CellType):
        return now is before
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(name in before and value is before[name] for name, value in now.items())
    return all(a is b for a, b in zip(now, before, strict=True))


def _put_back(holder: Any, before: Any) -> None:
    if isinstance(holder, types.CellType):
        holder.cell_contents = before
        return
    holder.clear()
    (holder.extend if isinstance(holder, (list, deque)) else holder.update)(before)


def _are_equal(first: Any, second: Any) -> bool:
    """Whether two states of NumPy's generator are equal."""
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
