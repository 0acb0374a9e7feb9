"""Class activation maps of any layer, Grad-CAM and Grad-CAM++; Grad-CAM without storing a gradient map.

A map takes one streamed forward and backward pass for the weights of the layer's channels, backward only from
the score to the layer, and one more forward pass that ends at the layer and returns only the map. The mean
gradient at a layer's output is the gradient with respect to an offset (N, C) that is added to the output,
divided by the number of its positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from streamcnn.attribution.scores import Target, require_target, selected
from streamcnn.attribution.streamed import as_arguments, streamed_like, without_gradients
from streamcnn.attribution.survey import name_of, survey
from streamcnn.capture.forward_pass import stand_in
from streamcnn.data.reader import BatchReader, Image
from streamcnn.runtime.streaming_model import StreamingModel

_EPSILON = 1e-6
"""Keeps Grad-CAM++ from dividing by zero; pytorch-grad-cam's value."""


class LayerMethod(ABC):
    """A class activation map: the sum of a layer's channels, weighted by their effect on a score.

    The output is taken as the layer returns it, even if it is overwritten later. The model is used in its
    present mode, which should be ``eval``; parameters get no gradients.

    Parameters
    ----------
    model
        A classifier, whose budget applies.
    layer
        A submodule of the model, or its name. It has to be called once and return a map (N, C, h, w).
    """

    def __init__(self, model: StreamingModel, layer: nn.Module | str) -> None:
        self.model = model
        self.layer = name_of(model.net, layer)

    @final
    def _map(self, inputs: Image, target: Target, additional: Any, *, relu: bool) -> Tensor:
        args = as_arguments(additional)
        if isinstance(inputs, Tensor):
            inputs = inputs.detach()  # no gradient of it is wanted
        reader = BatchReader(inputs, self.model.computing_device(), self.model.preprocess)
        found = survey(self.model.net, reader.shape, reader.dtype, args)
        require_target(found.output, target)
        call = _Call(self.model, inputs, args, found.map_shape(self.layer), reader.dtype, reader.device)
        with without_gradients(self.model.net):
            with torch.enable_grad():
                weights = self._weights(call, target)
            with torch.no_grad():
                summed: Tensor = call.run(_WeightedSum(self.model.net, self.layer, relu=relu), weights)
        return summed

    @abstractmethod
    def _weights(self, call: _Call, target: Target) -> Tensor:
        """The weights (N, C) of the channels of the layer's output."""


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments for the passes of one map."""

    model: StreamingModel
    inputs: Image
    further: tuple[Any, ...]
    shape: tuple[int, int, int, int]
    """(N, C, h, w) of the layer's output."""
    dtype: torch.dtype
    device: torch.device

    def run(self, net: _Hooked, given: Tensor) -> Any:
        """What ``net`` returns for the image and ``given``, streamed as the model is."""
        model = self.model
        streamed = streamed_like(model, net, budget=model.budget, preprocess=model.preprocess)
        with net.hooked():
            return streamed(self.inputs, given, *self.further)


class LayerGradCam(LayerMethod):
    """Grad-CAM (Selvaraju et al. 2017), as ``captum.attr.LayerGradCam`` defines it."""

    def attribute(
        self,
        inputs: Image,
        target: Target = None,
        additional_forward_args: Any = None,
        relu_attributions: bool = False,
    ) -> Tensor:
        """``sum_c weight_c * output_c`` (N, 1, h, w), where a weight is the channel's mean gradient.

        Parameters
        ----------
        inputs
            A tensor (N, C, H, W), a source, or a list of sources.
        target
            The class to explain; see :data:`Target`.
        additional_forward_args
            Further arguments of the module after the image: one argument, or a tuple.
        relu_attributions
            Whether to set negative values to zero, as the paper does.

        Raises
        ------
        PlanDoesNotFit
            If no plan stays within the budget.
        UnsupportedModel, CorruptImage, ValueError
            For models, images, layers and targets that cannot be used.
        """
        return self._map(inputs, target, additional_forward_args, relu=relu_attributions)

    def _weights(self, call: _Call, target: Target) -> Tensor:
        num_images, channels, height, width = call.shape
        offset = torch.zeros(num_images, channels, dtype=call.dtype, device=call.device).requires_grad_()
        output = call.run(_Shifted(self.model.net, self.layer), offset)
        (gradient,) = torch.autograd.grad(selected(output, target).sum(), offset)
        return gradient / (height * width)


class LayerGradCamPlusPlus(LayerMethod):
    """Grad-CAM++ (Chattopadhyay et al. 2018), as ``pytorch_grad_cam.GradCAMPlusPlus`` defines it.

    The whole gradient of the layer's output is held in memory.
    """

    def attribute(self, inputs: Image, target: Target = None, additional_forward_args: Any = None) -> Tensor:
        """``relu(sum_c weight_c * output_c)`` (N, 1, h, w), neither scaled to 0..1 nor to the image's size.

        Arguments and errors are those of :meth:`LayerGradCam.attribute`.
        """
        return self._map(inputs, target, additional_forward_args, relu=True)

    def _weights(self, call: _Call, target: Target) -> Tensor:
        offset = stand_in(call.shape, call.dtype, call.device, requires_grad=True)
        output, sums = call.run(_Shifted(self.model.net, self.layer, with_sums=True), offset)
        (gradient,) = torch.autograd.grad(selected(output, target).sum(), offset)
        # By channel, since terms are as large as the gradient.
        return torch.stack([_summed_terms(gradient[:, c], sums[:, c]) for c in range(call.shape[1])], 1)


def _summed_terms(gradient: Tensor, summed: Tensor) -> Tensor:
    """The weight (N,) of one channel: the sum of the positive gradient (N, h, w) times the paper's alpha."""
    square = gradient**2
    alpha = square / (2 * square + summed[:, None, None] * square * gradient + _EPSILON)
    return (gradient.relu() * alpha).sum((1, 2))


class _Hooked(nn.Module):
    """A model with a hook on the output of one of its layers, inside a block of :meth:`hooked`.

    The hook is set before a forward pass begins, so that the pass can be captured with guards.
    """

    def __init__(self, net: nn.Module, layer: str) -> None:
        super().__init__()
        self.net = net
        self.layer = layer

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Let the layer call :meth:`hook`, for the block."""
        handle = self.net.get_submodule(self.layer).register_forward_hook(self.hook)
        try:
            yield
        finally:
            handle.remove()

    def hook(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """The value that the layer returns instead of ``output``; None keeps ``output``."""
        raise NotImplementedError


class _Shifted(_Hooked):
    """Adds an offset, (N, C) or (N, C, h, w), to the layer's output."""

    def __init__(self, net: nn.Module, layer: str, *, with_sums: bool = False) -> None:
        super().__init__(net, layer)
        self.with_sums = with_sums
        self.offset: Tensor | None = None
        self.sums: Tensor | None = None

    def forward(self, image: Tensor, offset: Tensor, *args: Any) -> Any:
        """The model's result, and if wanted the sums (N, C) of the layer's output over its positions."""
        self.offset = offset[:, :, None, None] if offset.dim() == 2 else offset
        result = self.net(image, *args)
        sums, self.offset, self.sums = self.sums, None, None
        return (result, sums) if self.with_sums else result

    def hook(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """Add the offset to the output, after summing it."""
        if self.with_sums:
            self.sums = output.sum((2, 3))
        assert self.offset is not None
        return output + self.offset


class _WeightedSum(_Hooked):
    """Returns only the layer's output, its channels weighted and summed."""

    def __init__(self, net: nn.Module, layer: str, *, relu: bool) -> None:
        super().__init__(net, layer)
        self.relu = relu
        self.kept: Tensor | None = None

    def forward(self, image: Tensor, weights: Tensor, *args: Any) -> Tensor:
        """The map (N, 1, h, w), given weights (N, C)."""
        self.net(image, *args)
        kept, self.kept = self.kept, None
        assert kept is not None
        summed = (weights[:, :, None, None] * kept).sum(1, keepdim=True)
        return summed.relu() if self.relu else summed

    def hook(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """Keep a copy, as the next layer may overwrite the output."""
        self.kept = output.clone()
        return None
