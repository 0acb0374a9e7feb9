"""Loading of models by name, as on the command line: a timm model or the user's own factory."""

from __future__ import annotations

import difflib
import importlib
import inspect
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from streamcnn.errors import FactoryFailed, StreamError, UntrustedModel
from streamcnn.support import torchvision_import
from streamcnn.support.extras import require

WEIGHT_OPTIONS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Options of timm's ``create_model`` that name initial weights, and their files and addresses."""


def load_model(name: str, **kwargs: object) -> nn.Module:
    """Create a new model.

    Parameters
    ----------
    name : a timm name such as ``"resnet18"``, or ``"package.module:factory"``
        The factory is any callable that returns a module. Its Python module is imported as usual,
        so its folder must be on ``sys.path``.
    **kwargs
        Passed on to timm's ``create_model`` or to the factory.

    Raises
    ------
    ValueError
        If there is no timm model, Python module or factory of that name, or it does not take ``kwargs``, or
        it returns no ``nn.Module``.
    FactoryFailed
        If the factory, or the Python module that it is in, raises.
    MissingExtra
        If it is a timm name and timm is not installed.
    """
    model = _call_factory(name, kwargs) if is_factory(name) else _create_with_timm(name, kwargs)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned {_described(model)}: allowed is a torch.nn.Module")
    return model


def is_factory(name: str) -> bool:
    """Whether a model's name is ``package.module:factory``, whose code is run, rather than a timm name."""
    return ":" in name


def require_trust(name: str, trust: Collection[str], where: Path) -> None:
    """Make sure that the model that a file names is trusted: its factory could be any callable anywhere.

    Parameters
    ----------
    name
        Name of the model.
    trust
        Factories that may be called.
    where
        The file that names the model.

    Raises
    ------
    UntrustedModel
        If it is a factory that is not among them.
    """
    if is_factory(name) and name not in trust:
        raise UntrustedModel(
            f"{where} names the factory {name!r}, which is code that would be run: allowed are timm models "
            f"and factories that you trust; if this one is yours, add --trust {name!r}, in Python "
            f"trust=[{name!r}]"
        )


def _call_factory(name: str, kwargs: dict[str, object]) -> object:
    module_name, _, attribute = name.partition(":")
    if not (all(part.isidentifier() for part in module_name.split(".")) and attribute.isidentifier()):
        raise ValueError(
            f"cannot read {name!r} as a model: allowed is package.module:factory, or a timm name"
        )
    module = _import(module_name, name)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"{module_name} has no callable {attribute!r}: allowed is package.module:factory")
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no arguments"
        raise ValueError(f"{name} cannot be called with {given}: {error}") from error
    with _naming_failures(name, module.__file__):
        return factory(**kwargs)


def _import(module_name: str, name: str) -> ModuleType:
    """Import the module with the factory of the model called ``name``."""
    try:
        with _naming_failures(name, None):
            return importlib.import_module(module_name)
    except FactoryFailed as failed:
        error = failed.__cause__
        # If the user's own file fails to import a module, that is a bug there.
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):
            raise
        raise ValueError(
            f"no module {missing!r} for model {name!r}: allowed is package.module:factory; "
            "call the command in the folder that holds it, or add that to PYTHONPATH"
        ) from error


@contextmanager
def _naming_failures(name: str, file: str | None) -> Iterator[None]:
    """Add the model's name, and the line of ``file``, to whatever the user's code raises in the block."""
    try:
        yield
    except (StreamError, MemoryError, torch.OutOfMemoryError):
        raise  # refused memory is recognised by the type of the error
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        what = f"{kind}: {error}" if str(error) else kind
        raise FactoryFailed(
            f"{name} fails with {what}{_place(error, file)}: mend it, or give another model"
        ) from error


def _place(error: BaseException, file: str | None) -> str:
    """The last line of ``file`` in an error's traceback, or else the last line of all."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen")
    ]
    own = [frame for frame in frames if frame.filename == file] or frames
    return (
        f" ({own[-1].filename}, line {own[-1].lineno})" if own and not isinstance(error, SyntaxError) else ""
    )


def _described(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _create_with_timm(name: str, kwargs: dict[str, object]) -> object:
    torchvision_import.install()
    timm = require("timm", extra="zoo")
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        similar = f" (similar: {close})" if close else ""
        raise ValueError(
            f"no timm model {name!r}{similar}: allowed is a timm name, "
            "see timm.list_models(), or package.module:factory"
        )
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f"{name} does not take {kwargs}: {error}") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be made with {kwargs} ({type(error).__name__}: {error}): give other options"
        ) from error
