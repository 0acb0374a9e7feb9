"""States of a net that show an error: no branch switched off, no statistic that fits by chance."""

from __future__ import annotations

import torch
from torch import nn

Shape = tuple[int, int, int, int]


def randomized(module: nn.Module) -> nn.Module:
    """``module`` with every vector of its state moved away from the 0 or 1 that it starts at.

    Zero-initialised scales would switch off whole branches, and zero running means hide their use.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() == max(parameter.shape, default=1):
                parameter.add_(torch.empty_like(parameter).uniform_(0.1, 0.5))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.7, 1.4)
    return module


def calibrated(module: nn.Module, shape: Shape) -> nn.Module:
    """``module`` in eval mode, with the running statistics of one random image of ``shape``.

    With statistics that do not fit, activations grow from layer to layer until gates saturate, and the
    gradients answer to the last digit of the image.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        module.train()(torch.randn(shape))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return module.eval()


def without_chance(module: nn.Module) -> nn.Module:
    """``module`` with every probability to drop something set to zero, found by the attributes' names.

    Plain and streamed passes draw different masks from the same seed.
    """
    for layer in module.modules():
        drops = "drop" in type(layer).__name__.lower() or "stochastic" in type(layer).__name__.lower()
        for name, value in vars(layer).items():
            if isinstance(value, float) and ("drop" in name or (drops and name == "p")):
                setattr(layer, name, 0.0)
    return module
