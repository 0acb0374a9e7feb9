"""One interface to the ceilings of host memory and of GPUs, for the device that a pass runs on."""

from __future__ import annotations

from typing import Protocol, Self

import torch

from streamcnn.ceiling.allocator import trim_heap
from streamcnn.ceiling.baseline import Baseline
from streamcnn.ceiling.cpu import DataLimit
from streamcnn.ceiling.cuda import cuda_ceiling
from streamcnn.ceiling.kept_blocks import give_back
from streamcnn.ceiling.rooms import Room, host_room
from streamcnn.errors import StreamError


class Limit(Protocol):
    """A ``with`` block in which a budget is enforced and memory is measured."""

    @property
    def peak_bytes(self) -> int | None:
        """Most bytes held since entry, as the device counts them; None if unknown."""

    @property
    def at_most_bytes(self) -> int | None:
        """An upper bound of the most bytes held since entry: more than ``peak_bytes`` if samples may have
        missed a peak; None if unknown."""

    @property
    def is_shared(self) -> bool:
        """Whether other blocks were entered at the same time: what they held is part of the peak."""

    @property
    def reading(self) -> str:
        """Name of the reading behind ``peak_bytes``, or "unknown"."""

    @property
    def samples(self) -> tuple[tuple[float, int], ...]:
        """Readings in order: ``time.perf_counter()`` in seconds, bytes counted as ``peak_bytes``; none where
        the device keeps the peak."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None: ...

    def close(self) -> None:
        """Lift the limit, if the block's end was interrupted. Closing again does nothing."""


class Ceiling(Protocol):
    """Enforces the budget of one pass, direction by direction."""

    @property
    def baseline_bytes(self) -> int | None:
        """Bytes that the process held when the pass began, if the budget counts from there; None if not."""

    @property
    def room(self) -> Room | None:
        """The room that other limits leave for the pass; None where there are none."""

    @property
    def counts_code(self) -> bool:
        """Whether code that is compiled for a step counts towards the limit."""

    def limit(self, budget: int | None, *, reuse_heap: bool, kept: int | None = None) -> Limit:
        """The limit for one direction.

        Parameters
        ----------
        budget
            Bytes; None measures only.
        reuse_heap
            Whether the C library may keep freed blocks.
        kept
            Bytes that tensors in host memory and free blocks kept for them may take; None to leave PyTorch's
            allocator as it is.
        """

    def check(self, *, compiled: bool = True) -> None:
        """Called after every step: raise ``BudgetExceeded`` if the limit in force has been passed.

        Parameters
        ----------
        compiled
            Whether libraries may have compiled code since the last call.
        """

    def keep_blocks(self, nbytes: int) -> None:
        """Let tensors and kept blocks take ``nbytes`` from now on, if ``limit`` was given ``kept``."""

    def empty_cache(self) -> None:
        """Return cached memory to the device, before a pass is begun again."""


class HostCeiling:
    """The ceiling on host memory, which the kernel enforces: both directions count from one baseline.

    Parameters
    ----------
    counted
        Bytes held already that still count towards the budget.
    """

    counts_code = True

    def __init__(self, counted: int) -> None:
        self._baseline = Baseline.now().less(counted)
        self._limit: DataLimit | None = None
        self.room = host_room()
        """What was left when the pass began."""

    @property
    def baseline_bytes(self) -> int | None:
        """Resident memory when the pass began, less ``counted``; None if the kernel does not say."""
        return self._baseline.resident_bytes

    def limit(self, budget: int | None, *, reuse_heap: bool, kept: int | None = None) -> Limit:
        """The kernel's limit for one direction, below any other limit that would end the process."""
        room, must_hold = self.room, True
        if room is not None and not room.is_enforced and (budget is None or room.nbytes < budget):
            budget, must_hold = room.nbytes, budget is not None
        self._limit = DataLimit(
            budget, baseline=self._baseline, reuse_heap=reuse_heap, must_hold=must_hold, kept=kept
        )
        return self._limit

    def check(self, *, compiled: bool = True) -> None:
        """See :meth:`DataLimit.check`; nearly everything past the limit has been refused by then."""
        if self._limit is not None:
            self._limit.check(compiled=compiled)

    def keep_blocks(self, nbytes: int) -> None:
        """See :meth:`DataLimit.keep_blocks`."""
        if self._limit is not None:
            self._limit.keep_blocks(nbytes)

    def empty_cache(self) -> None:
        """Give back free kept blocks, and the heap's free pages, which stay resident until then."""
        give_back()
        trim_heap()


class NoCeiling:
    """A device whose memory can be neither limited nor measured: both a ceiling and its limits."""

    baseline_bytes: int | None = None
    peak_bytes: int | None = None
    at_most_bytes: int | None = None
    is_shared = False
    counts_code = False
    room: Room | None = None
    reading = "unknown"
    samples: tuple[tuple[float, int], ...] = ()

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def limit(self, budget: int | None, *, reuse_heap: bool, kept: int | None = None) -> Limit:
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

    def keep_blocks(self, nbytes: int) -> None:
        """Do nothing: nothing is kept."""

    def check(self, *, compiled: bool = True) -> None:
        """Do nothing."""

    def empty_cache(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def close(self) -> None:
        """Do nothing."""


def ceiling_for(device: torch.device, *, counted: int = 0) -> Ceiling:
    """A ceiling for one pass on ``device``, counting from now.

    Parameters
    ----------
    counted
        Bytes of host memory that are held already and still count towards its budget.
    """
    if device.type == "cuda":
        return cuda_ceiling(device)
    return HostCeiling(counted) if device.type == "cpu" else NoCeiling(device)


def reserved_bytes(device: torch.device) -> int:
    """Bytes of a budget on ``device`` taken before a pass begins; 0 where the budget counts from then."""
    return cuda_ceiling(device).reserved_bytes() if device.type == "cuda" else 0


def room_for(device: torch.device) -> Room | None:
    """The room that other limits leave for a pass on ``device``; None where there are none."""
    if device.type == "cuda":
        return cuda_ceiling(device).room
    return host_room() if device.type == "cpu" else None
