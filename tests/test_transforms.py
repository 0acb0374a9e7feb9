"""Forward mode, torch.func and batches of gradients: refused by name, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from failure_cases import assert_unchanged, everything_of, make_image, make_model
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from streamcnn import StreamingModel, UnsupportedModel

# PyTorch's own forward mode calls it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def _parameters(model: StreamingModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


TRANSFORMS: dict[str, Callable[[StreamingModel, Tensor], object]] = {
    "grad": lambda model, image: torch.func.grad(lambda given: functional_call(model, given, (image,)).sum())(
        _parameters(model)
    ),
    "vjp": torch.func.vjp,
    "jvp": lambda model, image: torch.func.jvp(model, (image,), (image,)),
    "jacrev": lambda model, image: torch.func.jacrev(model)(image),
    "vmap": lambda model, image: torch.vmap(model)(image[None]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_a_transform_is_refused(transform: Callable[[StreamingModel, Tensor], object]) -> None:
    model = make_model().eval()
    before = everything_of(model)
    with pytest.raises(UnsupportedModel, match=r"inside of a transform of torch\.func"):
        transform(model, make_image())
    assert_unchanged(before, everything_of(model))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_a_trace_is_refused() -> None:
    model = make_model().eval()
    with pytest.raises(UnsupportedModel, match=r"torch\.jit\.trace\(\)"):
        torch.jit.trace(model, make_image())


def test_a_tangent_of_the_image_is_refused() -> None:
    model = make_model()
    before = everything_of(model)
    image = make_image()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(image, torch.ones_like(image))
        with pytest.raises(UnsupportedModel, match="the image has a tangent"):
            model(dual)
    assert_unchanged(before, everything_of(model))


def test_a_tangent_of_a_parameter_is_refused() -> None:
    model = make_model()
    given = _parameters(model)
    with forward_ad.dual_level():
        given["0.weight"] = forward_ad.make_dual(given["0.weight"], torch.ones_like(given["0.weight"]))
        with pytest.raises(UnsupportedModel, match=r"'.*weight' has a tangent"):
            functional_call(model, given, (make_image(),))


def test_forward_mode_around_a_pass_without_tangents() -> None:
    model = make_model()
    with forward_ad.dual_level():
        model(make_image()).sum().backward()
    assert model.net[0].weight.grad.norm() > 0


def test_a_batch_of_gradients_is_refused() -> None:
    model = make_model().eval()
    image = make_image().requires_grad_()
    output = model(image)
    many = torch.eye(output.numel(), dtype=output.dtype).view(-1, *output.shape)
    with pytest.raises(UnsupportedModel, match=r"without is_grads_batched=True, and jacobian\(\)"):
        torch.autograd.grad(output, image, many, is_grads_batched=True)
