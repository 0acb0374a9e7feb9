"""Owners of temporary folders: a folder's name identifies its process, so others can tell if that is dead.

A process is identified by its number and start time, on one boot of one machine and in one PID namespace (its
*place*): containers have their own namespaces, and hosts may share a disk. A folder of another place is left
alone, whether its owner lives or not.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Self

PREFIX = "streamcnn-"
PROC = Path("/proc")
_NAME = re.compile(PREFIX + r"(?P<place>[0-9a-f]{16})-(?P<number>\d+)-(?P<start>\d+)-[0-9a-f]{16}")
_DEAD_STATES = "ZX"


@dataclass(frozen=True, slots=True)
class Owner:
    """A process of this place, dead or alive."""

    place: str
    number: int
    start: int
    """Clock ticks from the boot to the process's start."""

    @classmethod
    def present(cls) -> Self | None:
        """This process; None where the kernel does not say what identifies it."""
        place, found = _place(), _state_and_start(os.getpid())
        return None if place is None or found is None else cls(place, os.getpid(), found[1])

    @classmethod
    def of(cls, name: str) -> Self | None:
        """The owner that a folder's name encodes; None for any other name."""
        found = _NAME.fullmatch(name)
        return None if found is None else cls(found["place"], int(found["number"]), int(found["start"]))

    def is_dead(self) -> bool:
        """Whether it is a process of this place that has ended; False if that is unknown."""
        present = Owner.present()
        if present is None or self.place != present.place:
            return False
        found = _state_and_start(self.number)
        if found is None:
            return not (PROC / str(self.number)).exists()
        state, start = found
        # A process whose first thread has ended is a zombie too, while others go on.
        return start != self.start or (state in _DEAD_STATES and _num_threads(self.number) <= 1)


def new_name() -> str:
    """A unique name for a folder of this process."""
    owner, chance = Owner.present(), secrets.token_hex(8)
    if owner is None:
        return f"{PREFIX}{chance}"
    return f"{PREFIX}{owner.place}-{owner.number}-{owner.start}-{chance}"


def abandoned(parent: Path) -> list[Path]:
    """Folders in ``parent`` whose owners, processes of this user and place, are dead."""
    try:
        names = os.listdir(parent)
    except PermissionError:
        # Some folders may be written to and not listed.
        return []
    return [parent / name for name in names if _is_abandoned(parent / name)]


def _is_abandoned(folder: Path) -> bool:
    owner = Owner.of(folder.name)
    if owner is None:
        return False
    try:
        facts = folder.lstat()
    except FileNotFoundError:
        return False
    # Another user's processes may be hidden from this one.
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and owner.is_dead()


def _place() -> str | None:
    """This boot of this machine and this PID namespace, as sixteen hexadecimal digits."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        numbers = os.readlink(PROC / "self/ns/pid")
    except OSError:
        return None
    return hashlib.sha256(f"{boot} {numbers}".encode()).hexdigest()[:16]


def _state_and_start(number: int) -> tuple[str, int] | None:
    """State and start of a process; None if there is no such process."""
    try:
        text = (PROC / str(number) / "stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in parentheses, which may have any characters.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _num_threads(number: int) -> int:
    try:
        return len(os.listdir(PROC / str(number) / "task"))
    except OSError:
        return 0
