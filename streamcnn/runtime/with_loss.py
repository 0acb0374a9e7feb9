"""A module followed by a loss, whose forward pass is a streamed loss."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from streamcnn.capture.forward_pass import ForwardPass
from streamcnn.support.recent import Recent

_KEPT = 8
"""The number of most recently used losses whose captures are cached."""

Loss = Callable[..., Tensor]
"""A function of a model's output, a target and further maps by name that returns a scalar tensor."""


class WithLoss(nn.Module):
    """A module that returns ``loss(net(image), target, **maps)``."""

    def __init__(self, net: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, image: Tensor, target: Any, maps: Mapping[str, Any]) -> Tensor:
        """The loss of a whole image."""
        return self.loss(self.net(image), target, **maps)


class LossCalls:
    """The captured calls of one module followed by each of its losses."""

    def __init__(self) -> None:
        self._known = Recent[Hashable, tuple[WithLoss, ForwardPass]](_KEPT)

    def of(self, net: nn.Module, loss: Loss) -> tuple[WithLoss, ForwardPass]:
        """``net`` followed by ``loss``, and its captured calls; the same for an equal loss."""
        found, call = self._known.get(_key(loss), lambda: (WithLoss(net, loss), ForwardPass()))
        # Unlike train(), this leaves the parts of both alone.
        found.training = net.training
        return found, call


def _key(loss: Loss) -> Hashable:
    """A key that is equal for equal losses, such as a partial function that is made anew at each update."""
    key: Hashable = loss
    if isinstance(loss, partial):
        key = (loss.func, loss.args, tuple(sorted(loss.keywords.items())))
    try:
        hash(key)
    except TypeError:
        return id(loss)
    return key
