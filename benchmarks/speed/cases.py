"""What is measured: a network, its images, and the budgets that it is streamed under."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """A network on a batch of square images."""

    model: str
    """As for `load_model`."""
    size: int
    """Edge of an image in pixels."""
    budgets: tuple[str, ...]
    """Of the streamed passes, such as ``"8GiB"``."""
    batch: int = 1
    inference: bool = False
    """Evaluation mode and a forward pass alone, rather than training mode, forward and backward."""
    autocast: bool = False
    """Forward passes compute in bfloat16 where autocast does."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of the images."""
        return self.batch, 3, self.size, self.size

    @property
    def name(self) -> str:
        """Tells cases apart that differ in more than their budgets."""
        images = f"{self.size}x{self.size}" if self.batch == 1 else f"{self.batch}x3x{self.size}x{self.size}"
        settings = (" bfloat16" if self.autocast else "") + (" inference" if self.inference else "")
        return f"{self.model} {images}{settings}"


STANDARD = {
    "cpu": (
        Case("resnet18", 2048, ("8GiB", "256MiB")),
        Case("resnet50", 1024, ("8GiB", "300MiB")),
        Case("efficientnet_b0", 1024, ("8GiB", "256MiB")),
        Case("convnext_tiny", 1024, ("8GiB",)),
        Case("mobilenetv3_large_100", 4000, ("1GiB",)),
        Case("resnet18", 128, ("8GiB",), batch=16),
    ),
    "cuda": (
        Case("resnet50", 4000, ("11GB", "6.9GB", "3.5GB"), autocast=True),
        Case("resnet50", 8000, ("11GB",), autocast=True),
        Case("efficientnet_b0", 4000, ("11GB",), autocast=True),
        Case("convnext_tiny", 4000, ("11GB",), autocast=True),
        Case("resnet50", 4000, ("11GB",), autocast=True, inference=True),
    ),
}
"""The cases of ``python -m benchmarks speed all``, by the device's type."""
