"""Count calls of ATen's operators, each of which launches at least one kernel on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_NO_KERNELS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "promote_types"})
"""Operators that only allocate memory or change a type."""


class OperatorCounts(TorchDispatchMode):
    """Counts operators by name while it is entered, except those that launch no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_KERNELS:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def count_operators(call: Callable[[], Any]) -> Counter[str]:
    """The numbers of operators that a call makes, by name."""
    with OperatorCounts() as mode:
        call()
    return mode.counts
