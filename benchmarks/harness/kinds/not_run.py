"""Rows that a table has and nothing is trained for."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness.method import Method


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition(Method):
    """Streamed, the tiles divided among processes: not built yet."""

    kind = "partition"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference(Method):
    """A figure that was published, or follows from the number of classes."""

    kind = "reference"

    @property
    def input_text(self) -> str:
        """The published resolution, if there is one."""
        return "-" if self.resolution is None else f"{self.resolution}²"
