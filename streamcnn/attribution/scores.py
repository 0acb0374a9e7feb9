"""The score to explain: one entry of the model's result for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamcnn.errors import UnsupportedModel

Target = int | tuple[int, ...] | Sequence[int] | Tensor | None
"""The entry to explain, as in captum: a class for all images; a list or a tensor (N,) of classes, one for
each image; a tuple for an index (class, row, column, …) into further axes; None if there is one number an
image."""


def selected(output: Tensor, target: Target) -> Tensor:
    """The scores (N,) that ``target`` selects from ``output`` (N, …); see :func:`require_target`."""
    if target is None:
        return output.reshape(len(output))
    if isinstance(target, (list, Tensor)):
        classes = torch.as_tensor(target, device=output.device).reshape(-1).long().expand(len(output))
        return output.gather(1, classes[:, None])[:, 0]
    place = target if isinstance(target, tuple) else (target,)
    return output[(slice(None), *place)]


def require_target(output: Any, target: Target) -> None:
    """Make sure that a model's result, which may be a fake tensor, has the entry that ``target`` selects.

    Raises
    ------
    UnsupportedModel
        If the model does not return a single tensor (N, …).
    ValueError
        If there is no such entry; the text says what is allowed.
    """
    if not isinstance(output, Tensor) or output.dim() == 0:
        what = "a number" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise UnsupportedModel(
            f"the model returns {what}: allowed is one tensor (N, classes); wrap the model in a module that "
            "returns its scores"
        )
    num_images, *extents = output.shape
    described = f"the model returns a tensor of shape {tuple(output.shape)}"
    if target is None:
        if output.numel() != num_images:
            raise ValueError(f"target=None: {described}: give the class to explain")
        return
    if isinstance(target, (list, Tensor)):
        places = [(int(each),) for each in torch.as_tensor(target).reshape(-1)]
        if len(places) not in (1, num_images):
            raise ValueError(
                f"target has {len(places)} classes: allowed is one for each of {num_images} images"
            )
    else:
        places = [target if isinstance(target, tuple) else (target,)]  # type: ignore[list-item]
    for place in places:
        if len(place) != len(extents):
            raise ValueError(f"target={target}: {described}: allowed are {len(extents)} indices")
        for index, extent in zip(place, extents, strict=True):
            if not 0 <= index < extent:
                raise ValueError(f"target={target}: {described}: allowed are 0 to {extent - 1}")
