"""The attribution methods, by their names on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streamcnn.attribution.grad_cam import LayerGradCam, LayerGradCamPlusPlus
from streamcnn.attribution.gradient_methods import (
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from streamcnn.attribution.scores import Target
from streamcnn.data.reader import Image
from streamcnn.runtime.streaming_model import StreamingModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for an explanation: model, image, score and options."""

    model: StreamingModel
    image: Image
    target: Target
    further: tuple[Any, ...] = ()
    """Further arguments of the module after the image."""
    layer: str | None = None
    """The layer of a class activation map."""
    samples: int = 10
    """Number of noisy images of SmoothGrad."""
    noise: float = 0.3
    """Standard deviation of the noise, in units of the image as the model gets it."""
    steps: int = 50
    """Number of gradients of integrated gradients."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to explain a score."""

    run: Callable[[Request], Tensor]
    """Computes the attribution (N, C, h, w)."""
    is_signed: bool = False
    """Whether negative values have a meaning."""
    of_layer: bool = False
    """Whether it attributes to a layer's output rather than to the image."""
    options: tuple[str, ...] = ()
    """Names of the request's numbers that it takes."""


def _grad_cam(request: Request) -> Tensor:
    assert request.layer is not None
    method = LayerGradCam(request.model, request.layer)
    return method.attribute(request.image, request.target, request.further, relu_attributions=True)


def _grad_cam_plus_plus(request: Request) -> Tensor:
    assert request.layer is not None
    method = LayerGradCamPlusPlus(request.model, request.layer)
    return method.attribute(request.image, request.target, request.further)


def _gradient(request: Request) -> Tensor:
    method = Saliency(request.model)
    return method.attribute(request.image, request.target, additional_forward_args=request.further)


def _input_x_gradient(request: Request) -> Tensor:
    return InputXGradient(request.model).attribute(request.image, request.target, request.further)


def _smoothgrad(request: Request) -> Tensor:
    return NoiseTunnel(Saliency(request.model)).attribute(
        request.image,
        nt_samples=request.samples,
        stdevs=request.noise,
        target=request.target,
        additional_forward_args=request.further,
    )


def _integrated_gradients(request: Request) -> Tensor:
    return IntegratedGradients(request.model).attribute(
        request.image,
        target=request.target,
        additional_forward_args=request.further,
        n_steps=request.steps,
    )


METHODS = {
    "grad-cam": Method(_grad_cam, of_layer=True),
    "grad-cam++": Method(_grad_cam_plus_plus, of_layer=True),
    "gradient": Method(_gradient),
    "input-x-gradient": Method(_input_x_gradient, is_signed=True),
    "smoothgrad": Method(_smoothgrad, options=("samples", "noise")),
    "integrated-gradients": Method(_integrated_gradients, is_signed=True, options=("steps",)),
}
