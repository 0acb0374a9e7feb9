"""The image in code that Dynamo follows."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcnn.graph.fakes import is_fake


class CannotBeGuarded(Exception):
    """The forward pass has code that Dynamo does not follow."""


def as_image(image: Tensor) -> Tensor:
    """The image as the model gets it, while its forward pass is captured."""
    if not is_fake(image):
        raise CannotBeGuarded("torch.compile is switched off")
    return image.clone(memory_format=torch.contiguous_format)
