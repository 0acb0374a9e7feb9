"""Host memory left by limits besides the budget: those of the process and of its control groups.

The kernel refuses allocations past ``RLIMIT_DATA`` and ``RLIMIT_AS``. A control group's limit, by which
containers, systemd and Slurm limit memory, ends the process without a word.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from streamcnn.ceiling.allocator import cache_thread_stack, start_thread_pool, trim_heap
from streamcnn.ceiling.data_segment import own_data_limit
from streamcnn.ceiling.kept_blocks import free_block_bytes, resident_free_block_bytes
from streamcnn.ceiling.process import status_bytes
from streamcnn.support.units import format_bytes

CGROUPS = Path("/sys/fs/cgroup")
"""The folder of the control groups."""
MEMBERSHIP = Path("/proc/self/cgroup")
"""The file that lists this process's groups."""
VIRTUAL_MEMORY = Path("/proc/sys/vm")
"""The folder of the kernel's settings of virtual memory."""
_OFFLOAD_SHARE = 0.75
"""The part of the host's RAM that maps or files may take; the rest is for everything else."""
_NO_LIMIT = 2**62
"""From here on a control group's limit of the first version means none."""
_KERNELS_SHARE = 64
"""One byte in this many of a control group's room is left for page tables and the like."""
_LIBRARIES = 2**25
"""Address space that is left for libraries' code and threads' stacks, which no plan counts."""
_STEPS = 16
"""Rooms are rounded down by one part in this many at most."""
_RAISE_GROUPS = (
    "raise it (docker run --memory, resources.limits.memory of Kubernetes, MemoryMax= of systemd, --mem of "
    "Slurm) or end other processes in the group"
)


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that one limit leaves."""

    nbytes: int
    name: str
    """The limit in words, for an error's text."""
    limit: int
    """Bytes."""
    used: int
    """Bytes of it that are in use and cannot be taken back."""
    advice: str
    is_enforced: bool
    """Whether the kernel or a card's driver refuses what goes past it, rather than end the process."""
    users: str = ""
    """Who uses ``used``, for an error's text; empty for any process."""

    @property
    def rounded(self) -> int:
        """``nbytes`` rounded down, so that a few bytes more or less need no new plan."""
        return rounded_down(self.nbytes)

    def __str__(self) -> str:
        return (
            f"{self.name} is {format_bytes(self.limit)}, of which {format_bytes(self.used)} are in use"
            f"{self.users}, so that {format_bytes(self.nbytes)} can be had: {self.advice}"
        )


def rounded_down(nbytes: int) -> int:
    """``nbytes`` less a sixteenth at most."""
    step = max(1, (1 << nbytes.bit_length()) // (2 * _STEPS))
    return nbytes // step * step


def host_room() -> Room | None:
    """The smallest room that any limit leaves; None where nothing is limited."""
    rooms = list(_rooms())
    if rooms:
        # Every pass does this first, so it is no part of a plan.
        start_thread_pool()
        cache_thread_stack()
        trim_heap()
        rooms = list(_rooms())
    return min(rooms, key=lambda room: room.nbytes, default=None)


def host_memory_bytes() -> int:
    """Bytes of the host's RAM or, if less, the lowest limit of a control group, in use or not."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for files, folder in _groups():
        limit = _number(folder / files.limit)
        found += [] if limit is None else [limit]
    return min(found)


def host_offload_bytes() -> int:
    """Bytes of the host's RAM that maps offloaded from a GPU, or files of maps, may take."""
    return int(_OFFLOAD_SHARE * host_memory_bytes())


def buffered_file_bytes() -> int:
    """Bytes of files that the system buffers in RAM before it begins to write them, so that no writer waits.

    Writers past halfway from ``dirty_background_bytes`` to ``dirty_bytes``, or the ratios, wait for the disk
    (Linux, Documentation/admin-guide/sysctl/vm.rst). Without these files it is 0.
    """
    memory = host_offload_bytes()
    fixed, percent = (
        _number(VIRTUAL_MEMORY / f"dirty_background_{unit}") or 0 for unit in ("bytes", "ratio")
    )
    return min(fixed or memory * percent // 100, memory)


def _rooms() -> Iterator[Room]:
    yield from _own_rooms()
    for files, folder in _groups():
        room = _group_room(files, folder)
        if room is not None:
            yield room


def _own_rooms() -> Iterator[Room]:
    """The process's own limits."""
    if sys.platform != "linux":
        return
    import resource

    limit, used = own_data_limit(), status_bytes("VmData")
    if limit != sys.maxsize and used is not None:
        used -= free_block_bytes()
        name = "the process's own limit on its data segment, RLIMIT_DATA (ulimit -d),"
        advice = "raise it (ulimit -d before the start, resource.setrlimit in the process)"
        yield Room(max(0, limit - used), name, limit, used, advice, is_enforced=True)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = status_bytes("VmSize")
    if limit != resource.RLIM_INFINITY and used is not None:
        name = "the process's own limit on its address space, RLIMIT_AS (ulimit -v),"
        advice = "raise it (ulimit -v before the start, resource.setrlimit in the process)"
        yield Room(max(0, limit - used - _LIBRARIES), name, limit, used, advice, is_enforced=True)


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of one version of control groups."""

    limit: str
    used: str
    cached: tuple[str, ...]
    """Lines of ``memory.stat`` with pages of files, which the kernel takes back when memory is short."""


_FIRST = _Files(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_SECOND = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def _groups() -> Iterator[tuple[_Files, Path]]:
    """Folders of the process's groups and of their parents, each with the names of its files."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            has_first = not (CGROUPS / "cgroup.controllers").exists()
            root = CGROUPS / "unified" if has_first else CGROUPS
            yield from ((_SECOND, each) for each in _levels(root, path))
        elif "memory" in controllers.split(","):
            yield from ((_FIRST, each) for each in _levels(CGROUPS / "memory", path))


def _levels(root: Path, path: str) -> Iterator[Path]:
    """The folders of a group and of its parents; only the root if the path leaves it, as in containers."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    for length in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:length])


def _group_room(files: _Files, folder: Path) -> Room | None:
    """The room that a group's limit leaves; None if the group has no limit or it cannot be read."""
    limit, used = _number(folder / files.limit), _number(folder / files.used)
    if limit is None or used is None or limit >= _NO_LIMIT:
        return None
    used = max(0, used - _cached(folder, files) - resident_free_block_bytes())
    room = max(0, limit - used)
    name = f"the memory limit of the control group ({folder / files.limit})"
    return Room(room - room // _KERNELS_SHARE, name, limit, used, _RAISE_GROUPS, is_enforced=False)


def _cached(folder: Path, files: _Files) -> int:
    text = _text(folder / "memory.stat") or ""
    fields = dict(line.split() for line in text.splitlines())
    return sum(int(fields.get(name, 0)) for name in files.cached)


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no such file or it says ``max``."""
    text = (_text(file) or "").strip()
    return int(text) if text.isdecimal() else None


def _text(file: Path) -> str | None:
    """A file's text; None if it is missing, unreadable for this process, or its group has just gone."""
    try:
        return file.read_text()
    except OSError:
        return None
