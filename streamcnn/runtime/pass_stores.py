"""Open the stores of one pass, and check that the disk has room for them."""

from __future__ import annotations

import torch

from streamcnn.errors import PlanDoesNotFit
from streamcnn.plan.plan import Plan
from streamcnn.plan.storage import Tier
from streamcnn.stores import (
    GpuTransfers,
    HostStore,
    MemoryStore,
    SpareFiles,
    SparePinned,
    SpillFolder,
    Store,
    StoreSpec,
    ZarrStore,
    free_bytes,
    remove_abandoned,
    spill_place,
    transfers_of,
)
from streamcnn.support.disk import lies_in_memory
from streamcnn.support.units import format_bytes, format_duration


def room_on_disk(spares: SpareFiles) -> int:
    """Bytes that spilled maps may take: the disk's free bytes, and the spare files of earlier passes."""
    # Folders that killed processes have left must take no room from this one.
    remove_abandoned(spares.parent)
    return free_bytes(spares.parent) + spares.nbytes


def check_disk(plan: Plan, spares: SpareFiles) -> None:
    """Refuse a plan that spills more than the disk has room for, before it fills the disk.

    Raises
    ------
    PlanDoesNotFit
        Naming the folder and the bytes that it has left.
    """
    needed = plan.bytes_on(Tier.DISK)
    if needed and needed > (room := room_on_disk(spares)):
        raise PlanDoesNotFit(
            f"the plan spills {format_bytes(needed)} at a time, and {spill_place(spares.parent)} has "
            f"{format_bytes(room)} left: pass spill= a folder on a larger disk, raise budget=, or free space"
        )


def gain_of_a_larger_disk(fastest: Plan, taken: Plan, room: int, spares: SpareFiles) -> str:
    """A text on the time that the fastest plan would save if the disk had more than ``room`` bytes."""
    needed = format_bytes(fastest.bytes_on(Tier.DISK))
    seconds, less = (format_duration(plan.projected_seconds) for plan in (taken, fastest))
    return (
        f"{spill_place(spares.parent)} has room for {format_bytes(room)}, and the fastest plan "
        f"spills {needed}: more is computed again instead, and a pass is projected to take {seconds} instead "
        f"of {less}; pass spill= a folder on a larger disk, or free space"
    )


def memory_beside_the_budget(plan: Plan, spares: SpareFiles) -> str:
    """The warning for a plan that spills maps to a folder that lies in memory; empty for any other plan."""
    nbytes = plan.bytes_on(Tier.DISK)
    # Every pass asks; most spill nothing, and need not look at what is mounted.
    if not nbytes or not lies_in_memory(place := spill_place(spares.parent)):
        return ""
    return (
        f"maps are spilled to {place}, which lies in memory itself: up to {format_bytes(nbytes)} there come "
        "on top of the budget; pass spill= a folder on a disk, or name one in the environment variable TMPDIR"
    )


class PassStores:
    """Opens the stores of one pass, without a reference to the pass, so that dropping the pass frees them."""

    def __init__(
        self, spares: SpareFiles, pinned: SparePinned, device: torch.device, *, zeroed: bool
    ) -> None:
        self.spares = spares
        self.transfers = transfers_of(device)
        self._pinned = pinned
        self._device = device
        self._zeroed = zeroed
        self._folder: SpillFolder | None = None

    def open(self, spec: StoreSpec, tier: Tier, tile: tuple[int, int]) -> Store:
        """An empty store in ``tier``."""
        if tier is Tier.DISK:
            self._folder = self._folder or SpillFolder(self.spares.parent)
            return ZarrStore(spec, self._folder.new_folder(), tile, self.transfers, self.spares)
        if tier is Tier.HOST:
            assert isinstance(self.transfers, GpuTransfers)
            return HostStore(spec, self.transfers, self._pinned)
        return MemoryStore(spec, self._device, zeroed=self._zeroed and self._device.type == "cpu")

    def close(self) -> None:
        """Remove the folder on disk, if there is one."""
        if self._folder is not None:
            self._folder.close()
            self._folder = None
