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
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from streamcnn.capture.unguarded.contents import NO_HELPERS, Contents, HostRandom, put_back
from streamcnn.errors import UnsupportedModel

# Loggers cache their levels.
_NO_HELPERS = (*NO_HELPERS, logging.Logger)
_STEPS = ("forward", "setup_context")


@contextlib.contextmanager
def nothing_changed(net: nn.Module, function: type) -> Iterator[None]:
    """Refuse side effects of ``function``, whose code runs on fake tensors in the block.

    Raises
    ------
    UnsupportedModel
        If the code changed something beside its results; the change is undone first.
    """
    contents, drawn = Contents(_NO_HELPERS), HostRandom()
    for held in (*(vars(module) for module in net.modules()), *_named_by(function)):
        contents.keep(held)
    kind = dict(vars(function))
    # The function prints again when the pass is carried out.
    with contextlib.redirect_stdout(io.StringIO()), _collectives_numbered_apart():
        yield
    changed, draws = contents.changed(), not drawn.is_unchanged()
    attributes = {name for name in {*kind, *vars(function)} if vars(function).get(name) is not kind.get(name)}
    if not (changed or attributes or draws):
        return
    for holder, before in changed:
        put_back(holder, before)
    for name in attributes:
        setattr(function, name, kind[name]) if name in kind else delattr(function, name)
    drawn.restore()
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


def _named_by(function: type) -> Iterator[Any]:
    """The globals and closure cells that the code of ``function`` names."""
    for step in _STEPS:
        run = getattr(function, step)
        if not isinstance(run, types.FunctionType) or run.__module__.startswith(f"{torch.__name__}."):
            continue
        for name in _names_in(run.__code__):
            yield run.__globals__.get(name)
        yield from run.__closure__ or ()


def _names_in(code: types.CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*map(_names_in, inner))
