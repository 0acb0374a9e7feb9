"""Wrong use and budgets that are too small: refused, with what to do, and nothing has changed."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from failure_cases import SHAPE, assert_unchanged, everything_of, make_image, make_model, make_net
from torch import Tensor, nn

from streamcnn import (
    CorruptImage,
    DatasetMismatch,
    ImageSource,
    PlanDoesNotFit,
    StreamingModel,
    TensorSource,
    UnsupportedModel,
    ZarrSource,
)
from streamcnn.data.augmentation import Augmentation, AugmentedSource
from streamcnn.data.reader import BatchReader
from streamcnn.data.sources import ArraySource
from streamcnn.geometry.regions import Region
from streamcnn.plan.storage import Tier
from streamcnn.runtime import pass_stores
from streamcnn.stores import MemoryStore, SpillFolder, ZarrStore

# --- wrong use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": "banana"}, r"cannot read 'banana' as a number of bytes: allowed is .* '11GB'"),
        ({"budget": -5}, r"cannot read -5 as a number of bytes: allowed is a positive int"),
        ({"budget": "-5GB"}, r"cannot read '-5GB'"),
        ({"budget": 1.5}, r"cannot read 1.5"),
        ({"tile": 0}, r"tile=0: allowed are a positive whole number of pixels or a pair \(h, w\)"),
        ({"tile": "x"}, r"tile='x': allowed are a positive"),
        ({"tile": (8, -1)}, r"tile=\(8, -1\): allowed"),
        ({"tile": (8, 8, 8)}, r"tile=\(8, 8, 8\): allowed"),
        ({"tile": 1.5}, r"tile=1.5: allowed"),
        ({"tile": True}, r"tile=True: allowed"),
        ({"preprocess": "normalise"}, r"preprocess='normalise': allowed is a function of a tile"),
        ({"spill": "/no/such/folder"}, r"spill='/no/such/folder' is no folder: create it, or pass None"),
    ],
    ids=str,
)
def test_an_option_without_meaning(options: dict[str, Any], text: str) -> None:
    net = make_net()
    before = everything_of(net)
    with pytest.raises(ValueError, match=text):
        StreamingModel(net, **options)
    assert_unchanged(before, everything_of(net))
    model = StreamingModel(net, budget="1GiB", tile=16)
    for name, value in options.items():
        with pytest.raises(ValueError, match=text):
            setattr(model, name, value)
    assert (model.budget, model.tile, model.spill) == (2**30, (16, 16), None)


def test_options_are_set_between_passes_as_they_are_given_at_first(tmp_path: Path) -> None:
    model = StreamingModel(make_net().eval(), tile=16)
    output = model(make_image())
    for name, value in {"tile": np.int64(24), "budget": "1GiB", "spill": str(tmp_path)}.items():
        setattr(model, name, value)
    torch.testing.assert_close(model(make_image()), output)
    assert model.plan(tuple(make_image().shape)).tile == (24, 24)
    assert (model.budget, model.spill) == (2**30, tmp_path)


@pytest.mark.parametrize("net", ["resnet18", nn.Conv2d], ids=str)
def test_a_net_that_is_no_module(net: Any) -> None:
    with pytest.raises(ValueError, match=r"net is .*: allowed is a torch.nn.Module"):
        StreamingModel(net)


def test_a_net_without_values() -> None:
    with pytest.raises(UnsupportedModel, match=r"on the meta device, .*load_state_dict\(assign=True\)"):
        StreamingModel(make_net().to("meta"))(make_image())


def test_a_spill_folder_that_has_gone(on_disk: None, tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    folder.mkdir()
    model = make_model(folder)
    folder.rmdir()
    before = everything_of(model)
    with pytest.raises(FileNotFoundError, match="spill"):
        model(make_image())
    assert_unchanged(before, everything_of(model))


def test_a_disk_without_room(on_disk: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path)
    needed = model.plan(tuple(make_image().shape), torch.float64).bytes_on(Tier.DISK)
    before = everything_of(model)
    monkeypatch.setattr(pass_stores, "free_bytes", lambda parent: needed - 1)
    with pytest.raises(PlanDoesNotFit, match=r"spills .* at a time, and .* has .* left: pass spill="):
        model(make_image())
    assert_unchanged(before, everything_of(model))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(pass_stores, "free_bytes", lambda parent: needed)
    model(make_image())


def _with_pixel(value: float) -> Tensor:
    image = make_image()
    image[1, 2, 20, 33] = value
    return image


@pytest.mark.parametrize(
    ("image", "error", "text"),
    [
        (make_image()[0], DatasetMismatch, r"shape \(3, 37, 45\): allowed is \(N, C, H, W\).* image\[None\]"),
        (make_image()[:, :, :0], DatasetMismatch, r"shape \(2, 3, 0, 45\): .* no empty axis"),
        (
            _with_pixel(math.nan),
            CorruptImage,
            r"NaN or infinite values in rows 1?\d..\d+, columns \d+..\d+: ",
        ),
        (_with_pixel(math.inf), CorruptImage, r"NaN or infinite .* let preprocess= do it"),
        (_with_pixel(-math.inf), CorruptImage, r"NaN or infinite"),
        (make_image().to(torch.uint8), DatasetMismatch, r"image of torch.uint8: .* preprocess= a function"),
        ([TensorSource(make_image()[0].byte())], DatasetMismatch, r"image of torch.uint8"),
        (
            make_image()[:, :2],
            UnsupportedModel,
            r"shape \(2, 2, 37, 45\): the image has 2 channels, and the model's layer .*Conv2d\(3, .* "
            r"takes 3\. Give an image with 3 channels, have preprocess= .* make the model for 2 \(in_chans=2",
        ),
        (make_image()[:, :, :2, :2], UnsupportedModel, r"shape \(2, 3, 2, 2\): .* plain model accepts"),
        (
            make_image().float(),
            UnsupportedModel,
            r"the image is of torch.float32, and the model's layer 0, Conv2d, of torch.float64. Convert "
            r"the image, as image.to\(torch.float64\) or by preprocess=, or the model, as model.to",
        ),
        (make_image().to_sparse(), DatasetMismatch, r"image tensor is sparse_coo: allowed is a dense one"),
        (make_image().to("meta"), DatasetMismatch, r"image tensor is on the meta device: .* with values"),
        (
            torch.nested.as_nested_tensor([*make_image()], layout=torch.jagged),
            DatasetMismatch,
            r"image tensor is nested: .* as .* torch.stack\(\) gives",
        ),
        ([make_image()[0]], TypeError, r"image 0 of the batch is a Tensor: .* wrap a tensor in TensorSource"),
        ([], DatasetMismatch, r"a batch of 0 images"),
        (
            [TensorSource(make_image()[0]), TensorSource(make_image()[0, :, 1:])],
            DatasetMismatch,
            r"image 1 of the batch is \(3, 36, 45\) .*, image 0 is \(3, 37, 45\)"
            r".*--batch 1, and --accumulate 2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_image_that_cannot_be_used(image: Any, error: type[Exception], text: str) -> None:
    model = make_model()
    before = everything_of(model)
    with pytest.raises(error, match=text):
        model(image)
    assert_unchanged(before, everything_of(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, bias=False), nn.Conv3d(3, 4, (1, 3, 3), bias=False)])
def test_another_dtype_than_the_layers_without_a_bias(layer: nn.Module, dtype: torch.dtype) -> None:
    """Norms take float32 weights for half precision; convolutions on tensors without values take all."""
    image = make_image()
    net = nn.Sequential(*[nn.Unflatten(1, (3, 1))] * isinstance(layer, nn.Conv3d), layer, nn.ReLU())
    with pytest.raises(RuntimeError, match=r"expected scalar type|should be the same"):
        net(image.to(dtype))
    for training in (True, False):
        model = StreamingModel(net.train(training), tile=16)
        with pytest.raises(UnsupportedModel, match=rf"tensors of {dtype} and torch.float32: allowed is one"):
            model(image.to(dtype))
    with torch.autocast("cpu"):
        assert StreamingModel(net, tile=16)(image.float()).dtype == torch.bfloat16


def test_a_zarr_array_of_wrong_rank(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", shape=(2, 3, 8, 8), dtype="u1")
    with pytest.raises(
        DatasetMismatch, match=r"has 4 axes \(2, 3, 8, 8\): allowed are \(H, W\), \(C, H, W\)"
    ):
        ZarrSource(tmp_path / "a.zarr")


def _shrinking(tile: Tensor) -> Tensor:
    return tile.double()[:, :, ::2] if tile.shape[2] > 1 else tile.double()


@pytest.mark.parametrize(
    ("preprocess", "error", "text"),
    [
        (
            lambda tile: tile.double()[0],
            DatasetMismatch,
            r"turned a tile of shape \(2, 3, 1, 1\) into \(3, 1",
        ),
        (lambda tile: tile.double()[:1], DatasetMismatch, r"pointwise function, which keeps N, h and w"),
        (_shrinking, DatasetMismatch, r"preprocess= turned a tile of shape \(2, 3, \d+, \d+\) into"),
        (lambda tile: tile // 2, DatasetMismatch, r"image of torch.uint8"),
        (lambda tile: tile.sub_(1).double(), ValueError, r"preprocess= changed its tile in place"),
        (lambda tile: tile.clamp_(0, 200).double(), ValueError, r"preprocess= changed its tile in place"),
        (lambda tile: tile.double() / 0, CorruptImage, r"NaN or infinite"),
        (lambda tile: tile.numpy(), DatasetMismatch, r"into a ndarray: .* that returns a tensor"),
        (lambda tile: None, DatasetMismatch, r"into a NoneType: .* that returns a tensor"),
    ],
    ids=[
        "3-D",
        "batch",
        "size",
        "integer",
        "in place",
        "in place, but ones stay",
        "infinite",
        "NumPy",
        "none",
    ],
)
def test_a_preprocess_that_cannot_be_used(preprocess: Any, error: type[Exception], text: str) -> None:
    model = make_model(preprocess=preprocess)
    before = everything_of(model)
    image = (make_image() * 20 + 128).byte()
    kept = image.clone()
    with pytest.raises(error, match=text):
        model(image)
    assert torch.equal(image, kept)
    assert_unchanged(before, everything_of(model))


def test_an_image_gradient_through_preprocess() -> None:
    model = make_model(preprocess=lambda tile: tile * 2)
    with pytest.raises(ValueError, match=r"requires a gradient and preprocess= is set: .* or detach it"):
        model(make_image().requires_grad_())


@pytest.mark.parametrize("how", ["call", "plan", "loss", "plan_loss", "predict_to"])
def test_images_of_several_sizes_are_refused_before_one_is_read(tmp_path: Path, how: str) -> None:
    images = [Unreadable(torch.zeros(3, 40, 50 + (at == 2))) for at in range(4)]
    model = StreamingModel(nn.Conv2d(3, 2, 3, padding=1), tile=16)
    target = torch.zeros(4, 40, 50, dtype=torch.long)
    calls: dict[str, Callable[[], Any]] = {
        "call": lambda: model(images),
        "plan": lambda: model.plan(images),
        "loss": lambda: model.streamed_loss(images, target, nn.CrossEntropyLoss()),
        "plan_loss": lambda: model.plan_loss(images, target, nn.CrossEntropyLoss()),
        "predict_to": lambda: model.predict_to(images, tmp_path / "map.zarr"),
    }
    with pytest.raises(
        DatasetMismatch, match=r"image 2 of the batch is \(3, 40, 51\).*image 0 is \(3, 40, 50\)"
    ):
        calls[how]()


class Unreadable(TensorSource):
    """None of its pixels is to be read."""

    def _read(self, region: Region) -> Tensor:
        raise AssertionError(self.name)


@pytest.mark.parametrize(
    ("image", "error", "text"),
    [
        (
            (1, 3, 40),
            ValueError,
            r"shape=\(1, 3, 40\): allowed are four positive whole numbers \(N, C, H, W\)",
        ),
        ((1, 3, 40.5, 50), ValueError, r"shape=\(1, 3, 40.5, 50\): allowed are four positive whole"),
        ((1, 3, 0, 50), ValueError, r"shape=\(1, 3, 0, 50\): allowed are four positive whole"),
        (
            [torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)],
            TypeError,
            "image 0 of the batch is a Tensor: allowed is",
        ),
        ([np.zeros((3, 8, 8))], TypeError, "image 0 of the batch is a ndarray: allowed is an ImageSource"),
        (["a.png"], TypeError, "image 0 of the batch is a str: .* open a file with open_image"),
        ([], DatasetMismatch, "a batch of 0 images"),
        ({"image": torch.zeros(1, 3, 8, 8)}, TypeError, "the image is a dict: allowed are a tensor"),
        ("a.png", TypeError, "the image is a str: allowed are a tensor"),
        (np.zeros((3, 8, 8)), TypeError, "the image is a ndarray: .* a NumPy array in ArraySource"),
        (None, TypeError, r"the image is a NoneType: allowed are a tensor \(N, C, H, W\), an ImageSource"),
    ],
)
def test_a_plan_of_what_is_no_image(image: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        StreamingModel(make_net()).plan(image)


def test_the_plan_of_an_image_is_that_of_its_shape() -> None:
    model, image = StreamingModel(make_net(), tile=16), make_image()
    assert model.plan(image) == model.plan(tuple(image.shape))
    with_gradient = model.plan(image.requires_grad_())
    assert with_gradient.differentiated > model.plan(tuple(image.shape)).differentiated


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.mean() if x.mean() > 0 else x.amax()


class TwoInputs(Branching):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) + y


class Failing(Branching):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("my own error")


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (Branching(), r"cannot be captured for .* \(2, 3, 37, 45\): it reads a value .*x.mean\(\) > 0"),
        (TwoInputs(), r"cannot be captured .*'y'.* accepts this shape and arguments"),
        (Failing(), r"cannot be captured .*my own error"),
    ],
    ids=["branch", "two inputs", "error"],
)
def test_a_model_that_cannot_be_captured(net: nn.Module, text: str) -> None:
    model = StreamingModel(net)
    before = everything_of(model)
    with pytest.raises(NotImplementedError, match=text) as caught:
        model(make_image())
    assert isinstance(caught.value, UnsupportedModel)
    assert len(str(caught.value)) < 500
    assert_unchanged(before, everything_of(model))


def test_a_second_backward_pass_that_was_not_asked_for() -> None:
    model = make_model()
    output = model(make_image())
    output.sum().backward()
    before = everything_of(model)
    with pytest.raises(RuntimeError, match=r"differentiated already .* pass retain_graph=True"):
        output.sum().backward()
    assert_unchanged(before, everything_of(model))


def test_a_gradient_of_a_gradient() -> None:
    model = make_model()
    image = make_image().requires_grad_()
    # Autograd would take the gradient for a constant, and a penalty on it for nothing.
    with pytest.raises(RuntimeError, match=r"differentiated once: .* without create_graph=True"):
        torch.autograd.grad(model(image).sum(), image, create_graph=True)


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("name", ["0.weight", "4.weight", "7.bias", "1.running_var", "image"])
def test_what_backward_needs_is_changed_after_forward(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    # In eval mode batch norm's buffers are operands like any other; a frozen layer's weight is, too.
    model.eval()
    model.net[4].requires_grad_(False)
    image = make_image().requires_grad_()
    output = model(image)
    changed = {**model.state_dict(), "image": image.detach()}[name]
    changed.mul_(2)
    before = everything_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        output.sum().backward()
    assert_unchanged(before, everything_of(model))
    # The traceback that a user may keep does not keep the stores.
    assert caught.value.__traceback__ is not None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["running_var", "weight", "bias"])
def test_what_a_frozen_norm_was_worked_out_from_may_change(name: str) -> None:
    """The backward pass has the scale and the shift of the forward pass, and its gradients."""
    gradients = []
    for factor in (1, 2):
        model = make_model()
        model.net[1].eval().requires_grad_(False)
        image = make_image().requires_grad_()
        output = model(image)
        getattr(model.net[1], name).mul_(factor)
        output.square().sum().backward()
        gradients.append(image.grad)
    assert torch.equal(*gradients)


def _as_tensor(image: Tensor) -> Tensor:
    return image


def _as_source(image: Tensor) -> list[TensorSource]:
    return [TensorSource(each) for each in image]


def _as_augmented(image: Tensor) -> list[AugmentedSource]:
    return [AugmentedSource(TensorSource(each), Augmentation(mirror=True)) for each in image]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("given", [_as_tensor, _as_source, _as_augmented])
def test_an_image_is_overwritten_between_forward_and_backward(given: Any, tail: bool) -> None:
    model = make_model()
    model.resident_tail = tail
    buffer = make_image()
    losses = []
    for _ in range(2):
        losses.append(model(given(buffer)).sum())
        buffer.copy_(make_image() * 2)
    before = everything_of(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.stack(losses).sum().backward()
    assert_unchanged(before, everything_of(model))


def _as_array(image: Tensor) -> list[ImageSource]:
    return [ArraySource(each.numpy()) for each in image]


def _as_augmented_array(image: Tensor) -> list[ImageSource]:
    return [AugmentedSource(source, Augmentation(quarter_turns=1)) for source in _as_array(image)]


@pytest.mark.parametrize("given", [_as_array, _as_augmented_array])
def test_an_array_is_filled_with_another_image_between_forward_and_backward(given: Any) -> None:
    model = make_model()
    buffer = make_image()
    loss = model(given(buffer)).sum()
    same = buffer.clone()
    buffer.copy_(make_image() * 2)
    before = everything_of(model)
    with pytest.raises(RuntimeError, match=r"an array of shape .* was changed between forward and backward"):
        loss.backward(retain_graph=True)
    assert_unchanged(before, everything_of(model))
    buffer.copy_(same)
    loss.backward()


def test_a_mask_is_overwritten_between_forward_and_backward() -> None:
    model = StreamingModel(nn.Conv2d(3, 1, 3, padding=1).double(), tile=16)
    mask = torch.rand(1, *SHAPE[2:], dtype=torch.float64)
    loss = model.streamed_loss(make_image()[:1], TensorSource(mask), lambda out, target: (out * target).sum())
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_image_of_inference_mode_is_no_obstacle() -> None:
    with torch.inference_mode():
        image = make_image()
    model = make_model(preprocess=lambda tile: tile * 2)
    model(image).sum().backward()
    assert model.net[0].weight.grad.norm() > 0


# --- budgets ---------------------------------------------------------------------------------------------


def test_a_budget_that_is_too_small_is_refused_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = StreamingModel(make_net(), budget=10**6, spill=tmp_path)
    plan = model.plan(SHAPE)
    assert not plan.fits
    opened = []
    for kind in (MemoryStore, ZarrStore, SpillFolder):
        monkeypatch.setattr(kind, "__init__", lambda *args: opened.append(args))
    monkeypatch.setattr(BatchReader, "read", lambda *args: opened.append(args))
    before = everything_of(model)
    with pytest.raises(MemoryError) as caught:
        model(make_image())
    assert isinstance(caught.value, PlanDoesNotFit)
    text = str(caught.value)
    assert text.startswith(
        "no plan for an image of shape (2, 3, 37, 45) fits in 977 KiB: the smallest needs "
    )
    assert f" more, in {plan.worst}, at {plan.worst_operator}, with tiles of " in text
    assert f"at least {plan.projected_bytes} bytes (" in text
    assert all(term.name in text for term in sorted(plan.terms, key=lambda term: -term.nbytes)[:3])
    assert "Raise budget= to at least " in text
    assert opened == []
    assert os.listdir(tmp_path) == []
    assert model.last_report is None
    assert_unchanged(before, everything_of(model))
    gc.collect()
