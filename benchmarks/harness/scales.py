"""Sizes of the benchmark: the paper's, and smaller ones for machines without its cards."""

from __future__ import annotations

from dataclasses import dataclass

from streamcnn.data.ultramnist import Recipe
from streamcnn.data.ultramnist.layout import REFERENCE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How many images of which size, and for how long a method is trained on them."""

    name: str
    recipe: Recipe
    canvas: int
    """Height and width of the images, in pixels."""
    num_train: int
    num_test: int
    epochs: int
    epochs_when_shrunk: int | None = None
    """Of methods on shrunk images, whose epochs are short; None takes the same number."""
    largest_batch: int | None = None
    """Batches are filled up to the budget, and no further than this."""
    learning_rate: float | None = None
    """The same for all methods; None takes each method's own, which are the paper's. Likewise the next."""
    gamma: float | None = None
    """Factor of the learning rate after each epoch."""
    seconds: float | None = None
    """Of training, after which a method is scored as it is."""

    def pixels(self, length: int) -> int:
        """A length on the paper's canvas of 4000 pixels in pixels of this one."""
        return max(1, round(length * self.canvas / REFERENCE_SIZE))


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="paper", recipe=Recipe.FAITHFUL, canvas=4000, num_train=28_000, num_test=28_000, epochs=50
        ),
        # Digits of 14 to 256 pixels, and resolutions of 33, 66 and 131.
        Scale(
            name="single",
            recipe=Recipe.SINGLE,
            canvas=512,
            num_train=2000,
            num_test=1000,
            epochs=10,
            epochs_when_shrunk=100,
            largest_batch=8,
            learning_rate=2e-3,
            gamma=0.9,
        ),
        # Digits of 14 to 64 pixels, and resolutions of 8, 16 and 33.
        Scale(
            name="mini",
            recipe=Recipe.SINGLE,
            canvas=128,
            num_train=2000,
            num_test=400,
            epochs=30,
            largest_batch=16,
            learning_rate=2e-3,
            gamma=0.9,
            seconds=45,
        ),
        # Seconds: it tests the harness.
        Scale(
            name="tiny",
            recipe=Recipe.SINGLE,
            canvas=64,
            num_train=40,
            num_test=20,
            epochs=1,
            largest_batch=4,
            learning_rate=1e-3,
            gamma=0.9,
            seconds=5,
        ),
        # Digits of 14 to 512 pixels, and resolutions of 66, 131 and 262. All rows train for the same time.
        Scale(
            name="gpu",
            recipe=Recipe.SINGLE,
            canvas=1024,
            num_train=3000,
            num_test=500,
            epochs=60,
            largest_batch=16,
            learning_rate=2e-3,
            gamma=0.9,
            seconds=60,
        ),
    )
}
