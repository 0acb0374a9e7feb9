"""Attribution: which parts of an image a score depends on, at full resolution and within a budget."""

from streamcnn.attribution.grad_cam import LayerGradCam, LayerGradCamPlusPlus
from streamcnn.attribution.gradient_methods import (
    InputXGradient,
    IntegratedGradients,
    NoiseTunnel,
    Saliency,
)

__all__ = [
    "InputXGradient",
    "IntegratedGradients",
    "LayerGradCam",
    "LayerGradCamPlusPlus",
    "NoiseTunnel",
    "Saliency",
]
