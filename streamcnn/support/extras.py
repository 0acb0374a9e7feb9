"""Imports of optional dependencies, raised at use with the name of the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from streamcnn.errors import StreamError


class MissingExtra(StreamError, ImportError):
    """A feature was used whose optional dependency is not installed."""


def require(module: str, *, extra: str) -> ModuleType:
    """The imported ``module``, which belongs to the optional dependencies ``extra``.

    Raises
    ------
    MissingExtra
        If the module, or one that it needs itself, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{module} cannot be imported because {error.name!r} is not installed: "
            f"install the optional dependencies with  pip install 'streamcnn[{extra}]'"
        ) from error
