"""Gradients of a score with respect to the image, streamed.

The image, its gradient and a method's sums are tensors of the image's size in memory, for which the budget
needs room. Passes are planned within the rest of the budget.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamcnn.attribution.scores import Target, require_target, selected
from streamcnn.attribution.streamed import as_arguments, streamed_like, without_gradients
from streamcnn.attribution.survey import survey
from streamcnn.data.reader import BatchReader, Image
from streamcnn.errors import PlanDoesNotFit
from streamcnn.geometry.regions import Region
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.support.units import format_bytes, plural


class ImageGradients:
    """An image as the model gets it, with a function for gradients of the scores of images like it.

    Parameters
    ----------
    model
        The model, whose budget, tile and ``preprocess`` apply.
    inputs
        The image: a tensor (N, C, H, W), a source, or a list of sources.
    target, additional
        The score to explain, and further arguments of the module after the image.
    num_copies
        Number of tensors of the image's size, besides the image, that the method holds during a gradient.

    Raises
    ------
    PlanDoesNotFit
        If the budget has no room for a pass beside these tensors; raised before the image is read.
    UnsupportedModel, ValueError
        If the model or the target cannot be used.
    """

    def __init__(
        self, model: StreamingModel, inputs: Image, target: Target, additional: Any, *, num_copies: int
    ) -> None:
        self._net, self._target, self._args = model.net, target, as_arguments(additional)
        reader = BatchReader(inputs, model.computing_device(), model.preprocess)
        require_target(survey(model.net, reader.shape, reader.dtype, self._args).output, target)
        nbytes = _nbytes(reader.shape, reader.dtype)
        is_own = not isinstance(inputs, Tensor) or model.preprocess is not None
        held = nbytes * (num_copies + is_own)
        # On a GPU the budget covers everything there, so held tensors count anyway.
        beside = held if reader.device.type == "cpu" else 0
        budget = None if model.budget is None else model.budget - beside
        # A budget of zero also gives a plan, whose error names the budget that works.
        allowed = None if budget is None else max(1, budget)
        self._streamed = streamed_like(model, model.net, budget=allowed, preprocess=None)
        self._require_room(reader, held, beside, model.budget)
        self.image = reader.read(Region.whole(reader.shape[2:]))
        """(N, C, H, W), after ``preprocess``, on the model's device; read-only."""
        reader.settle()
        reader.release()

    def __call__(self, image: Tensor) -> Tensor:
        """The gradient (N, C, H, W), at ``image``, of the sum of all images' scores."""
        image = image.detach().requires_grad_()
        with without_gradients(self._net), torch.enable_grad():
            scores = selected(self._streamed(image, *self._args), self._target)
            (gradient,) = torch.autograd.grad(scores.sum(), image)
        return gradient

    def _require_room(self, reader: BatchReader, held: int, beside: int, budget: int | None) -> None:
        if budget is None:
            return
        with without_gradients(self._net), torch.enable_grad():
            plan = self._streamed.planned(
                reader.shape, reader.dtype, image_gradient=True, inputs=self._args
            ).plan
        if plan.fits:
            return
        needed = plan.projected_bytes + beside
        tensors = plural(held // _nbytes(reader.shape, reader.dtype), "more tensor")
        raise PlanDoesNotFit(
            f"a gradient with respect to an image of shape {tuple(reader.shape)} does not fit in "
            f"{format_bytes(budget)}: it is held in memory, and so are {tensors} of its size "
            f"({format_bytes(held)}). Raise budget= to at least {needed} bytes ({format_bytes(needed)}), or "
            "use Grad-CAM, which holds nothing of the image's size"
        )


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
