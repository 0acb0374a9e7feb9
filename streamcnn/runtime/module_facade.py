"""A module that is another one to whoever uses it."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class ModuleFacade(nn.Module):
    """Has another module's parameters, buffers, ``state_dict`` keys, mode and attributes.

    It shares the registries of ``net``, so that names, keys and moves are its own. What a subclass has set
    itself is the subclass's; other attributes are read from and written to ``net``.

    Raises
    ------
    ValueError
        If ``net`` is no module.
    """

    net: nn.Module

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise ValueError(f"net is {net!r}: allowed is a torch.nn.Module")
        object.__setattr__(self, "net", net)
        for registry in _SHARED:
            object.__setattr__(self, registry, getattr(net, registry))
        self.training = net.training

    def __getattr__(self, name: str) -> Any:
        # Not found here: the module's own attributes and methods.
        try:
            return super().__getattr__(name)
        except AttributeError:
            net = self.__dict__.get("net")
            if net is None:
                raise
            return getattr(net, name)

    def __setattr__(self, name: str, value: Any) -> None:
        net = self.__dict__.get("net")
        own = net is None or name in self.__dict__ or hasattr(type(self), name)
        if own or not hasattr(net, name):
            super().__setattr__(name, value)
        else:
            setattr(net, name, value)

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode of the module and everything in it."""
        self.net.train(mode)
        self.training = mode
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.net._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.net._load_from_state_dict(*args, **kwargs)
