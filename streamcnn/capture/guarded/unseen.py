"""State that a forward pass may read and that Dynamo does not guard."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks

from streamcnn.graph.monkeypatches import replaced_functions

_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")


@dataclass(frozen=True, slots=True, eq=False)
class Unseen:
    """Members of modules' classes, global module hooks, PyTorch's replaced functions, and the environment."""

    members: tuple[Any, ...]
    environment: Mapping[str, str]

    @classmethod
    def by(cls, net: nn.Module) -> Unseen:
        """Take the present state, for the modules of ``net``."""
        kinds = dict.fromkeys(kind for module in net.modules() for kind in type(module).__mro__)
        # Dynamo patches the base class on first use, but not the methods that a call goes through.
        own = (vars(kind).values() for kind in kinds if kind not in (nn.Module, object))
        calls = (getattr(nn.Module, name) for name in ("__call__", "_call_impl", "__getattr__"))
        hooks = (hook for kind in _GLOBAL_HOOKS for hook in getattr(module_hooks, kind).values())
        return cls((*chain.from_iterable(own), *calls, *hooks, *replaced_functions()), dict(os.environ))

    def is_same(self, other: Unseen) -> bool:
        """Whether nothing has changed between the two."""
        return (
            len(self.members) == len(other.members)
            and all(map(operator.is_, self.members, other.members))
            and self.environment == other.environment
        )
