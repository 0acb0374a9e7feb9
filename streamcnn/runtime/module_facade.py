"""A module that stands in for another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

from torch import Tensor, nn

_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class ModuleFacade(nn.Module):
    """A module with another one's parameters, buffers, ``state_dict`` keys, mode and attributes.

    It shares the registries of ``net``, so that names, keys and moves are the same, and forwards to ``net``
    the methods that modules often override. Attributes that a subclass sets before it calls ``__init__`` are
    the subclass's own, whatever ``net`` has under these names; all other attributes are those of ``net``.

    Raises
    ------
    ValueError
        If ``net`` is not a module.
    """

    net: nn.Module

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._stand_in_for(net)

    def _stand_in_for(self, net: nn.Module) -> None:
        """Be ``net`` from now on."""
        if not isinstance(net, nn.Module):
            raise ValueError(f"net is {net!r}: allowed is a torch.nn.Module")
        object.__setattr__(self, "net", net)
        for registry in _SHARED:
            object.__setattr__(self, registry, getattr(net, registry))

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
        if name == "net":
            self._stand_in_for(value)
        elif net is None or name in self.__dict__ or hasattr(type(self), name):
            # Not as modules do: a module that is an option would be registered with ``net``.
            object.__setattr__(self, name, value)
        else:
            setattr(net, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or "net" not in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self.net, name)

    @property
    def training(self) -> bool:
        """Whether ``net`` is in train mode."""
        return self.net.training

    @training.setter
    def training(self, mode: bool) -> None:
        # ``nn.Module.__init__`` sets it before there is a ``net``.
        if "net" in self.__dict__:
            self.net.training = mode

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode of the module and everything in it."""
        self.net.train(mode)
        return self

    def eval(self) -> Self:
        """Set eval mode, as the module's own ``eval`` does."""
        self.net.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze or release parameters, as the module's own ``requires_grad_`` does."""
        self.net.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients by the module's own method."""
        self.net.zero_grad(set_to_none)

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """Call ``fn`` with every module within ``net``, and with ``net`` itself instead of this one."""
        self.net.apply(fn)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the module, or change its type, as its own ``to`` does."""
        self.net.to(*args, **kwargs)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.net._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def parameters(self, *args: Any, **kwargs: Any) -> Iterator[nn.Parameter]:
        """The module's own parameters."""
        return self.net.parameters(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's own parameters by name."""
        return self.net.named_parameters(*args, **kwargs)

    def buffers(self, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        """The module's own buffers."""
        return self.net.buffers(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The module's own buffers by name."""
        return self.net.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own state dict."""
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict by the module's own method."""
        return self.net.load_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.net._save_to_state_dict(destination, prefix, keep_vars)

    def _register_load_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        # The hook is called with the module that it is set on: the one that loads.
        return self.net._register_load_state_dict_pre_hook(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.net._load_from_state_dict(*args, **kwargs)
