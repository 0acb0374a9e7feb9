"""Traceable forward passes for batch norms whose own cannot be traced, in the thread that captures.

With ``momentum=None`` a norm reads its counter's value, and a synchronised norm communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from streamcnn.capture.capture import CUMULATIVE
from streamcnn.capture.replacing import replaced_here
from streamcnn.graph.ops.shared_statistics import normalised_together
from streamcnn.support.processes import Group, all_processes


@contextmanager
def traceable_batch_norms(module: nn.Module) -> Iterator[None]:
    """Let batch norms of ``module`` be traced whatever their momentum and statistics are."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    everyone = all_processes()
    with ExitStack() as replaced:
        if any(norm.momentum is None for norm in norms):
            replaced.enter_context(replaced_here(_BatchNorm, "forward", _normalise, lasting=True))
        if any(isinstance(norm, nn.SyncBatchNorm) for norm in norms):
            replaced.enter_context(
                replaced_here(nn.SyncBatchNorm, "forward", _together(everyone), lasting=True)
            )
        yield


@lru_cache(8)
def _together(everyone: Group | None) -> Callable[[Any, Tensor], Tensor]:
    """``SyncBatchNorm.forward`` whose default process group is ``everyone``."""

    def forward(self: Any, input: Tensor) -> Tensor:
        return _normalise_together(self, input, everyone)

    return forward


def _normalise_together(self: Any, input: Tensor, everyone: Group | None) -> Tensor:
    """``SyncBatchNorm.forward``, on any device."""
    self._check_input_dim(input)
    self._check_non_zero_input_channels(input)
    # For a group that this process is not in, ``torch.distributed`` gives a number.
    if everyone is None or isinstance(self.process_group, int):
        return _normalise(self, input)
    group, size = everyone
    if self.process_group:
        group, size = self.process_group.group_name, self.process_group.size()
    if not self.training or size == 1:
        return _normalise(self, input)
    return normalised_together(self, input, group)


def _normalise(self: Any, input: Tensor) -> Tensor:
    """``_BatchNorm.forward`` with :data:`CUMULATIVE` as the factor where the original reads the counter."""
    self._check_input_dim(input)
    factor = 0.0 if self.momentum is None else self.momentum
    if self.training and self.track_running_stats and self.num_batches_tracked is not None:
        self.num_batches_tracked.add_(1)
        factor = CUMULATIVE if self.momentum is None else factor
    own_statistics = self.training or (self.running_mean is None and self.running_var is None)
    tracked = not self.training or self.track_running_stats
    mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
    return F.batch_norm(input, mean, var, self.weight, self.bias, own_statistics, factor, self.eps)
