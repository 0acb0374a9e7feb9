"""Methods: what the data files in `methods/` say."""

from __future__ import annotations

import enum
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamcnn.support.units import parse_bytes

FOLDER = Path(__file__).parent / "methods"


class Kind(enum.Enum):
    """How a method comes from a large image to a class."""

    SHRINK = "shrink"
    """Images are shrunk beforehand."""
    RESIZER = "resizer"
    """A small network learns to shrink them."""
    STREAM = "stream"
    """At full resolution, through ``StreamingModel``."""
    TILES = "tiles"
    """Pieces are classified without context, and vote."""
    PATCHGD = "patchgd"
    """A grid of features is filled patch by patch, and gradients flow through a few patches at a time."""
    DETECTOR = "detector"
    """Streamed; finds the digits and adds them up, having been trained on each: outside the rules."""
    PARTITION = "partition"
    """Streamed, the tiles divided among processes."""
    REFERENCE = "reference"
    """Not run: a figure that was published, or follows from the number of classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """What a method is trained with where there is so much memory: the paper's, where it has figures."""

    budget: str
    learning_rate: float
    gamma: float = 1.0
    """Factor of the learning rate after each epoch."""
    batch: int | None = None
    """What the paper's search for the largest batch found; of streamed methods, what they take at 4000²."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStage:
    """One of several trainings, each going on with the weights of the one before."""

    resolution: int
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row of the table. Lengths are pixels of the paper's canvas of 4000.

    Raises
    ------
    ValueError
        If a kind of method lacks what it needs.
    """

    name: str
    kind: Kind
    family: str
    """The backbone, as a table calls it."""
    model: str | None = None
    """A timm name, or ``package.module:factory``, which is called with the number of classes."""
    resolution: int | None = None
    """Height and width that images are shrunk to; None leaves them as they are."""
    tile: int | None = None
    """Height and width of pieces and patches."""
    share: float = 1.0
    """Pieces or patches of an image that are sampled at a time, as a share of all."""
    inversion: float = 0.0
    """Share of training images that are inverted."""
    schedule: str = "ExponentialLR"
    clip_norm: float | None = None
    """Largest norm of the gradients of an update."""
    stages: tuple[TrainingStage, ...] = ()
    hyperparameters: tuple[Hyperparameters, ...] = ()
    published: Mapping[str, str] = field(default_factory=dict)
    """Accuracies in percent as the paper has them, by the column of its table."""
    note: str = ""
    """For the table's last column."""

    def __post_init__(self) -> None:
        needed = {"shrink": "resolution", "resizer": "resolution", "tiles": "tile", "patchgd": "tile"}
        missing = [name for name in (needed.get(self.kind.value),) if name and getattr(self, name) is None]
        if self.runs:
            missing += [name for name in ("model", "hyperparameters") if not getattr(self, name)]
        if missing:
            raise ValueError(
                f"method {self.name} of kind {self.kind.value} has no {' and no '.join(missing)}"
            )
        for known in self.hyperparameters:
            parse_bytes(known.budget)

    @property
    def is_streamed(self) -> bool:
        """Whether the network is run by ``StreamingModel`` in one process."""
        return self.kind in (Kind.STREAM, Kind.DETECTOR)

    @property
    def has_weights(self) -> bool:
        """Whether there may be pretrained weights for the model."""
        return self.model is not None and ":" not in self.model

    @property
    def input_text(self) -> str:
        """The resolution that the network sees on the paper's canvas, for a table."""
        if self.resolution is not None:
            return f"{self.resolution}²"
        return "-" if self.kind is Kind.REFERENCE else "full"

    @property
    def runs(self) -> bool:
        """Whether there is anything to train."""
        return self.kind not in (Kind.REFERENCE, Kind.PARTITION)

    def hyperparameters_for(self, budget: int) -> Hyperparameters:
        """Those of the largest budget in the paper that is no larger than ``budget``, or of the smallest."""
        known = sorted(self.hyperparameters, key=lambda found: parse_bytes(found.budget) or 0)
        within = [found for found in known if (parse_bytes(found.budget) or 0) <= budget]
        return (within or known[:1])[-1]


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
                method = _method(values)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from error
            if method.name in methods:
                raise ValueError(f"{path}: there is a method {method.name} already")
            methods[method.name] = method
    return methods


def _method(values: dict[str, Any]) -> Method:
    return Method(
        **{
            **values,
            "kind": Kind(values["kind"]),
            "stages": tuple(TrainingStage(**stage) for stage in values.get("stages", ())),
            "hyperparameters": tuple(Hyperparameters(**known) for known in values.get("hyperparameters", ())),
        }
    )
