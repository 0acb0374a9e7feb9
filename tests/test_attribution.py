"""Attributions of streamed models against their definitions in plain PyTorch, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamcnn import StreamingModel, TensorSource
from streamcnn.attribution import (
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    LayerGradCamPlusPlus,
    NoiseTunnel,
    Saliency,
)
from streamcnn.data.tile_store import TileStore
from streamcnn.data.ultramnist import Recipe, Spec, load_digits
from streamcnn.data.ultramnist.generate import generate
from streamcnn.errors import PlanDoesNotFit, UnsupportedModel
from streamcnn.geometry.regions import Region
from streamcnn.support.models import load_model

TOLERANCE = 1e-9
SHAPE = (2, 3, 61, 47)


class Branched(nn.Module):
    """Batch norms, a layer that the next one overwrites, a skip connection and an even kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 5, stride=2, padding=2), nn.BatchNorm2d(6), nn.ReLU(True))
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.last = nn.Sequential(nn.Conv2d(6, 9, 4, stride=2), nn.Softplus())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        found: Tensor = self.head(self.pool(self.last(F.relu(stem + self.body(stem)))).flatten(1))
        return found


class WithAge(nn.Module):
    """Takes a number of each image besides it, and gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh())
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor, age: Tensor) -> Tensor:
        found: Tensor = self.head(torch.cat((self.features(x).mean((2, 3)), age), 1))
        return found


def make(net: nn.Module) -> StreamingModel:
    """``net`` in float64 and eval mode, its running statistics moved, cut into small tiles."""
    net = net.double()
    net(torch.randn(4, 3, 40, 40, dtype=torch.float64), *_further(net, 4))
    return StreamingModel(net.eval(), tile=(20, 17))


def _further(net: nn.Module, count: int) -> tuple[Tensor, ...]:
    return (torch.randn(count, 1, dtype=torch.float64),) if isinstance(net, WithAge) else ()


@pytest.fixture
def model() -> StreamingModel:
    return make(Branched())


@pytest.fixture
def image() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64) * 2 + 0.5


def plain_gradient(model: StreamingModel, image: Tensor, classes: Sequence[int]) -> Tensor:
    image = image.detach().clone().requires_grad_()
    scores = model.net(image)[torch.arange(len(image)), torch.tensor(classes)]
    return torch.autograd.grad(scores.sum(), image)[0]


def at_layer(model: StreamingModel, layer: str, image: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """A layer's output, and the gradient there."""
    kept = []

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()  # for what overwrites it

    handle = model.net.get_submodule(layer).register_forward_hook(hook)
    score = model.net(image.clone().requires_grad_())[:, target].sum()
    handle.remove()
    return kept[0].detach(), torch.autograd.grad(score, kept[0])[0]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.abs().max() > 1e-9, "comparing zeros shows nothing"
    assert float((found - expected).norm() / expected.norm()) <= TOLERANCE


def test_saliency_and_input_x_gradient(model: StreamingModel, image: Tensor) -> None:
    gradient = plain_gradient(model, image, [3, 3])
    assert_close(Saliency(model).attribute(image, target=3), gradient.abs())
    assert_close(Saliency(model).attribute(image, target=3, abs=False), gradient)
    assert_close(InputXGradient(model).attribute(image, target=3), gradient * image)


@pytest.mark.parametrize("target", [[1, 4], torch.tensor([1, 4]), np.array([1, 4]).tolist()])
def test_a_class_for_each_image(model: StreamingModel, image: Tensor, target: Any) -> None:
    found = Saliency(model).attribute(image, target=target, abs=False)
    assert_close(found, plain_gradient(model, image, [1, 4]))


@pytest.mark.parametrize("net", [Branched(), nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())])
def test_parameters_are_left_alone(net: nn.Module, image: Tensor) -> None:
    model = make(net)
    first, *others = model.net.parameters()
    first.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target = 1 if isinstance(net, Branched) else (1, 7, 9)
    Saliency(model).attribute(image, target=target)
    LayerGradCam(model, next(name for name, _ in net.named_children())).attribute(image, target=target)
    assert [parameter.grad for parameter in model.parameters()] == [None] * (1 + len(others))
    assert not first.requires_grad
    assert all(parameter.requires_grad for parameter in others)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.net.modules())


def test_hooks_of_the_caller_see_no_more_than_a_pass_gives(model: StreamingModel, image: Tensor) -> None:
    seen: list[Tensor] = []
    model.net.body.register_forward_hook(lambda _module, _args, output: seen.append(output))
    LayerGradCam(model, "last").attribute(image.requires_grad_(), target=0)
    assert all(type(each) is Tensor for each in seen)
    assert image.grad is None


def test_hooks_that_change_the_result_are_part_of_the_model(image: Tensor) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.body(x)}

    net = Several()
    seen: list[Tensor] = []
    net.register_forward_hook(lambda _module, _args, result: result["scores"])
    model = make(net)
    net.body.register_forward_hook(lambda _module, _args, output: seen.append(output))
    found = Saliency(model).attribute(image, target=[1, 3], abs=False)
    assert all(type(each) is Tensor for each in seen)
    assert_close(found, plain_gradient(model, image, [1, 3]))


def test_a_place_in_a_map_of_scores(image: Tensor) -> None:
    model = make(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Conv2d(2, 4, 3)))
    wanted = image.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model.net(wanted)[:, 2, 30, 11].sum(), wanted)
    assert_close(Saliency(model).attribute(image, target=(2, 30, 11), abs=False), expected)


def test_smoothgrad_and_its_kin(model: StreamingModel, image: Tensor) -> None:
    draws = [torch.Generator().manual_seed(7 + k) for k in range(4)]
    noises = [torch.randn(SHAPE, generator=draw, dtype=torch.float64) for draw in draws]
    samples = torch.stack([plain_gradient(model, image + 0.3 * noise, [2, 2]) for noise in noises])
    expected = {
        "smoothgrad": samples.mean(0),
        "smoothgrad_sq": (samples**2).mean(0),
        "vargrad": (samples**2).mean(0) - samples.mean(0) ** 2,
    }
    tunnel = NoiseTunnel(Saliency(model))
    for nt_type, value in expected.items():
        found = tunnel.attribute(image, nt_type, 4, 0.3, seed=7, target=2, abs=False)
        assert_close(found, value)


@pytest.mark.parametrize(
    ("method", "positions", "weights"),
    [
        ("gausslegendre", [0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5], [5 / 18, 8 / 18, 5 / 18]),
        ("riemann_left", [0, 1 / 3, 2 / 3], [1 / 3] * 3),
        ("riemann_middle", [1 / 6, 1 / 2, 5 / 6], [1 / 3] * 3),
        ("riemann_right", [1 / 3, 2 / 3, 1], [1 / 3] * 3),
        ("riemann_trapezoid", [0, 1 / 2, 1], [1 / 6, 1 / 3, 1 / 6]),
    ],
)
def test_integrated_gradients(
    model: StreamingModel, image: Tensor, method: str, positions: list[float], weights: list[float]
) -> None:
    gradients = [plain_gradient(model, position * image, [0, 0]) for position in positions]
    summed = torch.stack([weight * each for weight, each in zip(weights, gradients, strict=True)]).sum(0)
    options: dict[str, Any] = {"target": 0, "n_steps": 3, "method": method}
    assert_close(IntegratedGradients(model).attribute(image, **options), summed * image)
    without = IntegratedGradients(model, multiply_by_inputs=False)
    assert_close(without.attribute(image, **options), summed)


@pytest.mark.parametrize("baseline", [0.25, torch.randn(1, 3, 61, 47, dtype=torch.float64)])
def test_integrated_gradients_begin_at_a_baseline(
    model: StreamingModel, image: Tensor, baseline: float | Tensor
) -> None:
    middle = plain_gradient(model, (image + baseline) / 2, [0, 0])
    found = IntegratedGradients(model).attribute(image, baseline, 0, n_steps=1)
    assert_close(found, middle * (image - baseline))


def test_integrated_gradients_sum_to_the_difference_of_scores(model: StreamingModel, image: Tensor) -> None:
    found = IntegratedGradients(model).attribute(image, target=1, n_steps=200)
    with torch.no_grad():
        difference = model.net(image)[:, 1] - model.net(torch.zeros_like(image))[:, 1]
    torch.testing.assert_close(found.sum((1, 2, 3)), difference, rtol=1e-3, atol=1e-4)


def test_noise_around_integrated_gradients(model: StreamingModel, image: Tensor) -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = IntegratedGradients(model).attribute(image + 0.1 * noise, target=1, n_steps=3)
    found = NoiseTunnel(IntegratedGradients(model)).attribute(
        image, nt_samples=1, stdevs=0.1, target=1, n_steps=3
    )
    assert_close(found, expected)


@pytest.mark.parametrize("layer", ["stem.0", "stem.1", "stem", "body.0", "body", "last.0", "last"])
def test_grad_cam_of_every_layer(model: StreamingModel, image: Tensor, layer: str) -> None:
    activation, gradient = at_layer(model, layer, image, 2)
    expected = (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True)
    assert_close(LayerGradCam(model, layer).attribute(image, target=2), expected)


def test_grad_cam_without_what_is_negative(model: StreamingModel, image: Tensor) -> None:
    activation, gradient = at_layer(model, "body", image, 2)
    expected = (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True)
    assert expected.min() < 0 < expected.max()
    found = LayerGradCam(model, model.net.body).attribute(image, 2, relu_attributions=True)
    assert_close(found, expected.relu())


@pytest.mark.parametrize("layer", ["stem.1", "body", "last"])
def test_grad_cam_plus_plus(model: StreamingModel, image: Tensor, layer: str) -> None:
    activation, gradient = at_layer(model, layer, image, 4)
    square = gradient**2
    sums = activation.sum((2, 3), keepdim=True)
    alpha = torch.where(gradient != 0, square / (2 * square + sums * gradient**3 + 1e-6), 0)
    weights = (gradient.clamp(min=0) * alpha).sum((2, 3), keepdim=True)
    expected = (weights * activation).sum(1, keepdim=True).relu()
    assert_close(LayerGradCamPlusPlus(model, layer).attribute(image, target=4), expected)


def test_what_goes_in_besides_the_image(image: Tensor) -> None:
    model = make(WithAge())
    age = torch.randn(2, 1, dtype=torch.float64)
    wanted = image.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model.net(wanted, age).sum(), wanted)
    assert_close(Saliency(model).attribute(image, None, False, age), expected)
    assert LayerGradCam(model, "features").attribute(image, None, (age,)).shape == (2, 1, 61, 47)


def test_sources_are_preprocessed(model: StreamingModel) -> None:
    stored = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    sources = [TensorSource(each) for each in stored]
    model.preprocess = lambda tile: tile.double() / 255 - 0.5
    seen = stored.double() / 255 - 0.5
    assert_close(Saliency(model).attribute(sources, 1, abs=False), plain_gradient(model, seen, [1, 1]))
    activation, gradient = at_layer(model, "last", seen, 1)
    expected = (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True)
    assert_close(LayerGradCam(model, "last").attribute(sources, 1), expected)


def test_what_a_budget_has_no_room_for_is_refused_before_the_image_is_read(model: StreamingModel) -> None:
    class Unreadable(TensorSource):
        def _read(self, region: Any) -> Tensor:
            raise AssertionError("it was read")

    large = Unreadable(torch.zeros((), dtype=torch.float64).expand(3, 2000, 2000))
    gradient = 3 * 2000 * 2000 * 8
    model.tile, model.budget = None, 2 * gradient
    with pytest.raises(PlanDoesNotFit, match=r"1 more tensor of its size .* or use Grad-CAM") as caught:
        Saliency(model).attribute(large, target=0)
    needed = int(str(caught.value).partition("at least ")[2].split()[0])
    assert 3 * gradient < needed < 4 * gradient
    with pytest.raises(PlanDoesNotFit, match="3 more tensors of its size"):
        NoiseTunnel(Saliency(model)).attribute(large, target=0)
    model.budget = needed
    with pytest.raises(AssertionError, match="it was read"):
        Saliency(model).attribute(large, target=0)


def test_budget_holds_for_maps_of_large_images(model: StreamingModel) -> None:
    size = (1, 3, 1000, 900)
    image = torch.randn(size, dtype=torch.float64)
    model.tile, model.budget = None, 60_000_000
    plain = LayerGradCam(StreamingModel(model.net), "body").attribute(image, target=0)
    assert_close(LayerGradCam(model, "body").attribute(image, target=0), plain)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        ("stm", "calls no layer 'stm': allowed are such as 'stem'"),
        ("xyz", "calls no layer 'xyz': allowed are such as"),
        ("pool", r"returns a tensor of shape \(2, 9, 1, 1\): allowed are layers that return a map"),
        ("head", r"returns a tensor of shape \(2, 5\)"),
    ],
)
def test_wrong_layers_name_others(model: StreamingModel, image: Tensor, layer: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LayerGradCam(model, layer).attribute(image, target=0)


def test_a_layer_must_be_called_once_and_be_the_models_own(image: Tensor) -> None:
    activation = nn.Tanh()
    model = make(nn.Sequential(nn.Conv2d(3, 2, 3), activation, nn.Conv2d(2, 2, 3), activation))
    with pytest.raises(ValueError, match="layer '1' is called 2 times"):
        LayerGradCam(model, activation).attribute(image, target=(0, 1, 1))
    with pytest.raises(ValueError, match="this Conv2d is no layer of the model"):
        LayerGradCam(model, nn.Conv2d(3, 2, 3))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (5, r"target=5: the model returns a tensor of shape \(2, 5\): allowed are 0 to 4"),
        (-1, "allowed are 0 to 4"),
        (None, "target=None: .* give the class to explain"),
        ([1, 2, 3], "target has 3 classes: allowed is one for each of 2 images"),
        ((1, 2), r"target=\(1, 2\): .* allowed are 1 indices"),
    ],
)
def test_wrong_targets_say_what_is_allowed(
    model: StreamingModel, image: Tensor, target: Any, text: str
) -> None:
    for attribute in (Saliency(model).attribute, LayerGradCam(model, "last").attribute):
        with pytest.raises(ValueError, match=text):
            attribute(image, target)


class _ReturnsADict(Branched):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


def test_results_that_are_no_tensor_are_refused(image: Tensor) -> None:
    with pytest.raises(UnsupportedModel, match="the model returns a dict: allowed is one tensor"):
        Saliency(StreamingModel(_ReturnsADict().double().eval(), tile=20)).attribute(image, target=0)


def test_images_that_the_model_cannot_take_are_refused(model: StreamingModel) -> None:
    with pytest.raises(UnsupportedModel, match=r"the model fails for an image of shape \(1, 4, 30, 30\)"):
        LayerGradCam(model, "last").attribute(torch.zeros(1, 4, 30, 30, dtype=torch.float64), target=0)
    with pytest.raises(UnsupportedModel, match=r"the image has 4 channels, and the model's layer .* takes"):
        LayerGradCam(model, "last").attribute(torch.zeros(1, 4, 30, 30, dtype=torch.float64), target=0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m, x: NoiseTunnel(Saliency(m)).attribute(x, "mean", target=0), "nt_type='mean': allowed"),
        (lambda m, x: NoiseTunnel(Saliency(m)).attribute(x, nt_samples=0, target=0), "nt_samples=0: allowed"),
        (lambda m, x: IntegratedGradients(m).attribute(x, target=0, method="simpson"), "method='simpson'"),
        (lambda m, x: IntegratedGradients(m).attribute(x, target=0, n_steps=0), "n_steps=0: allowed are 1"),
        (
            lambda m, x: IntegratedGradients(m).attribute(x, torch.zeros(3, 4), 0),
            r"baselines has shape \(3, 4\): allowed are those that broadcast",
        ),
    ],
)
def test_wrong_options_say_what_is_allowed(
    model: StreamingModel, image: Tensor, call: Callable[[StreamingModel, Tensor], Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        call(model, image)


@pytest.mark.slow
def test_an_image_of_the_benchmark_with_a_residual_network(tmp_path: Path) -> None:
    for _ in generate(
        tmp_path, Spec(0, Recipe.BALANCED, 1000), load_digits("uci"), num_train=1, num_test=0, workers=0
    ):
        pass
    stored = TileStore(tmp_path)
    pixels = stored.source(stored.records[0]).read(Region.whole((1000, 1000)))
    image = pixels[None].double() / 255 * 2 - 1
    net = load_model("resnet18", num_classes=28, in_chans=1).double()
    with torch.no_grad():
        net(image[..., :512, :512])  # moves the running statistics
    model = StreamingModel(net.eval(), "600MB", tile=384)
    activation, gradient = at_layer(model, "layer3", image, 7)
    expected = (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True)
    assert_close(LayerGradCam(model, "layer3").attribute(image, 7), expected)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = NoiseTunnel(Saliency(model)).attribute(image, nt_samples=1, stdevs=0.3, target=7)
    assert_close(found, plain_gradient(model, image + 0.3 * noise, [7]).abs())
