"""The ceiling of the device that a pass runs on: one interface to host memory's and a GPU's."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import torch

from streamcnn.ceiling.allocator import trim_heap
from streamcnn.ceiling.cpu import Baseline, DataLimit
from streamcnn.ceiling.cuda import cuda_ceiling
from streamcnn.errors import StreamError


class Limit(Protocol):
    """A ``with`` block in which a budget is enforced and memory is measured."""

    @property
    def peak_bytes(self) -> int | None:
        """Most bytes held since entry, as the device counts them; None if unknown."""

    @property
    def at_most_bytes(self) -> int | None:
        """What the most bytes held since entry cannot exceed; more than ``peak_bytes`` if samples may have
        missed a peak, None if unknown."""

    @property
    def reading(self) -> str:
        """Name of the reading behind ``peak_bytes``, or "unknown"."""

    @property
    def samples(self) -> tuple[tuple[float, int], ...]:
        """Readings in order: ``time.perf_counter()`` in seconds, bytes counted as ``peak_bytes``; none where
        the device keeps the peak."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Ceiling(Protocol):
    """Enforces a budget on one pass, direction by direction."""

    @property
    def baseline_bytes(self) -> int | None:
        """What the process held when the pass began, if the budget counts from there; None if not."""

    def limit(self, budget: int | None, *, reuse_heap: bool) -> Limit:
        """The limit for one direction.

        Parameters
        ----------
        budget
            Bytes; None measures only.
        reuse_heap
            Whether the host's allocator may keep freed blocks.
        """

    def check(self, *, compiled: bool = True) -> None:
        """Called after every step: raise ``BudgetExceeded`` if the limit in force has been passed.

        Parameters
        ----------
        compiled
            Whether libraries may have compiled code since the last call.
        """

    def give_back(self) -> None:
        """Return cached memory to the device, before a pass is begun again."""


class HostCeiling:
    """Host memory: both directions count from what the process held at first; the kernel refuses.

    Parameters
    ----------
    counted
        Bytes of that which count towards the budget all the same.
    """

    def __init__(self, counted: int = 0) -> None:
        self._baseline = Baseline.now().less(counted)
        self._limit: DataLimit | None = None

    @property
    def baseline_bytes(self) -> int | None:
        """Resident memory then; None if the kernel does not say."""
        return self._baseline.resident_bytes

    def limit(self, budget: int | None, *, reuse_heap: bool) -> Limit:
        """The kernel's limit."""
        self._limit = DataLimit(budget, baseline=self._baseline, reuse_heap=reuse_heap)
        return self._limit

    def check(self, *, compiled: bool = True) -> None:
        """See :meth:`DataLimit.check`; nearly all that goes past the limit has been refused."""
        if self._limit is not None:
            self._limit.check(compiled=compiled)

    def give_back(self) -> None:
        """The heap's free pages, which are resident until then."""
        trim_heap()


class NoCeiling:
    """A device whose memory can be neither limited nor measured; it is its own limit."""

    baseline_bytes: int | None = None
    peak_bytes: int | None = None
    at_most_bytes: int | None = None
    reading = "unknown"
    samples: tuple[tuple[float, int], ...] = ()

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def limit(self, budget: int | None, *, reuse_heap: bool) -> Limit:
        """No limit.

        Raises
        ------
        StreamError
            If there is a budget.
        """
        if budget is not None:
            raise StreamError(
                f"budget= cannot be enforced on device {self._device}: allowed are the CPU and CUDA; move "
                "the model there, or pass budget=None to run without a ceiling"
            )
        return self

    def check(self, *, compiled: bool = True) -> None:
        """Nothing."""

    def give_back(self) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def ceiling_for(device: torch.device, *, counted: int = 0) -> Ceiling:
    """A ceiling for one pass on ``device``, counting from now.

    Parameters
    ----------
    counted
        Bytes of host memory that are held already and count towards a budget of it all the same.
    """
    if device.type == "cuda":
        return cuda_ceiling(device)
    return HostCeiling(counted) if device.type == "cpu" else NoCeiling(device)


def reserved_bytes(device: torch.device) -> int:
    """Bytes of a budget on ``device`` that are taken before a pass begins; 0 where it counts from there."""
    return cuda_ceiling(device).reserved_bytes() if device.type == "cuda" else 0
