"""Imports of optional dependencies; a missing one raises at use, with the name of the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from streamcnn.errors import StreamError


class MissingExtra(StreamError, ImportError):
    """The optional dependency of a feature in use is not installed."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import ``module``, which belongs to the optional dependencies ``extra``.

    Raises
    ------
    MissingExtra
        If the module, or one that it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{module} cannot be imported because {error.name!r} is not installed: "
            f"install the optional dependencies with  pip install 'streamcnn[{extra}]'"
        ) from error
