"""A user's ``autograd.Function`` carried out by the bodies in which Dynamo has recorded it.

PyTorch's own operator for that makes a class for each call. Classes are part of reference cycles, so what a
call has saved would stay in memory until Python looks for such cycles: of one tile after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter


class RecordedFunction(torch.autograd.Function):
    """The forward body makes results and saved values of the operands; the backward body their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        bodies: tuple[GraphModule, GraphModule],
        non_differentiable: Sequence[int],
        *operands: Tensor,
    ) -> Any:
        """The results, as the forward body returns them."""
        results, saved = Interpreter(bodies[0]).run(*operands)
        outputs = results if isinstance(results, tuple) else (results,)
        ctx.mark_non_differentiable(*(outputs[index] for index in non_differentiable))
        # An attribute that holds a result would keep it alive, as the result holds what made it.
        is_known = [any(value is other for other in (*operands, *outputs)) for value in saved]
        ctx.save_for_backward(*(value for value, known in zip(saved, is_known, strict=True) if known))
        ctx.others = [None if known else value for value, known in zip(saved, is_known, strict=True)]
        ctx.is_known, ctx.body = is_known, bodies[1]
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradients of the operands."""
        known = iter(ctx.saved_tensors)
        saved = [
            next(known) if is_known else value
            for is_known, value in zip(ctx.is_known, ctx.others, strict=True)
        ]
        return None, None, *Interpreter(ctx.body).run(*gradients, *saved)
