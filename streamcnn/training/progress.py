"""A run's progress, to which its updates and epochs add."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from streamcnn.training.checkpoints import is_checkpoint_name
from streamcnn.training.update_record import UpdateRecord, add_to


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a finished run."""

    num_updates: int
    num_epochs: int
    best: Path
    """The checkpoint with the best validation score."""
    best_score: float
    """That score: accuracy, or of segmentation the mean IoU."""


@dataclass(slots=True)
class Progress:
    """A run's progress: what has been counted and summed so far.

    Raises
    ------
    ValueError
        If a count is negative, the score is outside [-1, 1], or ``best`` is not a checkpoint's name.
    """

    update: int = 0
    epoch: int = 0
    """Number of finished epochs."""
    num_images: int = 0
    """Images of the present epoch so far; what follows is summed over them."""
    loss_sum: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    """The task's measures of each image, by name."""
    best_score: float = -1.0
    """The best epoch's score on the validation images, by the task's measure; -1 for none."""
    best: str | None = None
    """Name of the checkpoint with that score."""
    epochs_since_best: int = 0
    is_over: bool = False

    def __post_init__(self) -> None:
        for name in ("update", "epoch", "num_images", "epochs_since_best"):
            require_count(name, getattr(self, name))
        if not -1 <= self.best_score <= 1:
            raise ValueError(f"best_score={self.best_score}: allowed are shares, and -1 for none")
        if self.best is not None and not is_checkpoint_name(self.best):
            raise ValueError(f"best={self.best!r}: allowed are names of checkpoints, and None")

    def add(self, record: UpdateRecord) -> None:
        """Count an update, and add its sums."""
        self.update += 1
        self.num_images += record.num_images
        self.loss_sum += record.loss_sum
        add_to(self.sums, record.sums)

    def means(self) -> dict[str, float]:
        """Means of the loss and of the task's measures over the present epoch's images so far, by name."""
        sums, count = {"loss": self.loss_sum, **self.sums}, max(self.num_images, 1)
        return {name: value / count for name, value in sums.items()}

    def end_epoch(self, score: float) -> bool:
        """Count the present epoch, and return whether its score is the best so far."""
        self.epoch += 1
        self.num_images, self.loss_sum, self.sums = 0, 0.0, {}
        is_better = score > self.best_score
        self.epochs_since_best = 0 if is_better else self.epochs_since_best + 1
        if is_better:
            self.best_score = score
        return is_better

    def to_result(self, best: Path) -> TrainResult:
        """The run's result, given the path of the best checkpoint."""
        return TrainResult(self.update, self.epoch, best, self.best_score)

    def forget_best(self) -> None:
        """Forget the best checkpoint and its score, so that the next epoch becomes the best."""
        self.best, self.best_score = None, -1.0

    def reaches(self, epochs: int, patience: int | None) -> bool:
        """Whether ``epochs`` epochs are over, or the last ``patience`` ones were no better than the best."""
        return self.epoch >= epochs or (patience is not None and self.epochs_since_best >= patience)


def require_count(name: str, found: int) -> None:
    """Make sure that a field is a count.

    Raises
    ------
    ValueError
        If it is negative, or 2^63 or more.
    """
    if not 0 <= found < 2**63:
        raise ValueError(f"{name}={found}: allowed are 0 and more, below 2**63")
