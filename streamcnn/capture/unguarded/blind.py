"""Replacements for PyTorch functions that check values of tensors, for tensors without values."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils import _pytree as pytree

from streamcnn.capture.replacing import replaced_here
from streamcnn.capture.unguarded.whole_calls import called_whole

_GAUSSIAN_NLL_LOSS = F.gaussian_nll_loss
_ASKED = "check_min_max_valid"
_NO_REDUCTION = 0
"""As ``torch.ctc_loss`` has it."""


def gaussian_nll_loss(input: Tensor, target: Tensor, var: Tensor | float, *args: Any, **kwargs: Any) -> Any:
    """``F.gaussian_nll_loss``, with its check for negative variances made when the pass runs."""
    if not isinstance(var, Tensor) or torch._C._is_torch_function_mode_enabled():
        return _GAUSSIAN_NLL_LOSS(input, target, var, *args, **kwargs)
    torch._assert_async(~torch.any(var < 0), "var has negative entry/entries")
    with replaced_here(torch, "any", lambda is_negative: False):
        return _GAUSSIAN_NLL_LOSS(input, target, var, *args, **kwargs)


def cov(
    input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None
) -> Tensor:
    """``torch.cov`` without its check that the divisor is positive, which reads a value.

    Calls with weights of observations go to ``torch.cov`` itself.
    """
    if fweights is not None or aweights is not None or input.dim() > 2:
        return torch.cov(input, correction=correction, fweights=fweights, aweights=aweights)
    rows = input if input.dim() == 2 else input.view(1, -1)
    count = rows.shape[1]
    if count <= correction:
        return torch.cov(input, correction=correction)
    rows = rows - (rows.sum(1) / count).unsqueeze(1)
    return (torch.mm(rows, rows.t().conj()) / (count - correction)).squeeze()


def corrcoef(input: Tensor) -> Tensor:
    """``torch.corrcoef``, computed from :func:`cov`."""
    found = cov(input)
    if found.dim() == 0:
        return found / found
    variances = found.diag()
    deviations = (variances.real if found.is_complex() else variances).sqrt()
    found = found / deviations.view(-1, 1) / deviations.view(1, -1)
    if found.is_complex():
        return torch.complex(found.real.clip(-1, 1), found.imag.clip(-1, 1))
    return found.clip(-1, 1)


def observers_blind(forget: Callable[[Exception], None]) -> AbstractContextManager[Any]:
    """Let quantisation observers assume, for the block, that they have observed values.

    They check this before they compute with the values, and it is true if the values depend on the image.
    ``forget`` is called with the error of a check that needs values.
    """
    # PyTorch will remove this module.
    observer = sys.modules.get("torch.ao.quantization.observer")
    if not hasattr(observer, _ASKED):
        return nullcontext()
    asked = getattr(observer, _ASKED)

    def check(least: Tensor, largest: Tensor) -> bool:
        try:
            return bool(asked(least, largest))
        except DataDependentOutputException as error:
            forget(error)
            torch._assert_async((least <= largest).all(), "an observer's min is not less than its max")
            return True

    return replaced_here(observer, _ASKED, check)


def _tensor(function: Callable[..., Tensor], data: Any, **kwargs: Any) -> Tensor:
    """``torch.tensor`` or ``torch.as_tensor``, which take the values of tensors in a list one by one."""
    if not isinstance(data, Tensor) and any(isinstance(each, Tensor) for each in pytree.tree_leaves(data)):
        joined: Tensor = torch._refs.tensor(data, **kwargs)  # type: ignore[no-untyped-call]
        return joined
    return function(data, **kwargs)


def _new_tensor(like: Tensor, data: Any, **kwargs: Any) -> Tensor:
    return _tensor(like.new_tensor, data, **{"dtype": like.dtype, "device": like.device, **kwargs})


def _ctc_loss(function: Callable[..., Tensor], log_probs: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A CTC loss, recorded as one call, since its computation depends on lengths that only the pass knows."""
    given = inspect.signature(F.ctc_loss).bind(log_probs, *args, **kwargs).arguments
    # By PyTorch's signature torch.ctc_loss takes the mean; in fact it does not reduce.
    reduction = given.get("reduction", "none" if function is torch.ctc_loss else "mean")
    shape = log_probs.shape[1:-1] if reduction in ("none", _NO_REDUCTION) else ()
    casts = torch.is_autocast_enabled(log_probs.device.type)
    like = log_probs.new_empty(shape, dtype=torch.float32 if casts else log_probs.dtype)
    return called_whole("ctc_loss", function, (log_probs, *args), kwargs, like)


BLIND: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {
        torch.cov: cov,
        Tensor.cov: cov,
        torch.corrcoef: corrcoef,
        Tensor.corrcoef: corrcoef,
        torch.tensor: partial(_tensor, torch.tensor),
        torch.as_tensor: partial(_tensor, torch.as_tensor),
        Tensor.new_tensor: _new_tensor,
        torch.ctc_loss: partial(_ctc_loss, torch.ctc_loss),
        F.ctc_loss: partial(_ctc_loss, F.ctc_loss),
    }
)
"""Replacements by the function that a ``TorchFunctionMode`` sees."""
