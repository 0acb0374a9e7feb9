"""Gradients of a score with respect to the image, streamed.

The image, its gradient and what a method sums are tensors of the image's size in memory, which the budget
has to have room for: what is planned is a pass within what they leave of it.
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
    """An image as the model sees it, and gradients of the scores of images like it.

    Parameters
    ----------
    model
        Whose budget, tile and ``preprocess`` hold.
    inputs
        The image: a tensor (N, C, H, W), a source, or a list of sources.
    target, additional
        What is explained, and what goes into the module after the image.
    num_copies
        Tensors of the image's size that the method holds while a gradient is computed, besides the image.

    Raises
    ------
    PlanDoesNotFit
        If the budget has no room for a pass beside them; before the image is read.
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
        # A budget on a GPU is for all that is there: what is held counts by itself.
        beside = held if reader.device.type == "cpu" else 0
        budget = None if model.budget is None else model.budget - beside
        # A budget of nothing has a plan too, which says what would do.
        allowed = None if budget is None else max(1, budget)
        self._streamed = streamed_like(model, model.net, budget=allowed, preprocess=None)
        self._require_room(reader, held, beside, model.budget)
        self.image = reader.read(Region.whole(reader.shape[2:]))
        """(N, C, H, W), after ``preprocess``, on the model's device; not to be written to."""
        reader.settle()
        reader.release()

    def __call__(self, image: Tensor) -> Tensor:
        """The gradient of the sum of all images' scores at ``image`` (N, C, H, W); a tensor like it."""
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
