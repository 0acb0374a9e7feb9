"""The model that a name on the command line stands for: a timm model or the user's own factory."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Collection
from pathlib import Path

from torch import nn

from streamcnn.errors import UntrustedModel
from streamcnn.support import torchvision_import
from streamcnn.support.extras import require

WEIGHT_OPTIONS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Of timm's ``create_model``: which weights to begin with, and the files and addresses that they are in."""


def load_model(name: str, **kwargs: object) -> nn.Module:
    """A new model, not yet trained.

    Parameters
    ----------
    name : a timm name such as ``"resnet18"``, or ``"package.module:factory"``
        The factory is any callable that returns a module; its module is imported as by Python,
        so its folder must be on ``sys.path``.
    **kwargs
        Passed on to timm's ``create_model`` or to the factory.

    Raises
    ------
    ValueError
        If there is no timm model, module or factory of that name, if it does not take ``kwargs``, or returns
        no module.
    MissingExtra
        If it is a timm name and timm is not installed.
    """
    model = _call_factory(name, kwargs) if is_factory(name) else _create_with_timm(name, kwargs)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned a {type(model).__name__}: allowed is a torch.nn.Module")
    return model


def is_factory(name: str) -> bool:
    """Whether a model's name is ``package.module:factory``, which is code that is run, and no timm name."""
    return ":" in name


def require_trust(name: str, trust: Collection[str], where: Path) -> None:
    """Make sure that a model that a file names may be made: its factory is any callable of any module.

    Parameters
    ----------
    name
        Of the model.
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
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module missing inside the user's own file is a bug there and keeps its traceback.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"no module {error.name!r} for model {name!r}: allowed is package.module:factory; "
            "call the command in the folder that holds it, or add that to PYTHONPATH"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"{module_name} has no callable {attribute!r}: allowed is package.module:factory")
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"{name} does not take {kwargs}: {error}") from error
    return factory(**kwargs)


def _create_with_timm(name: str, kwargs: dict[str, object]) -> object:
    torchvision_import.install()
    timm = require("timm", extra="zoo")
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3)) or "none"
        raise ValueError(
            f"no timm model {name!r} (similar: {close}): allowed is a timm name, "
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
