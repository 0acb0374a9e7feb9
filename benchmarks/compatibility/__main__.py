"""Run all cases and write what became of them to docs/compatibility.md.

python -m benchmarks.compatibility
python -m benchmarks.compatibility --only hook --no-write

The exit status is 1 if anything is WRONG.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path

import torch

from benchmarks.compatibility.cases import all_cases
from benchmarks.compatibility.comparison import Result, compare

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
_HEAD = """# What may stand in a forward pass

This page says, case by case, whether code that people write in a forward pass streams exactly or is refused.
`python -m benchmarks.compatibility` writes it.

Every case is a small net with one kind of code in it, and a script that trains it. The script runs twice: on
the plain net, and on a `StreamingModel` of it with tiles of 16 pixels. The two runs are compared in all
outputs, gradients and buffers, in what the module holds afterwards, and in what the code does outside it. The
error is the largest `|a - b| / max(|b|, 1e-6 * largest)`; `tests/test_compatibility.py` asks for 1e-9 in
float64.

* **same**: everything agrees.
* **refused**: the model raises an error that says why; the module is as before.
* **WRONG**: something differs, or a streamed pass fails without a reason.
"""
_WIDTH = 110
"""Characters of a cell."""


def main() -> None:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose kind or name contains this text")
    parser.add_argument("--no-write", action="store_true", help="print, and leave the page as it is")
    asked = parser.parse_args()
    # Plans are then the same on every machine.
    os.environ.setdefault("STREAMCNN_CALIBRATION", "off")
    torch.set_num_threads(1)
    results: dict[int, Result] = {}
    for number, case in enumerate(all_cases(), 1):
        if asked.only in f"{case.kind}: {case.name}":
            results[number] = result = compare(case)
            unexpected = "" if result.holds else f"  (expected: {case.expected})"
            print(f"{number:3}  {case.name}: {result.verdict}{unexpected}", flush=True)
    print(_counted(list(results.values())))
    if not (asked.no_write or asked.only):
        PAGE.write_text(page(results))
    sys.exit(any(result.verdict == "WRONG" for result in results.values()))


def page(results: dict[int, Result]) -> str:
    """The results by number as a page of Markdown, a table for every kind."""
    parts = [_HEAD, f"{_counted(list(results.values()))}\n"]
    for kind, rows in itertools.groupby(results.items(), key=lambda item: item[1].case.kind):
        parts.append(
            f"## {kind}\n\n| | what | plain | streamed | verdict | error |\n|--:|---|---|---|---|--:|"
        )
        parts += [_row(number, result) for number, result in rows]
        parts.append("")
    return "\n".join(parts)


def _row(number: int, result: Result) -> str:
    refused = result.verdict.startswith("refused")
    cells = (
        str(number),
        result.case.name,
        result.plain,
        # The verdict says it.
        "" if refused else result.streamed,
        result.verdict,
        "" if refused else f"{result.error:.1e}",
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return line if len(line) <= _WIDTH else f"{line[:_WIDTH]} …"


def _counted(results: list[Result]) -> str:
    verdicts = [result.verdict.split(":")[0] for result in results]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("same", "refused", "WRONG"))
    return f"{len(results)} cases: {counts}."


if __name__ == "__main__":
    main()
