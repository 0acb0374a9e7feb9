"""Overlap of maps of classes with their masks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from streamcnn import StreamingModel, TensorSource
from streamcnn.metrics import SegmentationScore, class_overlaps

SIZE = (37, 45)
IGNORED = 255


def a_case(channels: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    target = torch.randint(classes, (2, *SIZE), generator=generator)
    return torch.randn(2, channels, *SIZE, generator=generator), target


@pytest.mark.parametrize(("channels", "classes"), [(4, 3), (1, 2)])
@pytest.mark.parametrize("ignored", [None, IGNORED])
def test_a_score_is_that_of_the_confusion_matrix(channels: int, classes: int, ignored: int | None) -> None:
    scores, target = a_case(channels, classes)
    if ignored is not None:
        target[:, 5:9] = ignored
    found = (scores[:, 0] > 0).long() if channels == 1 else scores.argmax(1)
    num = max(channels, 2)
    confusion = multiclass_confusion_matrix(found, target, num_classes=num, ignore_index=ignored).double()
    both, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    score = SegmentationScore(class_overlaps(scores, target, ignore_index=ignored))
    torch.testing.assert_close(score.iou, both / (true + predicted - both), equal_nan=True)
    torch.testing.assert_close(score.dice, 2 * both / (true + predicted), equal_nan=True)
    assert score.accuracy == pytest.approx(float(both.sum() / true.sum()))
    assert score.mean_iou == pytest.approx(float(score.iou.nanmean()))
    assert score.mean_dice == pytest.approx(float(score.dice.nanmean()))


def test_images_add_up() -> None:
    scores, target = a_case(4, 3)
    parts = [SegmentationScore(class_overlaps(scores[n : n + 1], target[n : n + 1])) for n in range(2)]
    assert torch.equal((parts[0] + parts[1]).overlaps, class_overlaps(scores, target))


def test_a_class_that_is_nowhere_counts_in_no_mean() -> None:
    score = SegmentationScore(torch.tensor([[5, 0, 2], [6, 0, 4], [7, 0, 2]]))
    assert math.isnan(float(score.iou[1]))
    assert score.mean_iou == pytest.approx((5 / 8 + 2 / 4) / 2)


def test_overlaps_stream_and_are_exact() -> None:
    net = nn.Conv2d(3, 4, 3, padding=1)
    image, target = torch.randn(2, 3, *SIZE), a_case(4, 3)[1]
    masks = [TensorSource(each[None]) for each in target]
    model = StreamingModel(net, tile=16)
    with torch.no_grad():
        found = model.streamed_loss(image, masks, class_overlaps)
        expected = class_overlaps(net(image), target)
    assert found.dtype == torch.int64
    assert found.shape == (3, 4)
    # Convolutions of tiles round otherwise, so that a pixel may be of another class.
    assert (found - expected).abs().sum() <= 4
    assert torch.equal(found[2], expected[2])
