"""More than an image goes in."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.compatibility.case import SAME_OR_REFUSED, WIDTH, Cases, Record, Small, Steps, given

CASES = Cases("More than an image goes in")


def vector(width: int = WIDTH, *, grad: bool = True, seed: int = 0) -> Callable[[Record], Tensor]:
    """Makes a clinical vector (N, width) for the images of a case."""

    def make(record: Record) -> Tensor:
        generator = torch.Generator().manual_seed(100 + seed)
        drawn = torch.randn(record.case.shape[0], width, generator=generator, dtype=torch.float64)
        return drawn.to(record.case.dtype).requires_grad_(grad)

    return make


def maps(channels: int, *, grad: bool = False, seed: int = 0) -> Callable[[Record], Tensor]:
    """Makes a map (N, channels, H, W) of the images' extents."""

    def make(record: Record) -> Tensor:
        n, _, height, width = record.case.shape
        return record.image(200 + seed, (n, channels, height, width), grad=grad)

    return make


def named(**makers: Callable[[Record], Any]) -> Callable[[Record], dict[str, Any]]:
    """Makes keyword arguments."""
    return lambda record: {name: make(record) for name, make in makers.items()}


def valued(*values: Any) -> Steps:
    """One pass for every plain value of the second argument."""
    return given(*((lambda record, value=value: (value,)) for value in values))


# --- vectors ------------------------------------------------------------------------------------------


class Clinical(Small):
    """Joins a vector to the pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, clinical: Tensor | None = None) -> Tensor:
        v = F.relu(self.maps(x)).mean((2, 3))
        if clinical is not None:
            v = self.join(torch.cat([v, clinical], 1))
        return self.head(v)


CASES.add("a clinical vector, positional", Clinical, given(vector(grad=False)))
CASES.add("a clinical vector with a gradient", Clinical, given(vector()))
CASES.add("a clinical vector by keyword, with a gradient", Clinical, given(named(clinical=vector())))
CASES.add("a clinical vector of other values", Clinical, given(vector(), vector(seed=1), vector(seed=2)))
CASES.add(
    "a vector, None, and no vector", Clinical, given(vector(), lambda record: (None,), lambda record: ())
)
CASES.add(
    "a vector with and without a gradient", Clinical, given(vector(grad=False), vector(), vector(grad=False))
)


def _changed_in_place(model: Any, net: nn.Module, record: Record) -> None:
    clinical = vector(grad=False)(record)
    for _ in range(3):
        record.run(model, clinical)
        clinical.mul_(2)


CASES.add("a vector that is changed in place between passes", Clinical, _changed_in_place)


def _computed(model: Any, net: nn.Module, record: Record) -> None:
    torch.manual_seed(5)
    encoder = nn.Linear(3, WIDTH).to(record.case.dtype)
    raw = vector(3)(record)
    record.run(model, encoder(raw))
    record("the encoder's gradients", {name: p.grad for name, p in encoder.named_parameters()})
    record("the raw vector's gradient", raw.grad)


CASES.add("a vector that another module computes", Clinical, _computed)


class AnyShape(Small):
    """Takes a vector of any width and type."""

    def forward(self, x: Tensor, clinical: Tensor) -> Tensor:
        v = F.relu(self.maps(x)).mean((2, 3))
        return self.head(v * clinical.to(v).mean(1, keepdim=True) if clinical.dim() == 2 else v + clinical)


CASES.add(
    "a vector of another shape, then of another type",
    AnyShape,
    given(
        vector(3),
        vector(5),
        lambda record: torch.ones((), dtype=torch.float64),
        lambda record: torch.arange(8).view(2, 4),
        vector(3),
    ),
)


class Film(Small):
    """Scales and shifts a map by what a vector says."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.maps(x)
        x = x * self.gamma(condition)[..., None, None] + self.beta(condition)[..., None, None]
        return self.head(F.relu(x).mean((2, 3)))


CASES.add("FiLM conditioning", Film, given(vector(5), vector(5, seed=1)))


class ClassConditional(Small):
    """Adds the embedding of a class index to a map."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(10, WIDTH)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.head(F.relu(self.maps(x) + self.classes(label)[..., None, None]).mean((2, 3)))


def _labels(*numbers: int) -> Callable[[Record], Tensor]:
    return lambda record: torch.tensor(numbers)


CASES.add("an integer class index and an embedding", ClassConditional, given(_labels(3, 7), _labels(1, 1)))


# --- numbers, texts, structures -----------------------------------------------------------------------


class Scaled(Small):
    def forward(self, x: Tensor, scale: Any = 1.0) -> Tensor:
        return self.head(F.relu(self.maps(x) * (1.0 if scale is None else scale)).mean((2, 3)))


class Selected(Small):
    def forward(self, x: Tensor, mode: Any = "mean", *, squared: bool = False) -> Tensor:
        x = F.relu(self.maps(x))
        v = x.mean((2, 3)) if mode == "mean" else x.amax((2, 3))
        return self.head(v.square() if squared else v)


class Mode(enum.Enum):
    """How to pool."""

    MEAN = "mean"
    MAX = "max"


class ByEnum(Selected):
    def forward(self, x: Tensor, mode: Mode) -> Tensor:  # type: ignore[override]
        return super().forward(x, mode.value)


CASES.add("a float, three values in turn", Scaled, valued(0.5, 3.0, 0.5))
CASES.add("an int, then a float, then None", Scaled, valued(2, 2.0, None, True))


def _squared(model: Any, net: nn.Module, record: Record) -> None:
    for squared in (False, True):
        record.run(model, squared=squared)


CASES.add("a bool by keyword", Selected, _squared)
CASES.add("a string", Selected, valued("mean", "max", "mean"))
CASES.add("an enum", ByEnum, valued(Mode.MEAN, Mode.MAX))


@CASES("a tuple of numbers", valued((3, 5), (7, 2)))
class Resized(Small):
    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.head(F.relu(F.adaptive_max_pool2d(self.maps(x), size)).mean((2, 3)))


def _patient(seed: int) -> Callable[[Record], tuple[Any]]:
    return lambda r: ({"age": vector(1, seed=seed)(r), "genes": [vector(seed=seed + 5)(r)]},)


@CASES("a dict of tensors", given(_patient(0), _patient(1)))
class WithDict(Small):
    def forward(self, x: Tensor, patient: dict[str, Any]) -> Tensor:
        v = F.relu(self.maps(x)).mean((2, 3))
        return self.head(v * patient["age"] + patient["genes"][0])


@dataclass
class Patient:
    """A structure of a caller's own."""

    genes: Tensor
    age: float


@CASES(
    "a dataclass",
    given(*((lambda r, age=age: (Patient(vector(grad=False)(r), age),)) for age in (0.5, 2.0))),
    expected=SAME_OR_REFUSED,
)
class WithDataclass(Small):
    def forward(self, x: Tensor, patient: Patient) -> Tensor:
        v = F.relu(self.maps(x)).mean((2, 3))
        return self.head(v * patient.age + patient.genes)


@CASES("*args of any number", given(lambda r: (), vector(), lambda r: (vector()(r), vector(seed=1)(r))))
class Variadic(Small):
    def forward(self, x: Tensor, *vectors: Tensor) -> Tensor:
        return self.head(F.relu(self.maps(x)).mean((2, 3)) + sum(vectors))


@CASES("**kwargs of any name", given(named(a=vector()), named(b=vector(), c=vector(seed=1))))
class Keywords(Small):
    def forward(self, x: Tensor, **vectors: Tensor) -> Tensor:
        return self.head(F.relu(self.maps(x)).mean((2, 3)) + sum(v * len(k) for k, v in vectors.items()))


@CASES("targets, and the loss is computed in forward", given(_labels(1, 3), _labels(0, 2)))
class WithLoss(Small):
    def forward(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(x)
        return {"logits": logits} if target is None else {"loss": F.cross_entropy(logits, target)}


@CASES(
    "a function", given(lambda record: (torch.tanh,), lambda record: (torch.sin,)), expected=SAME_OR_REFUSED
)
class WithFunction(Small):
    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        return self.head(activation(self.maps(x)).mean((2, 3)))


# --- maps ---------------------------------------------------------------------------------------------


@CASES("a mask of the image's extents", given(maps(1), maps(1, seed=1)))
class Masked(Small):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(F.relu(self.maps(x) * torch.sigmoid(mask)).mean((2, 3)))


CASES.add("a mask with a gradient", Masked, given(maps(1, grad=True)))


@CASES("a boolean mask", given(lambda record: maps(1)(record) > 0))
class MaskedByTruth(Small):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = F.relu(self.maps(x)).masked_fill(mask, 0)
        return self.head(x.sum((2, 3)) / mask.sum((2, 3)))


@CASES("a map of coordinates, joined by cat", given(maps(2)))
class WithCoordinates(Small):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, WIDTH, 3, bias=False)

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        return super().forward(torch.cat([x, coordinates], 1))


CASES.add(
    "a map of one image for all", Masked, given(lambda record: record.image(9, (1, 1, 29, 37), grad=False))
)


class TwoImages(Small):
    """A second image with its own stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU())

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.head(F.relu(self.maps(x)).mean((2, 3)) + self.stem(other).amax((2, 3)))


def _other_image(height: int, width: int) -> Callable[[Record], Tensor]:
    return lambda record: record.image(7, (record.case.shape[0], 1, height, width))


CASES.add("a second image of another size", TwoImages, given(_other_image(19, 13)))
CASES.add(
    "a second image of several sizes in turn", TwoImages, given(_other_image(19, 13), _other_image(23, 31))
)


class Siamese(Small):
    """Two images through one net."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        first, second = (super(Siamese, self).forward(image) for image in (x, other))
        return (first - second).square() + first


def _twice_the_same(model: Any, net: nn.Module, record: Record) -> None:
    image = record.image()
    record.run(model, image, image=image)


CASES.add("a second image that is the first", Siamese, _twice_the_same)
CASES.add("a second image of the same size", Siamese, given(lambda record: record.image(8)))


def _by_keyword(model: Any, net: nn.Module, record: Record) -> None:
    image = record.image()
    out = model(x=image, scale=2.0)
    record("output", out)
    out.square().sum().backward()
    record.gradients("gradient", image)


@CASES("the image by keyword", _by_keyword)
class ByKeyword(Small):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x * scale)


def _wrong_arguments(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model, 2.0)
    record.mark()
    try:
        model(record.image(), 1.0, 2.0, 3.0)
    except TypeError:
        record("TypeError", True)


CASES.add("too many arguments", Scaled, _wrong_arguments, expected=SAME_OR_REFUSED)


class Filling(Small):
    """Puts vectors into a list and a dict that the caller gives."""

    def forward(self, x: Tensor, found: list[Tensor], options: dict[str, Any]) -> Tensor:
        v = F.relu(self.maps(x) * options["weight"]).mean((2, 3))
        found.append(v)
        options["count"] += 1
        options["total"].add_(v.detach().sum())
        options["sine"] = v.detach().sin()
        return self.head(v)


def fill(model: Any, net: nn.Module, record: Record) -> None:
    """Passes that fill a list and a dict, and gradients of what is in them."""
    weight = torch.full((1,), 0.5, dtype=record.case.dtype, requires_grad=True)
    options: dict[str, Any] = {"weight": weight, "count": 0, "total": torch.zeros_like(weight)}
    found: list[Tensor] = []
    for number in range(3):
        record.run(model, found, options, backward=False)
        found[-1].square().sum().backward(retain_graph=True)
        record(f"list {number}", found)
        record(f"dict {number}", options)
        record(f"the same tensor {number}", options["weight"] is weight)
        record.gradients(f"gradients {number}", options)


CASES.add("a list and a dict that forward fills", Filling, fill)


class Boxes(Small):
    """Pools a box of each image: rows and columns where it begins and ends."""

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        maps = F.relu(self.maps(x))
        parts = [part[:, box[0] : box[2], box[1] : box[3]] for part, box in zip(maps, boxes, strict=True)]
        return self.head(torch.stack([part.amax((1, 2)) for part in parts]) + maps.mean((2, 3)))


CASES.add(
    "boxes, of which the slices of maps are taken",
    Boxes,
    given(
        lambda record: torch.tensor([[2, 3, 20, 30], [0, 5, 9, 17]]),
        lambda record: torch.tensor([[1, 0, 5, 37], [11, 30, 29, 36]]),
    ),
)
