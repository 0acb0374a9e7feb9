"""The ceiling of a row: on the CPU the kernel refuses memory, on a GPU PyTorch's allocator is capped.

The budget counts from before the network is made, so weights, gradients and the optimiser's state are part of
it, and it holds in training and in inference.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.harness.attempts import Refused
from streamcnn import BudgetExceeded, PlanDoesNotFit
from streamcnn.ceiling.device import Limit, ceiling_for
from streamcnn.ceiling.refusals import is_out_of_memory


class RowCeiling:
    """Holds what runs in a process to a budget.

    Parameters
    ----------
    device
        Where it runs.
    budget
        Bytes.
    """

    def __init__(self, device: str, budget: int) -> None:
        self._ceiling = ceiling_for(torch.device(device))
        self._budget = budget

    @contextmanager
    def limited(self, *, reuse_heap: bool) -> Iterator[Limit]:
        """A block under the ceiling.

        Parameters
        ----------
        reuse_heap
            Whether the C library may keep freed blocks.

        Raises
        ------
        Refused
            If the block asks for more memory than there is.
        """
        gc.collect()
        self._ceiling.empty_cache()
        try:
            with self._ceiling.limit(self._budget, reuse_heap=reuse_heap) as limit:
                yield limit
                self.check_peak(limit)
        except (BudgetExceeded, PlanDoesNotFit) as error:
            raise Refused(_first_line(error)) from error
        except Exception as error:
            # What makes a network says in words of its own that it cannot be made.
            refusal = error if is_out_of_memory(error) else error.__cause__
            if not isinstance(refusal, Exception) or not is_out_of_memory(refusal):
                raise
            raise Refused(_first_line(refusal)) from error

    def check(self) -> None:
        """Refuse what is held now, if it is too much."""
        self._ceiling.check()

    def check_peak(self, limit: Limit) -> None:
        """Refuse what the kernel's limit does not see: on the CPU, code that runs for the first time.

        Raises
        ------
        Refused
            If the peak is above the budget.
        """
        self.check()
        if limit.peak_bytes is not None and limit.peak_bytes > self._budget:
            raise Refused(f"{limit.peak_bytes} bytes were held, and the budget is {self._budget}")


def _first_line(error: Exception) -> str:
    """What an error says, without the place in PyTorch's own code."""
    lines = re.sub(r"^\[.*?\] (err == 0. )?", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__
