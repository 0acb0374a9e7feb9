"""A capture does not outlive what Dynamo does not guard: what comes later, methods, orders of entries."""

from __future__ import annotations

import argparse
import time
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamcnn import StreamingModel

settings = types.ModuleType("settings")


class Options:
    """A configuration whose entries are its attributes."""

    def __init__(self, **options: Any) -> None:
        vars(self).update(options)

    def __contains__(self, name: str) -> bool:
        return name in vars(self)

    def get(self, name: str, default: float) -> float:
        return vars(self).get(name, default)


def _helper() -> None:
    """A function, for attributes to be set on."""


class Net(nn.Module):
    def __init__(self, look: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.look = look
        self.options: Any = Options(other=1.0)
        self.namespace = argparse.Namespace(other=1.0)
        self.ordered: Any = OrderedDict()
        self.plain: dict[str, float] = {}
        self.all = [self.plain]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) * (2.0 if self.look(self) else 1.0)


def _caught(net: Any) -> bool:
    try:
        return bool(net.options.scale)
    except AttributeError:
        return False


def _set_options(net: Any) -> None:
    net.options.scale = 3.0


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], object]]] = {
    "in vars of a module": (lambda net: "scale" in vars(net), lambda net: setattr(net, "scale", 3.0)),
    "get from vars of a module": (lambda net: vars(net).get("scale"), lambda net: setattr(net, "scale", 3.0)),
    "in vars of an object": (lambda net: "scale" in vars(net.options), _set_options),
    "in an object": (lambda net: "scale" in net.options, _set_options),
    "get of an object": (lambda net: net.options.get("scale", 0.0), _set_options),
    "how many an object has": (lambda net: len(vars(net.options)) > 1, _set_options),
    "an AttributeError": (_caught, _set_options),
    "another object in its place": (
        lambda net: "scale" in net.options,
        lambda net: setattr(net, "options", Options(scale=3.0)),
    ),
    "in a Namespace": (
        lambda net: "scale" in net.namespace,
        lambda net: setattr(net.namespace, "scale", 3.0),
    ),
    "hasattr of a Python module": (
        lambda net: hasattr(settings, "scale"),
        lambda net: setattr(settings, "scale", 3.0),
    ),
    "hasattr of a function": (
        lambda net: hasattr(_helper, "scale"),
        lambda net: setattr(_helper, "scale", 3.0),
    ),
    "an empty OrderedDict": (lambda net: net.ordered, lambda net: net.ordered.update(scale=3.0)),
    "an empty dict in a list": (lambda net: any(net.all), lambda net: net.plain.update(scale=3.0)),
}


@pytest.mark.parametrize(("look", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_what_comes_after_a_capture_is_seen(
    look: Callable[[Any], Any], change: Callable[[Any], object]
) -> None:
    for place in (settings, _helper):
        vars(place).pop("scale", None)
    net = Net(look)
    model = StreamingModel(net, tile=16)
    image = torch.rand(1, 3, 29, 37)
    before, again = model(image), model(image)
    change(net)
    torch.testing.assert_close(again, before)
    torch.testing.assert_close(model(image), 2 * before)


def test_an_order_that_changes_is_seen() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factors = OrderedDict(one=1.0, two=2.0)
            self.among = {"factors": self.factors}

        def forward(self, x: Tensor) -> Tensor:
            return x * next(iter(self.factors.values())) * next(iter(self.among["factors"].values()))

    net = First()
    model = StreamingModel(net, tile=16)
    image = torch.rand(1, 3, 29, 37)
    torch.testing.assert_close(model(image), image)
    net.factors.move_to_end("one")
    torch.testing.assert_close(model(image), 4 * image)
    net.factors.move_to_end("two")
    torch.testing.assert_close(model(image), image)


class Base:
    """Has methods of every kind, of which some are replaced."""

    __slots__ = ()

    def factor(self) -> float:
        return 1.0

    @property
    def proportion(self) -> float:
        return 1.0

    @classmethod
    def of_class(cls) -> float:
        return 1.0

    def __getitem__(self, name: str) -> float:
        return 1.0


class Slotted(Base):
    __slots__ = ()


class Derived(Base):
    pass


METHODS: dict[str, tuple[Callable[[Any], float], Any]] = {
    "factor": (lambda helper: helper.factor(), lambda self: 3.0),
    "proportion": (lambda helper: helper.proportion, property(lambda self: 3.0)),
    "of_class": (lambda helper: helper.of_class(), classmethod(lambda cls: 3.0)),
    "__getitem__": (lambda helper: helper["factor"], lambda self, name: 3.0),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [Derived, Slotted])
@pytest.mark.parametrize("inherited", [True, False])
def test_a_method_of_a_helper_that_is_replaced_is_seen(
    name: str, kind: type, inherited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, replacement = METHODS[name]

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.helper = kind()

        def forward(self, x: Tensor) -> Tensor:
            return x * read(self.helper)

    model = StreamingModel(Scaled(), tile=16)
    image = torch.rand(1, 3, 29, 37)
    torch.testing.assert_close(model(image), image)
    monkeypatch.setattr(Base if inherited else kind, name, replacement, raising=False)
    torch.testing.assert_close(model(image), 3 * image)
    monkeypatch.undo()
    torch.testing.assert_close(model(image), image)


class Kind(type):
    """A metaclass, whose attributes and methods its classes have."""

    scale = 1.0

    def factor(cls) -> float:
        return 1.0


class OfKind(metaclass=Kind):
    pass


KIND: dict[str, tuple[Callable[[Any], float], Any]] = {
    "scale": (lambda kind: kind.scale, 3.0),
    "factor": (lambda kind: kind.factor(), lambda cls: 3.0),
    "__getattr__": (lambda kind: getattr(kind, "other", 1.0), lambda cls, name: 3.0),
}


@pytest.mark.parametrize("name", KIND)
@pytest.mark.parametrize("of_module", [True, False])
def test_what_a_metaclass_has_is_seen_when_it_changes(
    name: str, of_module: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, replacement = KIND[name]

    class Scaled(nn.Module, metaclass=Kind):
        def forward(self, x: Tensor) -> Tensor:
            return x * read(type(self) if of_module else OfKind)

    model = StreamingModel(Scaled(), tile=16)
    image = torch.rand(1, 3, 29, 37)
    torch.testing.assert_close(model(image), image)
    monkeypatch.setattr(Kind, name, replacement, raising=False)
    torch.testing.assert_close(model(image), 3 * image)
    monkeypatch.undo()
    torch.testing.assert_close(model(image), image)


def test_a_hook_of_all_modules_is_seen_when_it_comes_and_goes() -> None:
    def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return 2 * output if isinstance(module, nn.Conv2d) else None

    model = StreamingModel(Net(lambda net: False), tile=16)
    image = torch.rand(1, 3, 29, 37)
    before = model(image)
    hook = nn.modules.module.register_module_forward_hook(doubled)
    try:
        hooked = model(image)
    finally:
        hook.remove()
    torch.testing.assert_close(hooked, 2 * before)
    torch.testing.assert_close(model(image), before)


class Scaled(nn.Module):
    """A layer that is scaled if it says by how much."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if hasattr(self, "scale") else x * 1.0


@pytest.mark.parametrize("is_guarded", [True, False])
def test_a_module_that_is_compiled_inside(is_guarded: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.compiled = torch.compile(Scaled(), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            if not is_guarded:
                time.perf_counter()  # Dynamo does not follow it.
            return self.compiled(self.conv(x)).mean((2, 3))

    net = Net()
    model = StreamingModel(net, tile=16)
    image = torch.rand(1, 3, 29, 37)
    expected = net.conv(image).mean((2, 3))
    torch.testing.assert_close(model(image), expected)
    net.compiled._orig_mod.scale = 3.0
    torch.testing.assert_close(model(image), 3 * expected)
    del net.compiled._orig_mod.scale
    torch.testing.assert_close(model(image), expected)
