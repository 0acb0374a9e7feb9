"""Images of classes that say themselves what functions do with them, as MONAI's MetaTensor does."""

from __future__ import annotations

from typing import Any

import torch
from helpers import TOLERANCE
from torch import Tensor, nn

from streamcnn import StreamingModel


class Placed(Tensor):
    """A tensor with the place that it was taken at, which results of functions of it have as well."""

    place: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs)
        if isinstance(found, Placed):
            found.place = next(each.place for each in args if isinstance(each, Placed))
        return found


class Deaf(Tensor):
    """A tensor whose functions are those of a table."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "streamed":
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs)


class Two(nn.Module):
    """Scores and a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x).relu()
        return {"scores": self.head(y.mean((2, 3))), "map": y, "size": tuple(y.shape)}


def placed(seed: int = 0) -> Placed:
    image: Any = torch.randn(2, 3, 29, 37, dtype=torch.float64).as_subclass(Placed)
    image.place = f"slide {seed}"
    return image


def test_results_are_what_the_class_makes_of_them() -> None:
    torch.manual_seed(0)
    net, image = Two().double(), placed()
    model = StreamingModel(net, tile=16)
    plain, streamed = net(image), model(image)
    assert streamed["size"] == plain["size"]
    for name in ("scores", "map"):
        assert type(streamed[name]) is type(plain[name]) is Placed
        assert streamed[name].place == "slide 0"
        error = (streamed[name] - plain[name]).as_subclass(Tensor).abs().max()
        assert error < TOLERANCE
    assert model(placed(1))["map"].place == "slide 1"


def test_gradients_are_those_of_a_plain_image() -> None:
    torch.manual_seed(0)
    net, image = Two().double(), placed()
    model = StreamingModel(net, tile=16)
    found = []
    for module in (net, model):
        net.zero_grad()
        image.grad = None
        module(image.requires_grad_())["scores"].square().sum().backward()
        found.append([net.conv.weight.grad, image.grad.as_subclass(Tensor)])
    torch.testing.assert_close(found[1], found[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_a_class_may_have_no_answer() -> None:
    net, image = Two(), torch.randn(1, 3, 29, 37)
    found = StreamingModel(net, tile=16)(image.as_subclass(Deaf))["scores"]
    torch.testing.assert_close(found.as_subclass(Tensor), net(image)["scores"])
