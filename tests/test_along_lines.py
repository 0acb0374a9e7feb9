"""Operators along rows or columns of a map: sums so far, sorting, differences, recurrent layers."""

from __future__ import annotations

import torch
from operator_cases import SHAPE, TILE, WIDTH, Function, after_convolution, assert_streams, by_name
from torch import Tensor, nn
from torch.nn import functional as F

from streamcnn import StreamingModel

HIDDEN = 5


def weighed(x: Tensor) -> Tensor:
    """With another weight for each entry of the last axis."""
    return x * torch.linspace(1, 2, x.shape[-1]).to(x)


SCANS: dict[str, Function] = {
    "sums down columns": lambda x: x.cumsum(2),
    "sums from the right": lambda x: x.flip(3).cumsum(3).flip(3).sin(),
    "sums of an integral image": lambda x: F.avg_pool2d(x.cumsum(3), 3).cumsum(2).sin(),
    "sums of single rows as images": lambda x: x.permute(0, 2, 3, 1).flatten(0, 1).cumsum(1).sin(),
    "products and maxima": lambda x: x.cumprod(2) + x.logcumsumexp(3) * x.cummax(3)[0] - x.cummin(2)[0],
    "sorted": lambda x: weighed(x.sort(3)[0]) + x.sort(stable=True, dim=2, descending=True)[0].relu(),
    "places in order": lambda x: x * x.argsort(3) + x.sort(2)[1],
    "differences": lambda x: x.diff(dim=2).square()[..., 2:] + x.diff(dim=3, n=2).sin()[:, :, 1:],
    "four largest of each column": lambda x: weighed(x.topk(4, 2)[0].sin()) * x.topk(4, 2)[1],
    "four largest of each row, as images": lambda x: (
        x.topk(4)[0].sin().permute(0, 2, 3, 1).flatten(0, 1).sum(1)
    ),
    "medians": lambda x: weighed(x.median(2)[0])[:, :, None] + x.nanmedian(3, keepdim=True)[0].sin(),
    "third smallest": lambda x: weighed(x.kthvalue(3, 2)[0]) * x.kthvalue(3, 2)[1],
    "products of columns": lambda x: weighed(x.prod(2)) * x.round().mode(2)[0],
    "largest of truth values": lambda x: x.mean() * weighed((x > 1).max(2)[0].to(x)).sin(),
    "largest of whole numbers": lambda x: x.mean() * weighed((100 * x).long().max(2)[0].to(x)).sin(),
    "largest of channels last": lambda x: x.permute(0, 2, 3, 1).max(2)[0].sin() * x.movedim(1, 3).argmin(2),
}


@by_name(SCANS)
def test_operator_along_lines(case: Function) -> None:
    assert_streams(case, resident=False)
    assert_streams(case, (1, 3, 14, 22), tile=(40, 5), one_tile=True, resident=False)
    assert_streams(case, (1, 3, 14, 22), tile=(5, 40), one_tile=True, resident=False)


class Rows(nn.Module):
    """Each row is a sequence, as in ReNet and in vision LSTMs."""

    def __init__(self, layer: type[nn.RNNBase] = nn.LSTM, **options: object) -> None:
        super().__init__()
        self.layer = layer(WIDTH, HIDDEN, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.layer(x.permute(0, 2, 3, 1).reshape(n * h, w, c))[0]
        return y.reshape(n, h, w, -1).permute(0, 3, 1, 2)


class Columns(nn.Module):
    """With the time first, and first states that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(WIDTH, HIDDEN)
        self.first = nn.Parameter(torch.randn(1, 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        columns = x.permute(2, 0, 3, 1).reshape(h, n * w, c)
        y = self.layer(columns, self.first.repeat(1, n * w, 1))[0]
        return y.reshape(h, n, w, -1).permute(1, 3, 0, 2)


class LastStates(nn.Module):
    """With what each column ends with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y, (hidden, cell) = self.layer(x.permute(0, 3, 2, 1).reshape(n * w, h, c))
        ends = hidden[0].reshape(n, w, 1, HIDDEN).sin() + cell[1].reshape(n, w, 1, HIDDEN)
        return (y.reshape(n, w, h, HIDDEN) * ends).permute(0, 3, 2, 1)


class Times(nn.Module):
    """A short sequence at each position, as of images of one place at several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(2, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y, last = self.layer(x.reshape(n, WIDTH // 2, 2, h, w).permute(0, 3, 4, 1, 2).reshape(-1, 3, 2))
        return y.reshape(n, h, w, -1)[..., -HIDDEN:] + last[-1].reshape(n, h, w, HIDDEN).sin()


RECURRENT = {
    "LSTM of rows": Rows,
    "LSTM of rows, both ways": lambda: Rows(bidirectional=True, num_layers=2),
    "RNN without biases": lambda: Rows(nn.RNN, bias=False),
    "GRU of columns, with first states": Columns,
    "last states": LastStates,
    "sequences of positions": Times,
}


@by_name(RECURRENT)
def test_recurrent_layer(case: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert_streams(case(), resident=False)
    assert_streams(case(), (1, 3, 14, 22), tile=(40, 5), one_tile=True, resident=False)


class Sequence(nn.Module):
    """All positions are one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(WIDTH, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).mT)[0]


RESIDENT = {
    "all positions as one sequence": (Sequence, "it works along merged axes of space"),
    "sums of several axes": (
        lambda: lambda x: x.nansum((1, 2)),
        "it runs along axes of space and others at once",
    ),
    "the largest of everything": (
        lambda: lambda x: x.mean((2, 3)) * x.argmax(),
        "it runs along axes of space and others at once",
    ),
}


def residents(operator: Function | nn.Module) -> str:
    """Which operator runs on whole maps, and why."""
    (found,) = StreamingModel(after_convolution(operator), tile=TILE).plan(SHAPE).residents
    return found


@by_name(RESIDENT)
def test_what_runs_on_whole_maps(case: tuple[type[nn.Module], str]) -> None:
    build, reason = case
    assert_streams(build(), resident=True)
    assert reason in residents(build())


def test_dropout_between_layers_runs_on_whole_maps() -> None:
    assert "it has dropout between its layers" in residents(Rows(num_layers=2, dropout=0.5))
