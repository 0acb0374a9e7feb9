"""Sparse tensors in a forward pass: in buffers, made of numbers or of weights, and of maps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_streamed_equals_plain
from torch import Tensor, nn

Body = Callable[["Net", Tensor], Tensor]

# Beta, as PyTorch says of the compressed kind.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support:UserWarning", "ignore:Sparse invariant checks:UserWarning"
)


class Net(nn.Module):
    """A graph convolution of the features that a map is pooled to, or something else with sparse tensors."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.tensor([0.3, -1.2, 0.7]))
        self.register_buffer("places", torch.tensor([[0, 1, 2], [1, 0, 3]]))
        self.coo = torch.eye(4).to_sparse() * 2
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.conv(x)))


def _in_a_buffer(net: Net, y: Tensor) -> Tensor:
    return torch.sparse.mm(net.coo.to(y.dtype), y.mean((2, 3)).t()).t()


def _compressed(net: Net, y: Tensor) -> Tensor:
    made = (torch.eye(4, dtype=y.dtype) * 3).to_sparse_csr()
    return (made @ y.mean((2, 3)).t()).t()


def _made_of_weights(net: Net, y: Tensor) -> Tensor:
    made = torch.sparse_coo_tensor(net.places, net.weight, (4, 4))
    return torch.sparse.mm(made, y.mean((2, 3)).t()).t()


def _made_of_a_map(net: Net, y: Tensor) -> Tensor:
    return (y + y.relu().to_sparse().to_dense()).mean((2, 3))


@pytest.mark.parametrize("body", [_in_a_buffer, _compressed, _made_of_weights, _made_of_a_map])
def test_sparse_tensors(body: Body) -> None:
    torch.manual_seed(0)
    assert_streamed_equals_plain(Net(body), (2, 3, 29, 37), tile=16, resident=None)
