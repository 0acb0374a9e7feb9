"""Pooling by a window that is as long as the map: a reduction, not one tile with a halo of the whole map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operator_cases import SHAPE, TILE, after_convolution, assert_streams, by_name
from torch import Tensor

from streamcnn import StreamingModel

POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of all": lambda x: F.avg_pool2d(x, x.shape[2:]).flatten(1),
    "a gate": lambda x: x * F.avg_pool2d(x, kernel_size=x.shape[2:], stride=x.shape[2:]).sigmoid(),
    "means of columns": lambda x: x * F.avg_pool2d(x, (x.shape[2], 1), stride=1),
    "means of rows": lambda x: x * F.avg_pool2d(x, (1, x.shape[3]), (1, x.shape[3])),
    "maximum": lambda x: F.max_pool2d(x, x.shape[2:]).flatten(1) * x.mean((2, 3)),
    "maximum and its index": lambda x: x * sum(F.max_pool2d(x, x.shape[2:], return_indices=True)),
    "of one image": lambda x: F.avg_pool2d(x[0], x.shape[2:]) * x,
}


@by_name(POOLED)
def test_it_streams(case: Callable[[Tensor], Tensor]) -> None:
    assert_streams(case)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "padded": lambda x: F.avg_pool2d(x, x.shape[2:], padding=2),
    "divided by a number": lambda x: F.avg_pool2d(x, x.shape[2:], divisor_override=7),
    "a long window": lambda x: F.avg_pool2d(x, (x.shape[2], 3), stride=1),
    "strided along the other axis": lambda x: F.avg_pool2d(x, (x.shape[2], 1), stride=2),
    "maxima of columns": lambda x: F.max_pool2d(x, (x.shape[2], 1), stride=1),
}


@by_name(OTHERS)
def test_other_windows_are_as_before(case: Callable[[Tensor], Tensor]) -> None:
    assert_streams(case, resident=None, one_tile=True)


@pytest.mark.parametrize("name", ["mean of all", "a gate", "means of columns", "maximum"])
def test_no_tile_has_the_map_as_its_halo(name: str) -> None:
    model = StreamingModel(after_convolution(POOLED[name]), tile=TILE)
    model.resident_tail = False
    halos = [phase.halo for phase in model.plan((1, 3, 200, 160)).phases]
    assert max(max(halo) for halo in halos) <= 4, halos


def test_whole_numbers_are_left_to_aten() -> None:
    def counted(x: Tensor) -> Tensor:
        return x * F.avg_pool2d((x * 8).long(), x.shape[2:]).to(x)

    assert_streams(counted, SHAPE, resident=None, one_tile=True)
    assert torch.equal(F.avg_pool2d(torch.full((1, 1, 2, 2), 3), 2), torch.full((1, 1, 1, 1), 3))
