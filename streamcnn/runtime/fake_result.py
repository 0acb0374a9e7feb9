"""The result that a module would return, as tensors without values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree as pytree

from streamcnn.capture.capture import RawGraph, device_of
from streamcnn.capture.forward_pass import ForwardPass, stand_in
from streamcnn.capture.lowering.tracing import Trace
from streamcnn.capture.refusals import of_channels
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.fakes import TRACING

_MARK = 9
"""Axes of extent 1 put before a result's own, to tell it from tensors that hooks keep."""


class _OneTensor(nn.Module):
    """A module whose result is marked: the tensor that it returns, or the one under a key in its result."""

    def __init__(self, net: nn.Module, key: str | None) -> None:
        super().__init__()
        self.net = net
        self.key = key

    def forward(self, image: Tensor, args: tuple[Any, ...]) -> Tensor:
        result = self.net(image, *args)
        if self.key is not None:
            result = result.get(self.key) if isinstance(result, Mapping) else None
        # An error would make the model run once more, on tensors that its hooks may keep.
        return result[(None,) * _MARK] if isinstance(result, Tensor) else image


def captured_result(
    net: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    args: Iterable[Any] = (),
    *,
    key: str | None = None,
) -> Tensor | None:
    """The tensor that ``net`` returns for an image of ``shape``, without values, as a pass would capture it.

    Hooks are followed, as parts of the model, and nothing is run. None if there are no hooks, when
    :func:`fake_result` is faster; if the model returns no tensor, or none under ``key``; or if it cannot be
    captured.
    """
    if not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules()):
        return None
    device = device_of(net)
    probe = _OneTensor(net, key)
    # Unlike train(), this leaves the model's parts alone.
    probe.training = net.training

    def take(graph: RawGraph, states: Mapping[str, Tensor]) -> Tensor | None:
        program = Trace(graph, states, dtype, device).program()
        specs = (program.nodes[name].tensor for name in program.output_names)
        marked = [spec for spec in specs if spec.shape[:_MARK] == (1,) * _MARK]
        return torch.empty(marked[0].shape[_MARK:], dtype=marked[0].dtype, device="meta") if marked else None

    try:
        with torch.no_grad():
            return ForwardPass().until_captured(
                probe, stand_in(shape, dtype, device), (tuple(args),), {}, take
            )
    except UnsupportedModel:
        return None


def fake_result(
    net: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    args: Iterable[Any] = (),
    *,
    prepare: Callable[[nn.Module], None] = lambda bare: None,
) -> Any:
    """The result of ``net`` for an image of ``shape`` (N, C, H, W), as tensors without values.

    The module is neither run nor changed. A copy without values and without the caller's hooks is called, so
    hooks that change a result are not followed; :func:`captured_result` follows them.

    Parameters
    ----------
    args
        The module's further arguments after the image.
    prepare
        Called with the copy before it runs.

    Raises
    ------
    UnsupportedModel
        If the model fails for such an image.
    """
    with TRACING:
        mode = FakeTensorMode()
        with FakeCopyMode(mode):
            bare: nn.Module = copy.deepcopy(net)
        for module in bare.modules():
            # The caller's hooks may keep what they see, which has no values here.
            module._forward_hooks.clear()
        prepare(bare)
        further = pytree.tree_map_only(Tensor, mode.from_tensor, tuple(args))
        with mode:
            image = torch.empty(shape, dtype=dtype, device=device_of(net))
        try:
            with mode, torch.no_grad():
                return bare(image, *further)
        except Exception as error:  # whatever the user's code raises
            reason = of_channels(bare, image, error) or str(error).partition("\n")[0]
            raise UnsupportedModel(
                f"the model fails for an image of shape {tuple(shape)}: {reason}"
            ) from error
