"""All kinds of methods, and all methods: what the data files in `methods/` say."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from benchmarks.harness.kinds.detector import Detector
from benchmarks.harness.kinds.not_run import Partition, Reference
from benchmarks.harness.kinds.patchgd import PatchGradientDescent
from benchmarks.harness.kinds.resizer import Resizer
from benchmarks.harness.kinds.shrink import Shrink
from benchmarks.harness.kinds.stream import Stream
from benchmarks.harness.kinds.tiles import Tiles
from benchmarks.harness.method import Hyperparameters, Method, TrainingStage

FOLDER = Path(__file__).parent / "methods"
KINDS: dict[str, type[Method]] = {
    kind.kind: kind
    for kind in (Shrink, Resizer, Stream, Tiles, PatchGradientDescent, Detector, Partition, Reference)
}


def load_methods(folder: Path = FOLDER) -> dict[str, Method]:
    """All methods by name, in the order of their files.

    Raises
    ------
    ValueError
        If a file says something that has no meaning; the text names it.
    """
    methods: dict[str, Method] = {}
    for path in sorted(folder.glob("*.toml")):
        for values in tomllib.loads(path.read_text())["method"]:
            try:
                method = _method(**values)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from error
            if method.name in methods:
                raise ValueError(f"{path}: there is a method {method.name} already")
            methods[method.name] = method
    return methods


def _method(
    *,
    kind: str,
    stages: list[dict[str, Any]] | None = None,
    hyperparameters: list[dict[str, Any]] | None = None,
    **values: Any,
) -> Method:
    if kind not in KINDS:
        raise ValueError(f"no kind {kind}: there are {', '.join(KINDS)}")
    return KINDS[kind](
        stages=tuple(TrainingStage(**stage) for stage in stages or ()),
        hyperparameters=tuple(Hyperparameters(**known) for known in hyperparameters or ()),
        **values,
    )
