"""What a module would return, by shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree as pytree

from streamcnn.capture.refusals import of_channels
from streamcnn.errors import UnsupportedModel


def fake_result(
    net: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    args: Iterable[Any] = (),
    *,
    prepare: Callable[[nn.Module], None] = lambda bare: None,
) -> Any:
    """What ``net`` returns for an image of ``shape`` (N, C, H, W), of tensors without values.

    It neither runs nor changes the module: a copy without values and without the caller's hooks is called.

    Parameters
    ----------
    args
        What else goes into the module after the image.
    prepare
        Called with the copy before it is.

    Raises
    ------
    UnsupportedModel
        If the model fails for such an image.
    """
    mode = FakeTensorMode()
    device = next((state.device for state in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    with FakeCopyMode(mode):
        bare: nn.Module = copy.deepcopy(net)
    for module in bare.modules():
        # The caller's own may keep what they see, which has no values here.
        module._forward_hooks.clear()
    prepare(bare)
    further = pytree.tree_map_only(Tensor, mode.from_tensor, tuple(args))
    with mode:
        image = torch.empty(shape, dtype=dtype, device=device)
    try:
        with mode, torch.no_grad():
            return bare(image, *further)
    except Exception as error:  # whatever the user's code raises
        reason = of_channels(bare, image, error) or str(error).partition("\n")[0]
        raise UnsupportedModel(f"the model fails for an image of shape {tuple(shape)}: {reason}") from error
