"""Attributions to pixels, with the names, arguments and definitions of captum.

Each is a value for every channel of every pixel of the image as the model gets it, after ``preprocess``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamcnn.attribution.image_gradients import ImageGradients
from streamcnn.attribution.scores import Target
from streamcnn.data.reader import Image
from streamcnn.runtime.streaming_model import StreamingModel

INTEGRATION_METHODS = (
    "gausslegendre",
    "riemann_left",
    "riemann_middle",
    "riemann_right",
    "riemann_trapezoid",
)
NOISE_TUNNEL_TYPES = ("smoothgrad", "smoothgrad_sq", "vargrad")


class GradientMethod(ABC):
    """An attribution that is computed from gradients with respect to the image.

    The model is used in its present mode, which should be ``eval``, so that an image's score depends on that
    image alone. Parameters get no gradients.

    Parameters
    ----------
    model
        A classifier, whose budget applies.
    """

    num_copies = 0
    """Tensors of the image's size that are held while a gradient is computed, besides the image."""

    def __init__(self, model: StreamingModel) -> None:
        self.model = model

    @abstractmethod
    def of(self, image: Tensor, gradients: ImageGradients, **options: Any) -> Tensor:
        """The attribution at ``image`` (N, C, H, W), a new tensor like it."""

    def gradients(
        self, inputs: Image, target: Target, additional: Any, *, num_copies: int = 0
    ) -> ImageGradients:
        """The image as the model gets it, with a function for gradients; see :class:`ImageGradients`."""
        return ImageGradients(self.model, inputs, target, additional, num_copies=self.num_copies + num_copies)


class Saliency(GradientMethod):
    """The gradient of the score (Simonyan et al. 2014), as ``captum.attr.Saliency`` defines it."""

    def attribute(
        self, inputs: Image, target: Target = None, abs: bool = True, additional_forward_args: Any = None
    ) -> Tensor:
        """``|d score / d image|``, (N, C, H, W).

        Parameters
        ----------
        inputs
            A tensor (N, C, H, W), a source, or a list of sources.
        target
            The class to explain; see :data:`Target`.
        abs
            Whether to take absolute values.
        additional_forward_args
            Further arguments of the module after the image: one argument, or a tuple.

        Raises
        ------
        PlanDoesNotFit
            If image, gradient and pass do not fit in the budget together.
        UnsupportedModel, CorruptImage, ValueError
            For models, images and targets that cannot be used.
        """
        gradients = self.gradients(inputs, target, additional_forward_args)
        return self.of(gradients.image, gradients, abs=abs)

    def of(self, image: Tensor, gradients: ImageGradients, *, abs: bool = True, **_: Any) -> Tensor:
        gradient = gradients(image)
        return gradient.abs_() if abs else gradient


class InputXGradient(GradientMethod):
    """Image times gradient (Shrikumar et al. 2016), as ``captum.attr.InputXGradient`` defines it."""

    def attribute(self, inputs: Image, target: Target = None, additional_forward_args: Any = None) -> Tensor:
        """``image * d score / d image``, (N, C, H, W).

        Arguments and errors are those of :meth:`Saliency.attribute`.
        """
        gradients = self.gradients(inputs, target, additional_forward_args)
        return self.of(gradients.image, gradients)

    def of(self, image: Tensor, gradients: ImageGradients, **_: Any) -> Tensor:
        return gradients(image).mul_(image)


class IntegratedGradients(GradientMethod):
    """The sum of gradients on the path from a baseline to the image (Sundararajan et al. 2017).

    Defined as ``captum.attr.IntegratedGradients``. One gradient is computed at a time.

    Parameters
    ----------
    model
        A classifier, whose budget applies.
    multiply_by_inputs
        Whether the sum is multiplied by ``image - baseline``.
    """

    num_copies = 2  # the sum, and the image on the path

    def __init__(self, model: StreamingModel, multiply_by_inputs: bool = True) -> None:
        super().__init__(model)
        self.multiply_by_inputs = multiply_by_inputs

    def attribute(
        self,
        inputs: Image,
        baselines: float | Tensor | None = None,
        target: Target = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
    ) -> Tensor:
        """``(image - baseline) * sum_k weight_k * gradient(baseline + position_k * (image - baseline))``.

        Parameters
        ----------
        inputs, target, additional_forward_args
            As for :meth:`Saliency.attribute`.
        baselines
            Start of the path: a number, or a tensor that broadcasts to the image as the model gets it; None
            for 0.
        n_steps
            Number of gradients to compute.
        method
            Name of the quadrature rule: one of ``INTEGRATION_METHODS``.

        Raises
        ------
        PlanDoesNotFit, UnsupportedModel, CorruptImage, ValueError
            As of :meth:`Saliency.attribute`, and for invalid steps, methods and baselines.
        """
        integration_steps(method, n_steps)
        gradients = self.gradients(inputs, target, additional_forward_args)
        return self.of(gradients.image, gradients, baselines=baselines, n_steps=n_steps, method=method)

    def of(
        self,
        image: Tensor,
        gradients: ImageGradients,
        *,
        baselines: float | Tensor | None = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        **_: Any,
    ) -> Tensor:
        baseline = _as_baseline(baselines, image)
        total = torch.zeros_like(image)
        for position, weight in integration_steps(method, n_steps):
            on_the_way = (image - baseline).mul_(position).add_(baseline)
            total.add_(gradients(on_the_way), alpha=weight)
        return total.mul_(image - baseline) if self.multiply_by_inputs else total


class NoiseTunnel:
    """The average of a method's attributions at noisy images, as SmoothGrad (Smilkov et al. 2017).

    Defined as ``captum.attr.NoiseTunnel``, except for the seed. One sample is computed at a time.

    Parameters
    ----------
    attribution_method
        The method to average; ``Saliency`` in the paper.
    """

    def __init__(self, attribution_method: GradientMethod) -> None:
        self.attribution_method = attribution_method

    def attribute(
        self,
        inputs: Image,
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        stdevs: float = 1.0,
        *,
        seed: int = 0,
        target: Target = None,
        additional_forward_args: Any = None,
        **options: Any,
    ) -> Tensor:
        """The mean of the samples' attributions, the mean of their squares, or their variance: (N, C, H, W).

        Parameters
        ----------
        inputs, target, additional_forward_args
            As for :meth:`Saliency.attribute`.
        nt_type
            ``"smoothgrad"``, ``"smoothgrad_sq"`` or ``"vargrad"``.
        nt_samples
            Number of noisy images.
        stdevs
            Standard deviation of the noise, in units of the image as the model gets it.
        seed
            The noise of sample k is drawn by ``torch.randn`` from a generator on the image's device with
            the seed ``seed + k``.
        **options
            Options of the method, such as ``abs`` or ``n_steps``.

        Raises
        ------
        PlanDoesNotFit, UnsupportedModel, CorruptImage, ValueError
            As of :meth:`Saliency.attribute`, and for an unknown type, or less than one sample.
        """
        if nt_type not in NOISE_TUNNEL_TYPES:
            raise ValueError(f"nt_type={nt_type!r}: allowed are {', '.join(NOISE_TUNNEL_TYPES)}")
        if nt_samples < 1:
            raise ValueError(f"nt_samples={nt_samples}: allowed are 1 and more")
        needs = {"smoothgrad": (True, False), "smoothgrad_sq": (False, True), "vargrad": (True, True)}[
            nt_type
        ]
        gradients = self.attribution_method.gradients(
            inputs, target, additional_forward_args, num_copies=1 + sum(needs)
        )
        image = gradients.image
        first, second = (torch.zeros_like(image) if needed else None for needed in needs)
        for sample in range(nt_samples):
            noisy = _noise_like(image, seed + sample).mul_(stdevs).add_(image)
            found = self.attribution_method.of(noisy, gradients, **options)
            if first is not None:
                first.add_(found, alpha=1 / nt_samples)
            if second is not None:
                second.addcmul_(found, found, value=1 / nt_samples)
            # Freed before the next sample's is computed.
            del noisy, found
        if first is None:
            assert second is not None
            return second
        return first if second is None else second.addcmul_(first, first, value=-1)


def integration_steps(method: str, n_steps: int) -> list[tuple[float, float]]:
    """Positions from 0 to 1 on the path and their weights, as in ``captum.attr`` for its method names.

    The trapezoid's ``n_steps`` positions are 1 / (n_steps - 1) apart and weigh 1 / n_steps, half of that at
    the ends; with few steps the weights' sum is well below 1.

    Raises
    ------
    ValueError
        For an unknown method, or too few steps.
    """
    if method not in INTEGRATION_METHODS:
        raise ValueError(f"method={method!r}: allowed are {', '.join(INTEGRATION_METHODS)}")
    fewest = 1 if method == "gausslegendre" else 2
    if n_steps < fewest:
        raise ValueError(f"n_steps={n_steps}: allowed are {fewest} and more with {method}")
    if method == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(n_steps)
        return [(float(node + 1) / 2, float(weight) / 2) for node, weight in zip(nodes, weights, strict=True)]
    step = 1 / n_steps
    first, last = {
        "riemann_left": (0.0, 1 - step),
        "riemann_middle": (step / 2, 1 - step / 2),
        "riemann_right": (step, 1.0),
        "riemann_trapezoid": (0.0, 1.0),
    }[method]
    heights = np.full(n_steps, step)
    if method == "riemann_trapezoid":
        heights[[0, -1]] /= 2
    positions = np.linspace(first, last, n_steps)
    return [(float(position), float(weight)) for position, weight in zip(positions, heights, strict=True)]


def _as_baseline(baselines: float | Tensor | None, image: Tensor) -> float | Tensor:
    if not isinstance(baselines, Tensor):
        return 0.0 if baselines is None else baselines
    try:
        return baselines.to(image).expand_as(image)
    except RuntimeError as error:
        raise ValueError(
            f"baselines has shape {tuple(baselines.shape)}: allowed are those that broadcast to the image's "
            f"{tuple(image.shape)}"
        ) from error


def _noise_like(image: Tensor, seed: int) -> Tensor:
    draw = torch.Generator(image.device).manual_seed(seed)
    return torch.randn(image.shape, generator=draw, dtype=image.dtype, device=image.device)
