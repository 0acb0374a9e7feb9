"""Save PyTorch's random state, and restore it later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RandomState:
    """The states of the host's generator and of the device's, if it has one of its own."""

    device: torch.device
    on_host: Tensor
    on_device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Self:
        """The present states."""
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), on_device)

    def restore(self) -> None:
        """Restore the states, so that the same numbers are drawn again."""
        torch.set_rng_state(self.on_host)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)
