"""Norms of one image on whole values, whose gradients ATen's kernels on a CPU misread in some layouts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operator_cases import by_name
from torch import Tensor, nn

from streamcnn import StreamingModel, verify
from streamcnn.graph.ops import whole_norms

WIDTH = 6
Lay = Callable[[Tensor], Tensor]


def as_tokens(x: Tensor) -> Tensor:
    """``x`` with the strides of tokens (N, L, C) that are turned to (N, C, ...)."""
    tokens = x.flatten(2).mT.contiguous()
    return tokens.mT.unflatten(2, x.shape[2:])


def channels_last(x: Tensor) -> Tensor:
    form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.clone(memory_format=form)


def images_last(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS: list[Lay] = [torch.clone, channels_last, as_tokens, images_last]
Norm = Callable[[Tensor], Tensor]


def norm(function: Callable[..., Tensor], *, own: bool) -> Norm:
    """A norm by own or by running statistics, with an affine part."""

    def norm(x: Tensor) -> Tensor:
        values = torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype)
        return function(x, *values.repeat(4, 1).unbind(), own, 0.1, 1e-5, False)

    return norm


NORMS = {
    "batch": norm(whole_norms.batch_norm, own=True),
    "batch, eval": norm(whole_norms.batch_norm, own=False),
    "instance": norm(whole_norms.instance_norm, own=True),
    "instance, eval": norm(whole_norms.instance_norm, own=False),
}


@by_name(NORMS)
@pytest.mark.parametrize("extents", [(9, 7), (3, 9, 7)], ids=str)
@pytest.mark.parametrize("images", [(1, WIDTH), (2, WIDTH), (2, 1)], ids=str)
def test_gradients_do_not_depend_on_layouts(
    case: Norm, extents: tuple[int, ...], images: tuple[int, int]
) -> None:
    x, arriving = torch.randn(2, *images, *extents, dtype=torch.float64)

    def gradient(lay: Lay, lay_arriving: Lay) -> Tensor:
        leaf = lay(x).requires_grad_()
        return torch.autograd.grad(case(leaf), leaf, lay_arriving(arriving))[0]

    expected = gradient(torch.clone, torch.clone)
    for lay in LAYOUTS:
        for lay_arriving in LAYOUTS:
            torch.testing.assert_close(gradient(lay, lay_arriving), expected, rtol=1e-9, atol=1e-12)


class Tokens(nn.Module):
    """A norm, and a linear layer of its tokens, whose gradient arrives in the tokens' layout."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = norm
        self.last = nn.Parameter(torch.randn(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.first(x)).flatten(2).mT.flatten(0, 1)
        return (tokens @ self.last).relu().mean(0)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_a_tail_gives_the_gradients_of_tiles(kind: type[nn.Module], train: bool) -> None:
    net = Tokens(kind(WIDTH)).double().train(train)
    found: list[tuple[Tensor, ...]] = []
    for tile, tail in ((8, False), (None, True)):
        image = torch.randn(1, 3, 21, 17, generator=torch.Generator().manual_seed(0)).double()
        model = StreamingModel(net, tile=tile)
        model.resident_tail = tail
        leaves = (image.requires_grad_(), *net.parameters())
        found.append(torch.autograd.grad(model(image).square().sum(), leaves))
    in_tiles, whole = found
    for each, expected in zip(whole, in_tiles, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-9, atol=1e-9)


def test_verify_compares_with_gradients_that_are_not_misread() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH))
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.maps(x).flatten(2).mT)

    net = Normed()
    found = verify(net, (1, 3, 21, 17), tile=8)
    assert found.max_error < 1e-9
    (note,) = found.notes
    assert "PyTorch's own gradients are wrong here" in note
    assert not verify(net, (2, 3, 21, 17), tile=8).notes
