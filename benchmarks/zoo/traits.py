"""What kind of model it is, by criteria that a program applies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.zoo.states import Shape

FEWEST_CONVOLUTIONS = 3
"""Besides the first, of a model that is not excluded: fewer, and it is a transformer or an MLP."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
_PRODUCTS = {"bmm", "baddbmm", "mm", "addmm"}
_SOFTMAXES = {"_softmax", "_safe_softmax"}
_SAME_VALUES = {
    *("view", "_unsafe_view", "expand", "reshape", "transpose", "permute", "t", "slice", "select"),
    *("unsqueeze", "squeeze", "clone", "_to_copy", "native_dropout", "split", "unbind", "_reshape_alias"),
}
"""Operators whose result holds the values of their first operand, so that a softmax stays one."""


def further_convolutions(net: nn.Module) -> int:
    """Convolutions besides the first one, which cuts a transformer's image into patches."""
    return max(0, sum(isinstance(module, _CONVOLUTIONS) for module in net.modules()) - 1)


def has_attention(net: nn.Module, shape: Shape) -> bool:
    """Whether ``net`` multiplies matrices by a softmax or calls PyTorch's attention, for images of ``shape``.

    A softmax over a few branches, by whose shares maps are added up, is no attention.
    """
    with torch.no_grad(), _AttentionMode() as mode:
        net(torch.zeros(shape))
    return mode.found


class _AttentionMode(TorchDispatchMode):
    """Watches a forward pass for the product of a softmax and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False
        self._softmaxes: dict[int, Tensor] = {}
        """By identity; held, so that no other tensor gets it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_softmax = any(id(each) in self._softmaxes for each in args)
        self.found |= "scaled_dot_product" in name or (name in _PRODUCTS and is_softmax)
        if name in _SOFTMAXES or (name in _SAME_VALUES and is_softmax):
            for each in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(each, Tensor):
                    self._softmaxes[id(each)] = each
        return result
