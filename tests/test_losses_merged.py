"""Losses that merge rows and columns into one axis, as they are often written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operator_cases import by_name
from test_losses import CLASSES, SHAPE, WithLoss, an_image, assert_equal, both, some_classes
from torch import Tensor


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """As segmentation-models-pytorch has it."""
    n, c = logits.shape[:2]
    chances = logits.log_softmax(dim=1).exp().view(n, c, -1)
    known = target.view(n, -1)
    mask = known != 2
    chances = chances * mask.unsqueeze(1)
    truth = F.one_hot((known * mask).to(torch.long), c).permute(0, 2, 1) * mask.unsqueeze(1)
    intersection = torch.sum(chances * truth, dim=(0, 2))
    cardinality = torch.sum(chances + truth, dim=(0, 2))
    scores = (2.0 * intersection) / cardinality.clamp_min(1e-7)
    return ((1.0 - scores) * (truth.sum((0, 2)) > 0)).mean()


def flat_dice(logits: Tensor, target: Tensor) -> Tensor:
    """As it stands in many a notebook."""
    chances, truth = torch.sigmoid(logits[:, 1]).reshape(-1), (target == 1).float().view(-1)
    overlap = (chances * truth).sum()
    return (
        1
        - (2.0 * overlap + 1) / (chances.sum() + truth.sum() + 1)
        + F.binary_cross_entropy(chances, truth.double())
    )


def each_image(logits: Tensor, target: Tensor) -> Tensor:
    """Dice of each image, and an axis of extent 1."""
    n = logits.shape[0]
    chances, truth = torch.sigmoid(logits[:, 1]).view(n, 1, -1), (target == 1).view(n, 1, -1).double()
    both = (chances * truth).sum(-1, keepdim=True)
    scale = torch.tensor([2.0], dtype=torch.float64)
    return (scale * both / (chances.sum(2, keepdim=True) + truth.sum(2, keepdim=True))).mean() + chances.amax(
        (0, 2)
    )[0]


LOSSES = {
    "soft dice": soft_dice,
    "flat dice": flat_dice,
    "dice of each image": each_image,
    "classes last": lambda x, t: F.cross_entropy(x.permute(0, 2, 3, 1).reshape(-1, CLASSES), t.reshape(-1)),
    "classes in the middle": lambda x, t: F.cross_entropy(x.flatten(2), t.flatten(1), ignore_index=1),
    "each pixel, classes last": lambda x, t: F.cross_entropy(
        x.movedim(1, -1).reshape(-1, CLASSES), t.flatten(), reduction="none"
    ).mean(),
    "each pixel": lambda x, t: F.cross_entropy(x.flatten(2), t.flatten(1), reduction="none").mean(1).sum(),
    "weighted": lambda x, t: (x.flatten(2).softmax(1) * torch.arange(4.0).view(4, 1)).square().sum(-1).mean(),
    "values": lambda x, t: F.smooth_l1_loss(x[:, 0].flatten(1), t.flatten(1).double()),
}


@by_name(LOSSES)
@pytest.mark.parametrize("num_images", [1, 2])
def test_it_streams_and_is_that_of_plain_pytorch(case: object, num_images: int) -> None:
    image, target = an_image()[:num_images], some_classes()[:num_images]
    streamed, plain, model = both(WithLoss(case).double(), image, target)
    assert_equal(streamed, plain)
    assert model.plan((num_images, *SHAPE[1:]), inputs=(target,)).residents == ()


OTHERS = {
    "sorted": lambda x, t: x[:, 0].flatten(1).sort(1).values[:, :50].sum(),
    "matched": lambda x, t: (x[:, 0].flatten(1) @ t.flatten(1).double().T).sum(),
    "shifted": lambda x, t: (x[:, 0].flatten(1)[:, 1:] - x[:, 0].flatten(1)[:, :-1]).abs().sum(),
    "with positions": lambda x, t: (x.flatten(2) * torch.arange(33 * 29.0)).sum(),
    "two ways": lambda x, t: (x[:, :1].flatten(1).unsqueeze(1) * x[:, 1:2].flatten(2)).sum(),
    "a part of it": lambda x, t: x.view(2, CLASSES, 33 * 29).sum(1).std(),
}


@by_name(OTHERS)
def test_what_looks_at_positions_is_that_of_plain_pytorch_too(case: object) -> None:
    streamed, plain, _ = both(WithLoss(case).double(), an_image(), some_classes())
    assert_equal(streamed, plain)
