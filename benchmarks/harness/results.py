"""Results of rows: one JSON line each, the newest of a row counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import record as records


@dataclass(frozen=True, slots=True)
class Key:
    """Which run a result is of."""

    scale: str
    budget: int
    """Bytes."""
    method: str
    seed: int
    pretrained: bool
    device: str
    """Its kind: cpu or cuda."""
    images: str
    """Fingerprint of the scale's images."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def record(key: Key, found: Mapping[str, Any], command: str) -> None:
    """Write down what a row found."""
    fields = {name: value for name, value in key.to_dict().items() if name != "device"}
    records.append(_name(key.scale), command, **{**found, **fields, "device_kind": key.device})


def done(key: Key) -> bool:
    """Whether the row has run to its end, diverged, or was refused by its ceiling."""
    return any(_key(line) == key and line["outcome"] != "failed" for line in read(key.scale))


def read(scale: str) -> list[dict[str, Any]]:
    """The newest result of every row of a scale, in the order in which they were written."""
    path = records.RESULTS / f"{_name(scale)}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    newest = {_key(line): line for line in lines}
    return list(newest.values())


def results_folder(scale: str) -> Path:
    """Where the table and the figures of a scale's results are, beside them."""
    return records.RESULTS / _name(scale)


def _name(scale: str) -> str:
    return f"ultramnist_{scale}"


def _key(line: Mapping[str, Any]) -> Key:
    return Key(
        **{name: line[name] for name in ("scale", "budget", "method", "seed", "pretrained", "images")},
        device=line["device_kind"],
    )
