"""Lets ``import torchvision`` succeed where its compiled operators do not load.

PyPI has one torchvision wheel for each PyTorch and platform. On x86-64 Linux it is built for CUDA (0.26 to
0.29 are): beside a CPU build of PyTorch its library finds no ``libtorch_cuda.so`` and does not load.
torchvision goes on without its operators, but attaches shape rules to two of them all the same, ``nms`` and
``qnms``, and its import ends in ``RuntimeError: operator torchvision::nms does not exist``. timm, lightning
and torchmetrics import torchvision and fail with it, although no classifier calls either operator. All that
torchvision registers for other operators, such as ``roi_align``, depends on its library having loaded.

:func:`install` waits for the module ``torchvision.extension``, in which torchvision loads its library, and
checks afterwards whether that succeeded. If so, nothing is done: the operators are torchvision's own. If not,
the two operators are defined, and raise an error that says what is wrong when they are called. torchvision's
own functions, such as ``torchvision.ops.nms``, check for the library and raise an error of theirs.

The wheels that ``pip install`` builds hold a copy of this file and a ``.pth`` that calls it when Python
starts, so scripts that never import streamcnn have it too (``packaging/backend.py``). That is why this module
imports only ``sys``: it adds half a millisecond to a start, and one entry to ``sys.meta_path``.
"""

import sys

TYPE_CHECKING = False
"""As in ``typing``, whose import would take longer than all of this file."""
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import NoReturn

_EXTENSION = "torchvision.extension"
_OPERATORS = ("nms", "qnms")
"""Operators that get a shape rule whether they exist or not."""
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_libraries: "list[object]" = []
"""Schemas live as long as these objects do."""


def install() -> None:
    """Define the missing operators as soon as torchvision has tried to load its own.

    This does nothing if torchvision is not installed, and may be called again.
    """
    extension = sys.modules.get(_EXTENSION)
    if extension is not None:
        # It stays if the rest of torchvision's import has failed.
        _define_missing(extension)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds ``torchvision.extension`` as other finders do, and adds a step after it has run."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The module's spec; None for every other module."""
        if name != _EXTENSION:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find_spec is None else find_spec(name, path, target)
            if spec is not None:
                _define_after(spec)
                return spec
        return None


def _define_after(spec: "ModuleSpec") -> None:
    """Make the module's loader check for the operators after it has run the module."""
    execute = getattr(spec.loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module: "ModuleType") -> None:
        execute(module)
        _define_missing(module)

    # Only on this module's loader, whose other methods stay as they are.
    setattr(spec.loader, "exec_module", exec_module)  # noqa: B010


def _define_missing(extension: "ModuleType") -> None:
    """Define the operators if torchvision's library has not loaded."""
    if getattr(extension, "_has_ops", bool)():
        return
    import torch

    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in missing:
            library.define(name + _SCHEMA)  # type: ignore[no-untyped-call]
            library.impl(name, _refuse, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        _libraries.append(library)


def _refuse(*arguments: object) -> "NoReturn":
    """Raise the error of an operator that is called although it did not load."""
    raise RuntimeError(
        "torchvision's compiled operators could not be loaded, so torchvision::nms and torchvision::qnms "
        "cannot run: the installed torchvision is built for another PyTorch, such as one with CUDA. Install "
        "a build that fits torch; TORCHVISION_WARN_WHEN_EXTENSION_LOADING_FAILS=1 says why its library "
        "did not load"
    )
