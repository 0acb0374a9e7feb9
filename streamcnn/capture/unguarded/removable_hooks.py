"""Hooks on gradients that their handles may remove, in the forward pass or until the gradient arrives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle


class RemovableHook:
    """A hook on a gradient, which does nothing once it has been removed."""

    def __init__(self, hook: Callable[[Tensor], Any]) -> None:
        # The handle refers to it weakly, so a handle that is kept keeps no pass alive.
        self._hooks = OrderedDict[int, Callable[[Tensor], Any]]()
        self.handle = RemovableHandle(self._hooks)
        """What setting the hook returns."""
        self._hooks[self.handle.id] = hook

    @property
    def is_set(self) -> bool:
        """Whether it has not been removed."""
        return bool(self._hooks)

    def __call__(self, gradient: Tensor) -> Any:
        """Call the hook, unless it has been removed."""
        hook = self._hooks.get(self.handle.id)
        return None if hook is None else hook(gradient)
