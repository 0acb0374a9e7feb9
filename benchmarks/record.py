"""One result as one JSON line: what ran, where, and what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from streamcnn.runtime.calibration import processor

RESULTS = Path(__file__).parent / "results"


def device_name(*, cpu: bool = False) -> str:
    """The accelerator's name, or the processor's with its number of threads if there is none or ``cpu``."""
    if torch.cuda.is_available() and not cpu:
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def resident_bytes(process: int) -> int:
    """Present resident memory in bytes of the process with this number."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def commit() -> str:
    """Short hash of the checked-out commit, with a mark if files other than results differ from it.

    In a copy without its history, the environment variable ``STREAMCNN_COMMIT`` names the commit.
    """
    if named := os.environ.get("STREAMCNN_COMMIT"):
        return named
    found = _git("describe", "--always") or "unknown"
    changed = _git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")
    return f"{found}-dirty" if changed else found


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def in_fresh_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m module arguments`` and return the JSON object on its last line; its errors end this
    process."""
    process = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(process, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def append(name: str, command: str, **fields: Any) -> str:
    """Append a result to ``results/<name>.jsonl`` and return the line."""
    record = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        **({} if "device" in fields else {"device": device_name()}),
        "torch": torch.__version__,
        "command": command,
        **fields,
    }
    line = json.dumps(record)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")
    return line
