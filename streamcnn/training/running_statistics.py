"""Running statistics of batch norms whose images are several processes'.

A pass takes a running value ``r`` to ``a·r + b`` with known ``a``, and so does a sequence of passes. Each
process makes a contiguous part of an update's passes, starting from the common value ``r``; its final value
then gives its ``b``. Composing these functions in order gives the value that one process would have.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from streamcnn.training.processes import Processes


class RunningStatistics:
    """Follows a network's buffers through the passes of one update, which begins when this is created.

    Parameters
    ----------
    net
        The network to train.
    processes
        The processes that make the passes, in order.
    """

    def __init__(self, net: nn.Module, processes: Processes) -> None:
        self._processes = processes
        if processes.count == 1:
            return
        self._norms = _with_own_statistics(net)
        known = {id(buffer) for norm in self._norms for buffer in (*_of(norm), norm.num_batches_tracked)}
        self._others = [buffer for buffer in net.buffers() if id(buffer) not in known]
        self._before = [[each.clone() for each in _of(norm)] for norm in self._norms]
        self._counts = _counts(self._norms)

    def merge(self) -> None:
        """Set each buffer to the value it would have if one process had made all passes.

        Buffers other than batch norms' statistics are set to the first process's values.
        """
        processes = self._processes
        if processes.count == 1:
            return
        ended = zip(_counts(self._norms), self._counts, strict=True)
        stretches = processes.gathered([now - before for now, before in ended])
        summed: list[Tensor] = []
        for at, norm in enumerate(self._norms):
            lengths = [each[at] for each in stretches]
            if any(lengths):
                self._make_terms(at, norm, lengths)
                summed += _of(norm)
        processes.add_up(summed)
        processes.spread(self._others)

    def _make_terms(self, at: int, norm: _BatchNorm, lengths: list[int]) -> None:
        """Turn a norm's values into this process's term of their sum, given all processes' passes."""
        rank, count, total = self._processes.rank, self._counts[at], sum(lengths)
        own, behind = lengths[rank], sum(lengths[rank + 1 :])
        if norm.momentum is None:
            # A cumulative mean: all passes count alike, whatever their order.
            of_own, of_all = count / max(count + own, 1), count / (count + total)
            left = (count + own) / (count + total)
        else:
            of_own, of_all, left = ((1 - norm.momentum) ** passes for passes in (own, total, behind))
        for value, before in zip(_of(norm), self._before[at], strict=True):
            value.sub_(before, alpha=of_own).mul_(left)
            if self._processes.is_first:
                value.add_(before, alpha=of_all)
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.fill_(count + total)


def _with_own_statistics(net: nn.Module) -> list[_BatchNorm]:
    """Batch norms with running statistics that are not synchronised and share no buffer with another norm."""
    found = [
        each
        for each in net.modules()
        if isinstance(each, _BatchNorm)
        and not isinstance(each, nn.SyncBatchNorm)
        and each.running_mean is not None
        and each.num_batches_tracked is not None
    ]
    owners = Counter(id(buffer) for norm in found for buffer in norm.buffers(recurse=False))
    return [norm for norm in found if all(owners[id(each)] == 1 for each in norm.buffers(recurse=False))]


def _of(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A norm's running mean and running variance."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _counts(norms: list[_BatchNorm]) -> list[int]:
    """The number of passes that each norm has seen."""
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    return torch.stack(counters).tolist() if counters else []
