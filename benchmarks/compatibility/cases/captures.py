"""What a forward pass reads may change between two passes."""

from __future__ import annotations

import copy
import enum
import functools
import os
import random
import types
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.compatibility.case import (
    SAME_OR_REFUSED,
    WIDTH,
    Cases,
    Record,
    Small,
    Steps,
    between,
    passes,
)

CASES = Cases("What forward reads changes between passes")


# --- containers and objects ---------------------------------------------------------------------------


class Configured(Small):
    """Scales the map by something that it holds."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.held = held

    def factor(self) -> Any:
        return self.held

    def middle(self, x: Tensor) -> Tensor:
        return x * self.factor()


@CASES("an entry of a dict", between(lambda net: net.held.update(scale=3.0)))
class DictEntry(Configured):
    def __init__(self) -> None:
        super().__init__({"scale": 1.5})

    def factor(self) -> float:
        return self.held["scale"]


@CASES("an entry of a nested dict", between(lambda net: net.held["map"]["scale"].__setitem__(0, 3.0)))
class NestedDict(Configured):
    def __init__(self) -> None:
        super().__init__({"map": {"scale": [1.5]}})

    def factor(self) -> float:
        return self.held["map"]["scale"][0]


@CASES("an entry of a list", between(lambda net: net.held.__setitem__(0, 3.0)))
class ListEntry(Configured):
    def __init__(self) -> None:
        super().__init__([1.5])

    def factor(self) -> float:
        return self.held[0]


@CASES("a list grows", between(lambda net: net.held.append(2.0)))
class ListGrows(Configured):
    def __init__(self) -> None:
        super().__init__([1.5])

    def factor(self) -> float:
        return sum(self.held)


@CASES("a set", between(lambda net: net.held.discard("scaled")))
class Set(Configured):
    def __init__(self) -> None:
        super().__init__({"scaled", "other"})

    def factor(self) -> float:
        return 3.0 if "scaled" in self.held else 1.0


@CASES("a deque", between(lambda net: net.held.append(3.0), lambda net: net.held.append(5.0)))
class Deque(Configured):
    def __init__(self) -> None:
        super().__init__(deque([1.5, 2.0], maxlen=2))

    def factor(self) -> float:
        return sum(self.held)


class Options:
    """A plain object with an attribute."""

    def __init__(self) -> None:
        self.scale = 1.5


@CASES("an object's attribute", between(lambda net: setattr(net.held, "scale", 3.0)))
class ObjectAttribute(Configured):
    def __init__(self) -> None:
        super().__init__(Options())

    def factor(self) -> float:
        return self.held.scale


class SlottedOptions:
    """An object without a dict."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.5


@CASES("an attribute in a slot", between(lambda net: setattr(net.held, "scale", 3.0)))
class SlotAttribute(ObjectAttribute):
    def __init__(self) -> None:
        super().__init__()
        self.held = SlottedOptions()


@dataclass
class Config:
    """Options as people keep them."""

    scale: float = 1.5
    layers: list[float] = field(default_factory=lambda: [1.0, 2.0])


@CASES(
    "a dataclass config",
    between(lambda net: setattr(net.held, "scale", 3.0), lambda net: net.held.layers.append(2.0)),
)
class DataclassConfig(Configured):
    def __init__(self) -> None:
        super().__init__(Config())

    def factor(self) -> float:
        return self.held.scale * sum(self.held.layers)


@CASES("a SimpleNamespace", between(lambda net: setattr(net.held, "scale", 3.0)))
class Namespace(ObjectAttribute):
    def __init__(self) -> None:
        super().__init__()
        self.held = types.SimpleNamespace(scale=1.5)


class Pooling(enum.Enum):
    """A choice."""

    PLAIN = 1
    SCALED = 2


@CASES("an enum", between(lambda net: setattr(net, "held", Pooling.SCALED)))
class EnumValue(Configured):
    def __init__(self) -> None:
        super().__init__(Pooling.PLAIN)

    def factor(self) -> float:
        return 3.0 if self.held is Pooling.SCALED else 1.0


@CASES("a float", between(lambda net: setattr(net, "held", 3.0)))
class Float(Configured):
    def __init__(self) -> None:
        super().__init__(1.5)


@CASES("None becomes a value", between(lambda net: setattr(net, "held", 3.0)))
class NoneBecomesValue(Configured):
    def factor(self) -> float:
        return 1.0 if self.held is None else self.held


@CASES("a NumPy scalar", between(lambda net: setattr(net, "held", np.float64(3.0))))
class NumpyScalar(Configured):
    def __init__(self) -> None:
        super().__init__(np.float64(1.5))

    def factor(self) -> float:
        return float(self.held)


@CASES("a NumPy array in place", between(lambda net: net.held.__setitem__(0, 3.0)))
class NumpyArray(Configured):
    def __init__(self) -> None:
        super().__init__(np.ones(WIDTH))

    def factor(self) -> Tensor:
        return torch.from_numpy(self.held.copy()).view(1, -1, 1, 1)


@CASES("a NumPy array shared with a tensor", between(lambda net: net.held.__setitem__(0, 3.0)))
class NumpyShared(NumpyArray):
    def factor(self) -> Tensor:
        return torch.from_numpy(self.held).view(1, -1, 1, 1)


@CASES("a tensor attribute is reassigned", between(lambda net: setattr(net, "held", net.held + 1)))
class TensorAttribute(Configured):
    def __init__(self) -> None:
        super().__init__(torch.linspace(1, 2, WIDTH, dtype=torch.float64).view(1, -1, 1, 1))


@CASES("a tensor attribute changes in place", between(lambda net: net.held.mul_(3)))
class TensorAttributeInPlace(TensorAttribute):
    pass


@CASES("a tensor in a dict", between(lambda net: net.held.update(scale=net.held["scale"] + 1)))
class TensorInDict(Configured):
    def __init__(self) -> None:
        super().__init__({"scale": torch.linspace(1, 2, WIDTH, dtype=torch.float64).view(1, -1, 1, 1)})

    def factor(self) -> Tensor:
        return self.held["scale"]


@CASES("a tensor attribute with a gradient", passes(2), expected=SAME_OR_REFUSED)
def tensor_with_gradient() -> tuple[nn.Module, Tensor]:
    scale = torch.linspace(1, 2, WIDTH, dtype=torch.float64).view(1, -1, 1, 1).requires_grad_()
    return Configured(scale), [scale, GradientOf(scale)]


class GradientOf:
    """Shows the gradient that a leaf outside the parameters has when it is looked at."""

    def __init__(self, leaf: Tensor) -> None:
        self._leaf = leaf

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return {"grad": self._leaf.grad}


def _set_clinical(model: Any, net: nn.Module, record: Record) -> None:
    for patient in range(3):
        net.clinical = torch.full((2, WIDTH), float(patient), dtype=torch.float64)
        record.run(model)


@CASES("self.clinical = vector before each patient", _set_clinical)
class Clinical(Small):
    clinical: Tensor

    def late(self, v: Tensor) -> Tensor:
        return v * self.clinical + self.clinical


def _set_clinical_with_gradient(model: Any, net: nn.Module, record: Record) -> None:
    for patient in range(2):
        net.clinical = torch.full((2, WIDTH), 1.0 + patient, dtype=torch.float64, requires_grad=True)
        record.run(model)
        record(f"gradient of vector {patient}", net.clinical.grad)
        net.clinical = None


@CASES("self.clinical = vector with a gradient", _set_clinical_with_gradient, expected=SAME_OR_REFUSED)
class ClinicalWithGradient(Clinical):
    pass


# --- functions, methods, classes ----------------------------------------------------------------------


def _tripled_middle(self: Small, x: Tensor) -> Tensor:
    return 3 * x


def _negated_forward(self: Small, x: Tensor) -> Tensor:
    return self.head(F.relu(-self.maps(x)).mean((2, 3)))


CASES.add(
    "a method by types.MethodType",
    Small,
    between(lambda net: setattr(net, "middle", types.MethodType(_tripled_middle, net))),
)
CASES.add(
    "net.forward itself",
    Small,
    between(lambda net: setattr(net, "forward", types.MethodType(_negated_forward, net))),
)


def _patched_class(model: Any, net: Any, record: Record) -> None:
    original = type(net).middle
    record.run(model)
    try:
        type(net).middle = _tripled_middle
        record.run(model)
    finally:
        type(net).middle = original


@CASES("a method of the class", _patched_class)
class PatchedClass(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x + 1


def _class_attribute(model: Any, net: Any, record: Record) -> None:
    record.run(model)
    try:
        type(net).scale = 3.0
        record.run(model)
    finally:
        type(net).scale = 1.5


@CASES("a class attribute", _class_attribute)
class ClassAttribute(Small):
    scale = 1.5

    def middle(self, x: Tensor) -> Tensor:
        return x * self.scale


@CASES("a property that reads something", between(lambda net: net.state.update(level=3)))
class Property(Small):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"level": 1}

    @property
    def scale(self) -> float:
        return 0.5 * self.state["level"]

    def middle(self, x: Tensor) -> Tensor:
        return x * self.scale


@CASES("an activation function", between(lambda net: setattr(net, "activation", torch.tanh)))
class Activation(Small):
    def __init__(self) -> None:
        super().__init__()
        self.activation = F.silu

    def middle(self, x: Tensor) -> Tensor:
        return self.activation(x)


@CASES(
    "a functools.partial",
    between(lambda net: setattr(net, "activation", functools.partial(F.leaky_relu, negative_slope=0.5))),
)
class Partial(Activation):
    def __init__(self) -> None:
        super().__init__()
        self.activation = functools.partial(F.leaky_relu, negative_slope=0.1)


SCALE = 1.5
"""Read in a forward pass, and changed."""


def _global_variable(model: Any, net: nn.Module, record: Record) -> None:
    global SCALE
    SCALE = 1.5
    record.run(model)
    try:
        SCALE = 3.0
        record.run(model)
    finally:
        SCALE = 1.5


@CASES("a global variable", _global_variable)
class GlobalVariable(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * SCALE


def _set_cell(model: Any, net: Any, record: Record) -> None:
    record.run(model)
    record.world["set"](3.0)
    record.run(model)


@CASES("a closure's variable", _set_cell)
def closure() -> tuple[nn.Module, dict[str, Any]]:
    scale = 1.5

    class Closed(Small):
        def middle(self, x: Tensor) -> Tensor:
            return x * scale

    def set_scale(value: float) -> None:
        nonlocal scale
        scale = value

    return Closed(), {"set": set_scale}


@CASES("a default argument", between(lambda net: type(net).middle.__defaults__[0].__setitem__(0, 3.0)))
def default_argument() -> nn.Module:
    class Default(Small):
        def middle(self, x: Tensor, scale: list[float] = [1.5]) -> Tensor:  # noqa: B006
            return x * scale[0]

    return Default()


# --- modules ------------------------------------------------------------------------------------------


CASES.add("a submodule is replaced", Small, between(lambda net: setattr(net, "norm", _other_norm())))


def _other_norm() -> nn.Module:
    return nn.GroupNorm(2, WIDTH).double()


@CASES(
    "a ModuleList grows and shrinks",
    between(
        lambda net: net.blocks.append(nn.Conv2d(WIDTH, WIDTH, 1, dtype=torch.float64)),
        lambda net: net.blocks.pop(0),
    ),
)
class GrowingList(Small):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 3)])

    def middle(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@CASES(
    "a ParameterList grows",
    between(lambda net: net.scales.append(nn.Parameter(torch.ones(1, dtype=torch.float64)))),
)
class GrowingParameters(Small):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1))])

    def middle(self, x: Tensor) -> Tensor:
        return x * sum(self.scales)


class PlainList(Small):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(WIDTH, WIDTH, 1), nn.Sequential(nn.Tanh())
        self.order = [self.first, self.second]

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x


CASES.add("modules in a plain list change order", PlainList, between(lambda net: net.order.reverse()))


def _hook_comes_and_goes(model: Any, net: Any, record: Record) -> None:
    record.run(model)
    handle = net.norm.register_forward_hook(lambda module, inputs, output: 3 * output)
    record.run(model)
    handle.remove()
    record.run(model)


def _pre_hook_comes_and_goes(model: Any, net: Any, record: Record) -> None:
    record.run(model)
    handle = net.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * inputs[0],))
    record.run(model)
    handle.remove()
    record.run(model)


CASES.add("a layer's forward hook is added and removed", Small, _hook_comes_and_goes)
CASES.add("a layer's forward pre-hook is added and removed", Small, _pre_hook_comes_and_goes)


@CASES("a hook reads a variable", between(lambda net: net.factors.__setitem__(0, 3.0)))
def hook_reads() -> nn.Module:
    net = Small()
    net.factors = [1.5]
    net.norm.register_forward_hook(lambda module, inputs, output: output * net.factors[0])
    return net


class Stochastic(Small):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def middle(self, x: Tensor) -> Tensor:
        return self.drop(x)


CASES.add(
    "one batch norm is set to eval and back",
    Small,
    between(lambda net: net.norm.eval(), lambda net: net.norm.train()),
)
CASES.add(
    "the model is set to eval and back", Small, between(lambda net: net.eval(), lambda net: net.train())
)
CASES.add(
    "a layer's option changes",
    Stochastic,
    between(lambda net: setattr(net.norm, "momentum", 0.5), lambda net: setattr(net.conv, "padding", (0, 2))),
)
CASES.add(
    "a weight is frozen and released",
    Small,
    between(
        lambda net: net.conv.weight.requires_grad_(False), lambda net: net.conv.weight.requires_grad_(True)
    ),
)
CASES.add(
    "a weight changes by an optimiser's step",
    Small,
    between(
        lambda net: net.conv.weight.data.mul_(2),
        lambda net: setattr(net.conv.weight, "data", net.conv.weight * 2),
    ),
)
CASES.add(
    "a parameter is another object",
    Small,
    between(lambda net: setattr(net.conv, "weight", nn.Parameter(2 * net.conv.weight.detach()))),
)


class Twin(Small):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))

    def middle(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


CASES.add(
    "weights are tied between passes",
    Twin,
    between(lambda net: setattr(net.second, "weight", net.first.weight)),
)


@CASES("a branch on a weight's requires_grad", between(lambda net: net.conv.weight.requires_grad_(False)))
class BranchOnFrozen(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * 3 if self.conv.weight.requires_grad else x.square()


def _image_gradient_flips(model: Any, net: nn.Module, record: Record) -> None:
    for grad in (True, False, True):
        record.run(model, image=record.image(grad=grad))


@CASES("a branch on the image's requires_grad", _image_gradient_flips)
class BranchOnImage(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(3 * x if x.requires_grad else x.square())


@CASES("a branch on a map's requires_grad", _image_gradient_flips)
class BranchOnMap(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * 3 if x.requires_grad else x.square()


# --- modes that forward asks for ----------------------------------------------------------------------


def _grad_and_no_grad(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model)
    with torch.no_grad():
        record.run(model, backward=False)
    record.run(model)
    with torch.inference_mode():
        record.run(model, image=record.image(4, grad=False), backward=False)
    record.run(model)


@CASES("a branch on is_grad_enabled and is_inference_mode_enabled", _grad_and_no_grad)
class BranchOnGradMode(Small):
    def middle(self, x: Tensor) -> Tensor:
        x = x * 3 if torch.is_grad_enabled() else x.square()
        return x + 1 if torch.is_inference_mode_enabled() else x


def _no_grad_first(model: Any, net: nn.Module, record: Record) -> None:
    with torch.no_grad():
        record.run(model, backward=False)
    record.run(model)


CASES.add("no_grad in the first pass, gradients in the second", BranchOnGradMode, _no_grad_first)


def _autocast_flips(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        record.run(model)
    record.run(model)


@CASES("a branch on is_autocast_enabled", _autocast_flips, dtype=torch.float32, tolerance=3e-2)
class BranchOnAutocast(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x.float() * (3 if torch.is_autocast_enabled("cpu") else 1)


ASKED = {
    "torch.compiler.is_compiling": torch.compiler.is_compiling,
    "torch.compiler.is_exporting": torch.compiler.is_exporting,
    "torch.compiler.is_dynamo_compiling": torch.compiler.is_dynamo_compiling,
    "torch.jit.is_tracing": torch.jit.is_tracing,
    "torch.jit.is_scripting": torch.jit.is_scripting,
    "torch.onnx.is_in_onnx_export": torch.onnx.is_in_onnx_export,
}


class Asking(Small):
    def __init__(self, question: Any) -> None:
        super().__init__()
        self.question = question

    def middle(self, x: Tensor) -> Tensor:
        return x.square() if self.question() else x * 3


for name, question in ASKED.items():
    CASES.add(f"a branch on {name}", functools.partial(Asking, question))


@CASES("a branch on the tensor's class")
class BranchOnClass(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * 3 if type(x) is Tensor else x.square()


@CASES("a branch on isinstance(x, Tensor)")
class BranchOnInstance(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * 3 if isinstance(x, Tensor) else x.square()


@CASES("a branch on is_contiguous and stride", expected=SAME_OR_REFUSED)
class BranchOnLayout(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * 3 if x.is_contiguous() and x.stride(1) == x.shape[2] * x.shape[3] else x.square()


def _two_shapes(model: Any, net: nn.Module, record: Record) -> None:
    for shape in ((2, 3, 29, 37), (1, 3, 41, 23), (2, 3, 29, 37)):
        record.run(model, shape=shape)


@CASES("a branch on x.shape, two shapes in turn", _two_shapes)
class BranchOnShape(Small):
    def middle(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        return x * (height / width) if n > 1 else F.avg_pool2d(x, 2) * width


def _two_types(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model)
    net.float()
    record.run(model, image=record.image().detach().float().requires_grad_())
    net.double()
    record.run(model)


@CASES("a branch on x.dtype, two types in turn", _two_types, tolerance=1e-4)
class BranchOnType(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * 3 if x.dtype == torch.float64 else x.square()


@CASES("an environment variable", between(lambda net: os.environ.update(COMPATIBILITY_SCALE="3")))
class Environment(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * float(os.environ.get("COMPATIBILITY_SCALE", "1.5"))


@CASES("the default dtype", between(lambda net: torch.set_default_dtype(torch.float64)))
class DefaultType(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * torch.tensor([0.1])


@CASES("the default dtype is set in forward", expected="sets the default dtype")
class SetsDefaultType(Small):
    def middle(self, x: Tensor) -> Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        factor = torch.linspace(0, 1, WIDTH)[:, None, None] * torch.tensor([0.1])
        torch.set_default_dtype(before)
        return x * factor


# --- counters and schedules ---------------------------------------------------------------------------


@CASES("self.step += 1, a counter alone", passes(5))
class Counter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def middle(self, x: Tensor) -> Tensor:
        self.step += 1
        return x


@CASES("a counter as a warm-up factor", passes(4))
class WarmUp(Counter):
    def middle(self, x: Tensor) -> Tensor:
        self.step += 1
        return x * min(1.0, self.step / 3)


@CASES("a counter that switches a branch", passes(4))
class SwitchedByCounter(Counter):
    def middle(self, x: Tensor) -> Tensor:
        self.step += 1
        return x.square() if self.step > 2 else x


@CASES("a float that is annealed", passes(4))
class Annealed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = 2.0

    def middle(self, x: Tensor) -> Tensor:
        self.temperature = max(0.5, self.temperature * 0.7)
        return x / self.temperature


@CASES("a counter in a buffer as a factor", passes(3))
class BufferCounter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def middle(self, x: Tensor) -> Tensor:
        self.step += 1
        return x * (self.step / 3)


@CASES("a counter in a submodule and in a dict", passes(3))
class DeepCounter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.head.calls = {"forward": 0}

    def late(self, v: Tensor) -> Tensor:
        self.head.calls["forward"] += 1
        return v


@CASES("self.history.append(number)", passes(3))
class History(Small):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[Any] = []

    def middle(self, x: Tensor) -> Tensor:
        self.history.append(tuple(x.shape))
        return x


@CASES("self.history.append(x.mean().item())", passes(2), expected=SAME_OR_REFUSED)
class HistoryOfValues(History):
    def middle(self, x: Tensor) -> Tensor:
        self.history.append(x.mean().item())
        return x


@CASES("a counter of a global", passes(3))
def global_counter() -> tuple[nn.Module, list[int]]:
    count = [0]

    class Counting(Small):
        def middle(self, x: Tensor) -> Tensor:
            count[0] += 1
            return x * count[0]

    return Counting(), count


def _clock(model: Any, net: Any, record: Record) -> None:
    for now in (0.0, 10.0, 20.0):
        record.world["now"] = now
        record.run(model)


@CASES("a flag that depends on the time", _clock)
def clock() -> tuple[nn.Module, dict[str, float]]:
    world = {"now": 0.0}

    class Timed(Small):
        def middle(self, x: Tensor) -> Tensor:
            return x * 3 if world["now"] > 15 else x

    return Timed(), world


@CASES("an iterator that is drawn from", passes(3))
class Drawn(Small):
    def __init__(self) -> None:
        super().__init__()
        self.levels = iter([1.0, 2.0, 3.0, 4.0])

    def middle(self, x: Tensor) -> Tensor:
        return x * next(self.levels)


# --- random draws of other generators -----------------------------------------------------------------


@CASES("random.random() as a factor", passes(3))
class PythonRandom(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * random.random()


@CASES("np.random as a factor", passes(3))
class NumpyRandom(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * float(np.random.rand())


@CASES("a generator of its own", passes(3))
class OwnRandom(Small):
    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(7)

    def middle(self, x: Tensor) -> Tensor:
        return x * self.random.uniform(0.5, 2)


@CASES("torch.rand(1) as a factor", passes(3))
class TorchRandom(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * torch.rand(1, dtype=x.dtype)


@CASES("torch.rand(1).item() as a factor", passes(3))
class TorchRandomItem(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * torch.rand(1).item()


@CASES("torch.randn per image and channel", passes(2))
class TorchRandomPerChannel(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * torch.randn(x.shape[0], x.shape[1], 1, 1, dtype=x.dtype))


CASES.on_vector(
    "whole numbers by random_(low, high)", lambda v: v * torch.empty_like(v).random_(2, 9), passes(2)
)


@CASES("torch.randperm of the batch", passes(2), expected=SAME_OR_REFUSED)
class Mixup(Small):
    def middle(self, x: Tensor) -> Tensor:
        return 0.7 * x + 0.3 * x[torch.randperm(x.shape[0])]


@CASES("layers skipped at random (layerdrop)", passes(4))
class LayerDrop(Small):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or random.random() > 0.4:
                x = x + torch.tanh(layer(x))
        return x


@CASES("layers skipped by torch.rand(1), between other draws", passes(4))
class LayerDropOfTorch(LayerDrop):
    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x * (1 + torch.rand(len(x), 1, 1, 1, dtype=x.dtype))
            if not (self.training and torch.rand(1) < 0.4):
                x = x + torch.tanh(layer(x))
        return x * torch.empty(1).uniform_(0.5, 2).item()


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x * factor * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0] * 2, None


@CASES("a value and torch.rand(1) are read behind autograd.Functions of weights", passes(3))
class ReadBehindFunction(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(1.5))

    def middle(self, x: Tensor) -> Tensor:
        bias = _Doubled.apply(self.norm.bias, self.factor)
        x = x + bias[:, None, None]
        if torch.rand(1) < 0.5:
            x = x.sin()
        return x * float(self.factor) + float(bias.detach().sum())


@CASES("dropout in front of torch.rand(1).item()", passes(2), expected="reads a value of a tensor")
class ReadBehindDropout(Small):
    def middle(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) * torch.rand(1).item()


@CASES("layers in random order", passes(4))
class Shuffled(LayerDrop):
    def middle(self, x: Tensor) -> Tensor:
        order = list(range(3))
        random.shuffle(order)
        for index in order:
            x = torch.tanh(self.layers[index](x))
        return x


def _copied_and_changed(model: Any, net: Any, record: Record) -> None:
    record.run(model)
    other = copy.deepcopy(model)
    (other.net if record.streamed else other).held["scale"] = 3.0
    record("the copy", other(record.image()))
    record.run(model)


CASES.add("a dict of a deep copy", DictEntry, _copied_and_changed)


def _replaced(place: Any, name: str) -> Steps:
    """A function of PyTorch's is wrapped, wrapped otherwise, and put back."""

    def steps(model: Any, net: Any, record: Record) -> None:
        record.run(model)
        original = getattr(place, name)
        try:
            for factor in (2.0, 3.0):
                setattr(place, name, _times(original, factor))
                record.run(model)
        finally:
            setattr(place, name, original)
        record.run(model)

    return steps


def _times(function: Any, factor: float) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs) * factor


class Activated(Small):
    """An activation as a layer, a function and a method."""

    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(F.relu(nn.ReLU()(x) - 0.5) - 0.1).relu()


CASES.add("F.relu is wrapped", Activated, _replaced(F, "relu"))
CASES.add("torch.relu is wrapped", Activated, _replaced(torch, "relu"))
CASES.add("F.batch_norm is wrapped", Activated, _replaced(F, "batch_norm"))
CASES.add("torch.conv2d is wrapped", Activated, _replaced(torch, "conv2d"))
CASES.add("Tensor.relu is wrapped", Activated, _replaced(Tensor, "relu"), expected="has replaced")
