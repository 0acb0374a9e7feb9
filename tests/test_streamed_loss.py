"""Losses of whole maps: ``StreamingModel.streamed_loss`` and ``streamcnn.losses`` beside plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
import zarr
from operator_cases import by_name
from streaming_cases import TOLERANCE
from torch import Tensor, nn

from streamcnn import DatasetMismatch, PlanDoesNotFit, StreamingModel, TensorSource, UnsupportedModel
from streamcnn.data.sources import ImageSource, open_image
from streamcnn.losses import dice_loss, tversky_loss

SIZE = (37, 45)
CLASSES = 3
TARGET = torch.randint(CLASSES, (2, *SIZE), generator=torch.Generator().manual_seed(3))
WEIGHTS = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def make_net(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Upsample(SIZE, mode="bilinear"),
        nn.Conv2d(4, outputs, 1),
    ).double()


def an_image() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def model_of(net: nn.Module, **options: Any) -> StreamingModel:
    model = StreamingModel(net, tile=16, **options)
    model.resident_tail = False
    return model


def assert_same(
    loss: Callable[..., Tensor], target: Any, whole: Tensor, outputs: int = CLASSES, **maps: Any
) -> None:
    """Raise unless a loss of ``target`` and its gradients are the plain one's of the tensor ``whole``."""
    net = make_net(outputs)
    plain, model = copy.deepcopy(net), model_of(net)
    tensors = {name: WEIGHTS for name in maps}
    images = [an_image().requires_grad_() for _ in range(2)]
    found = model.streamed_loss(images[0], target, loss, **maps)
    expected = loss(plain(images[1]), whole, **tensors)
    found.backward()
    expected.backward()
    assert found.shape == ()
    pairs = [(found, expected), (images[0].grad, images[1].grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]
    pairs += list(zip(model.buffers(), plain.buffers(), strict=True))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def in_files(folder: Path, kind: str, masks: Tensor = TARGET) -> list[ImageSource]:
    found = []
    for index, mask in enumerate(masks.numpy().astype(np.uint8)):
        path = folder / f"mask {index}.{kind}"
        if kind == "tif":
            tifffile.imwrite(path, mask, tile=(16, 16))
        else:
            zarr.create_array(path, data=mask, chunks=(16, 16), dimension_names=("y", "x"))
        found.append(open_image(path))
    return found


def weighted(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy(logits, target, reduction="none") * weights).sum() / weights.sum()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "a module with weights": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double(), ignore_index=2),
    "dice": dice_loss,
    "both": lambda logits, target: (
        F.cross_entropy(logits, target) + dice_loss(logits, target, ignore_index=1)
    ),
    "tversky": partial(tversky_loss, alpha=0.3, beta=0.7, gamma=0.75, smooth=1.0),
}


@by_name(LOSSES)
def test_a_streamed_loss_and_its_gradients_are_those_of_plain_pytorch(
    case: Callable[..., Tensor],
) -> None:
    assert_same(case, TARGET, TARGET)


@pytest.mark.parametrize("kind", ["tif", "zarr"])
def test_the_target_may_be_in_files(tmp_path: Path, kind: str) -> None:
    assert_same(F.cross_entropy, in_files(tmp_path, kind), TARGET)


def test_weights_of_pixels_may_be_in_sources() -> None:
    weights = [TensorSource(each[None]) for each in WEIGHTS]
    assert_same(weighted, TARGET, TARGET, weights=weights)
    assert_same(weighted, TARGET, TARGET, weights=WEIGHTS)


def test_the_target_may_have_several_channels() -> None:
    target = torch.rand(2, 3, *SIZE, dtype=torch.float64)
    assert_same(F.mse_loss, [TensorSource(each) for each in target], target)


def test_a_binary_mask_of_bytes() -> None:
    loss = partial(dice_loss, mode="binary")
    assert_same(
        loss, [TensorSource(each[None]) for each in TARGET.clamp(max=1)], TARGET.clamp(max=1), outputs=1
    )


def test_nothing_runs_on_whole_maps_and_the_output_is_never_whole() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model = StreamingModel(net, budget="120MiB")
    size = (2048, 2048)
    image = TensorSource(torch.zeros(3, *size))
    target = TensorSource(torch.zeros(1, *size, dtype=torch.uint8))
    model.streamed_loss(image, target, F.cross_entropy).backward()
    assert model.last_report is not None
    assert model.last_report.measured_bytes is not None
    logits = 8 * 4 * size[0] * size[1]
    assert model.last_report.measured_bytes <= 120 * 2**20 < logits
    plan = model.plan((1, 3, *size))
    assert plan.projected_bytes > logits, "the output alone does not fit"


def test_the_plan_of_a_loss_is_that_of_its_pass() -> None:
    model = model_of(make_net(), budget="64MiB")
    image = [TensorSource(each) for each in an_image()]
    target = [TensorSource(each[None]) for each in TARGET]
    plan = model.plan_loss(image, target, F.cross_entropy)
    model.streamed_loss(image, target, F.cross_entropy)
    assert model.last_report is not None
    assert plan.projected_bytes == model.last_report.projected_bytes
    assert plan.residents == ()
    assert plan.training
    assert model.plan_loss((2, 3, *SIZE), TARGET, F.cross_entropy).image_shape == (2, 3, *SIZE)


def test_a_second_backward_pass_reads_the_mask_again() -> None:
    model = model_of(make_net())
    loss = model.streamed_loss(an_image(), [TensorSource(each[None]) for each in TARGET], F.cross_entropy)
    loss.backward(retain_graph=True)
    first = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    for parameter, gradient in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_a_loss_under_autocast_is_that_of_plain_pytorch_there() -> None:
    net, image = make_net().float(), an_image().float()
    model = model_of(copy.deepcopy(net))
    with torch.autocast("cpu"):
        found = model.streamed_loss(image, TARGET, F.cross_entropy)
        expected = F.cross_entropy(net(image), TARGET)
    found.backward()
    expected.backward()
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    for ours, theirs in zip(model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.1, atol=0.02)


def test_a_budget_that_is_too_small_is_refused_before_anything_runs() -> None:
    model = StreamingModel(make_net(), "1MiB")
    with pytest.raises(PlanDoesNotFit, match="Raise budget= to at least"):
        model.streamed_loss(an_image(), TARGET, F.cross_entropy)


def test_a_loss_is_captured_once() -> None:
    model = model_of(make_net())
    for _ in range(3):
        # A function that is made anew, as in a loop.
        model.streamed_loss(an_image(), TARGET, partial(F.cross_entropy, ignore_index=2))
    _, call = model._losses.of(model.net, partial(F.cross_entropy, ignore_index=2))
    assert call._guarded.count == 1


def test_evaluation_needs_no_gradients() -> None:
    net = make_net().eval()
    model = model_of(net)
    with torch.no_grad():
        found = model.streamed_loss(an_image(), TARGET, F.cross_entropy)
        expected = F.cross_entropy(net(an_image()), TARGET)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_losses_are_forgotten_by_copies() -> None:
    model = model_of(make_net())
    first = model.streamed_loss(an_image(), TARGET, F.cross_entropy)
    torch.testing.assert_close(copy.deepcopy(model).streamed_loss(an_image(), TARGET, F.cross_entropy), first)


# --- faults -------------------------------------------------------------------------------------------


def test_a_class_out_of_range_names_value_file_and_place(tmp_path: Path) -> None:
    target = TARGET.clone()
    target[1, 20, 7] = 250
    model = model_of(make_net())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        DatasetMismatch, match=r"mask 1\.tif holds class 250 at row 20, column 7.*ignore_index=250"
    ):
        model.streamed_loss(an_image(), in_files(tmp_path, "tif", target), F.cross_entropy)
    for name, state in model.state_dict().items():
        assert torch.equal(state, before[name])
    with pytest.raises(IndexError, match="Target 250"):
        model.streamed_loss(an_image(), target, F.cross_entropy)


def test_a_class_out_of_range_of_a_loss_of_overlap_names_the_masks(tmp_path: Path) -> None:
    target = TARGET.clone()
    target[1, 20, 7] = 250
    model = model_of(make_net())
    with pytest.raises(DatasetMismatch, match=r"mask 0\.tif holds 0, 1, 2; .*mask 1\.tif holds 0, 1, 2, 250"):
        model.streamed_loss(an_image(), in_files(tmp_path, "tif", target), dice_loss)
    with pytest.raises(RuntimeError, match="Class values"):
        model.streamed_loss(an_image(), target, dice_loss)


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    masks = in_files(tmp_path, "tif", TARGET[:, :30])
    with pytest.raises(DatasetMismatch, match=r"mask 0\.tif has 30 x 45 pixels, its image 37 x 45"):
        model_of(make_net()).streamed_loss(an_image(), masks, F.cross_entropy)


def test_a_mask_of_another_type_is_refused_with_plain_pytorchs_reason() -> None:
    target = [TensorSource(torch.rand(1, *SIZE)) for _ in range(2)]
    with pytest.raises(UnsupportedModel, match=r"Long|dtype|scalar type"):
        model_of(make_net()).streamed_loss(an_image(), target, F.cross_entropy)


def test_an_index_error_of_the_loss_itself_stays_one() -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return [logits.mean()][int(target.dim())]

    with pytest.raises((IndexError, UnsupportedModel), match="out of range"):
        model_of(make_net()).streamed_loss(an_image(), TARGET, loss)


@pytest.mark.parametrize("kind", [IndexError, UnsupportedModel, RuntimeError])
def test_an_error_that_stays_keeps_its_cause(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    model = model_of(make_net())

    def fail(*args: Any) -> None:
        raise kind("nothing about the target") from KeyError("why")

    monkeypatch.setattr(model, "_streamed", fail)
    with pytest.raises(kind) as caught:
        model.streamed_loss(an_image(), TARGET, F.cross_entropy)
    assert isinstance(caught.value.__cause__, KeyError)


# --- losses of overlap --------------------------------------------------------------------------------


def flattened(chances: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection and sizes by class, as the flattened maps give them."""
    first, second = (each.movedim(1, 0).flatten(1) for each in (chances, truth))
    return (first * second).sum(1), first.sum(1), second.sum(1)


def test_dice_is_twice_the_overlap_over_the_sizes() -> None:
    logits = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    target = torch.randint(3, (2, 9, 7))  # class 3 is nowhere
    both, found, true = flattened(logits.softmax(1), F.one_hot(target, 4).movedim(-1, 1))
    losses = (1 - 2 * both / (found + true)) * torch.tensor([1, 1, 1, 0])
    torch.testing.assert_close(dice_loss(logits, target), losses.mean())
    torch.testing.assert_close(dice_loss(logits, target, classes=[0, 2]), losses[[0, 2]].mean())
    smoothed = 1 - (2 * both + 1) / (found + true + 1)
    torch.testing.assert_close(dice_loss(logits, target, smooth=1.0), (smoothed * (true > 0)).mean())
    logarithm = -(2 * both / (found + true)).clamp_min(1e-7).log() * (true > 0)
    torch.testing.assert_close(dice_loss(logits, target, log_loss=True), logarithm.mean())


def test_tversky_weighs_false_positives_and_negatives() -> None:
    logits, target = torch.randn(2, 3, 9, 7, dtype=torch.float64), torch.randint(3, (2, 9, 7))
    both, found, true = flattened(logits.softmax(1), F.one_hot(target, 3).movedim(-1, 1))
    expected = (1 - both / (both + 0.2 * (found - both) + 0.8 * (true - both))).mean()
    torch.testing.assert_close(tversky_loss(logits, target, alpha=0.2, beta=0.8), expected)
    torch.testing.assert_close(tversky_loss(logits, target), dice_loss(logits, target))


def test_what_is_ignored_counts_nowhere() -> None:
    logits, target = torch.randn(2, 3, 9, 7, dtype=torch.float64), torch.randint(3, (2, 9, 7))
    cut = target.clone()
    cut[:, 5:] = 255
    torch.testing.assert_close(
        dice_loss(logits, cut, ignore_index=255), dice_loss(logits[:, :, :5], target[:, :5])
    )


def test_labels_may_overlap() -> None:
    logits, target = torch.randn(2, 3, 9, 7, dtype=torch.float64), torch.randint(2, (2, 3, 9, 7))
    both, found, true = flattened(logits.sigmoid(), target.double())
    torch.testing.assert_close(
        dice_loss(logits, target, "multilabel"), (1 - 2 * both / (found + true)).mean()
    )
    chances = logits.sigmoid()
    torch.testing.assert_close(
        dice_loss(chances, target, "multilabel", from_logits=False), dice_loss(logits, target, "multilabel")
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mode": "pixels"}, "mode='pixels': allowed are 'binary', 'multiclass', 'multilabel'"),
        ({"mode": "multilabel"}, r"y_true has shape \(2, 9, 7\): allowed is \(2, 3, 9, 7\)"),
        ({"mode": "binary"}, r"y_true has shape \(2, 1, 9, 7\): allowed is \(2, 3, 9, 7\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dice_loss(torch.randn(2, 3, 9, 7), torch.randint(3, (2, 9, 7)), **arguments)
