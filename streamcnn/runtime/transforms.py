"""Refuse, by name, what a streamed pass does not support.

These are forward-mode differentiation, transforms of ``torch.func``, batches of gradients of the outputs, and
traces of ``torch.jit``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from streamcnn.errors import UnsupportedModel


def refuse_transforms() -> None:
    """Check that the call is not inside a transform of ``torch.func`` or a trace.

    Raises
    ------
    UnsupportedModel
        If it is.
    """
    _refuse_tracing()
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedModel(
            "the model is called inside of a transform of torch.func, such as grad, vjp, jvp, jacrev or "
            "vmap: call it outside of them; gradients are those of backward() and torch.autograd.grad(), and "
            "several images go in as a batch"
        )


def _refuse_tracing() -> None:
    if torch._C._get_tracing_state() is not None:
        raise UnsupportedModel(
            "the model is called inside of torch.jit.trace() or of an export that traces: give these the "
            "module itself, which is model.net"
        )


def refuse_tangents(image: object, states: Mapping[str, Tensor]) -> None:
    """Check that no input of a pass has a tangent, as in forward-mode differentiation.

    Raises
    ------
    UnsupportedModel
        If an input has one, naming the input.
    """
    if forward_ad._current_level < 0:
        return
    for name, value in (("the image", image), *((f"'{key}'", state) for key, state in states.items())):
        if isinstance(value, Tensor) and _tangent(value) is not None:
            raise UnsupportedModel(
                f"{name} has a tangent (torch.autograd.forward_ad), and a streamed pass is differentiated "
                "backwards only: use backward() or torch.autograd.grad()"
            )


def _tangent(value: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
    return tangent


def refuse_many_gradients(gradients: Iterable[Tensor | None]) -> None:
    """Check that gradients of outputs are not batches of gradients.

    Raises
    ------
    UnsupportedModel
        If they are.
    """
    if any(each is not None and torch._C._functorch.is_legacy_batchedtensor(each) for each in gradients):
        raise UnsupportedModel(
            "a streamed pass is differentiated for one gradient of its outputs at a time: call "
            "torch.autograd.grad() without is_grads_batched=True, and jacobian() without vectorize=True"
        )
