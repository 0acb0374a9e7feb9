"""Blocks that switch something on or off for a part of the forward pass, and parametrised weights."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from benchmarks.compatibility.case import (
    SAME_OR_REFUSED,
    TILE,
    WIDTH,
    Applied,
    Cases,
    Record,
    Small,
    between,
    passes,
)

CASES = Cases("Blocks and parametrised weights")


# --- gradients on and off -----------------------------------------------------------------------------


class Frozen(Small):
    """A frozen backbone in front of a trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Conv2d(WIDTH, WIDTH, 3)

    def middle(self, x: Tensor) -> Tensor:
        return self.after(x)

    def maps(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().maps(x)


@CASES("no_grad around a frozen backbone", passes(2))
class FrozenBackbone(Frozen):
    pass


@CASES("no_grad around a backbone in eval mode", passes(2))
def frozen_in_eval() -> nn.Module:
    net = Frozen()
    net.norm.eval()
    return net


@CASES("no_grad around a part that is batch norm's", passes(2))
class FrozenNorm(Small):
    def maps(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        with torch.no_grad():
            gate = torch.sigmoid(self.norm(x))
        return x * gate


@CASES("an EMA teacher moved and run under no_grad", passes(3))
class Teacher(Small):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.conv).requires_grad_(False)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.conv.parameters(), strict=True):
                ours.mul_(0.9).add_(theirs, alpha=0.1)
            target = torch.tanh(self.teacher(x)).mean((2, 3))
        v = self.maps(x).mean((2, 3))
        return self.head(v), F.mse_loss(v, target)


@CASES("enable_grad inside no_grad", passes(2))
class EnabledInside(Small):
    def maps(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv(x)
            with torch.enable_grad():
                return self.norm(x)


@CASES("set_grad_enabled by a flag", between(lambda net: setattr(net, "trained", False)))
class SetGradEnabled(Small):
    trained = True

    def maps(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.trained):
            return super().maps(x)


@CASES("a function decorated with no_grad raises, and the error is caught", passes(2))
class RaisesInBlock(Small):
    def middle(self, x: Tensor) -> Tensor:
        @torch.no_grad()
        def fails(x: Tensor) -> Tensor:
            raise ValueError(x.shape)

        try:
            return fails(x)
        except ValueError:
            return torch.tanh(x)


@CASES("a function decorated with enable_grad is called inside no_grad", passes(2))
class CalledInBlock(Small):
    def middle(self, x: Tensor) -> Tensor:
        @torch.enable_grad()
        def cosine(x: Tensor) -> Tensor:
            return torch.cos(x)

        with torch.no_grad():
            y, factor = cosine(x), torch.sin(x)
        return y * x + factor


@CASES("one no_grad() object, inside and outside of another", passes(2))
class OneBlockTwice(Small):
    def middle(self, x: Tensor) -> Tensor:
        block = torch.no_grad()
        with block:
            a = torch.cos(x)
        with torch.no_grad():
            with block:
                b = torch.tanh(x)
            c = torch.exp(x)
        return a * x + b + c


@CASES("a generator decorated with no_grad", passes(2))
class DecoratedGenerator(Small):
    def middle(self, x: Tensor) -> Tensor:
        @torch.no_grad()
        def harmonics() -> Iterator[Tensor]:
            for k in (1, 2):
                yield torch.cos(k * x)

        return x * sum(harmonics())


@CASES("set_grad_enabled as a call", passes(2), expected=SAME_OR_REFUSED)
class SetGradCall(Small):
    def maps(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        x = self.conv(x)
        torch.set_grad_enabled(before)
        return self.norm(x)


@CASES("inference_mode around a gate", expected=SAME_OR_REFUSED)
class InferenceInside(Small):
    def middle(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            gate = torch.sigmoid(x)
        return x * gate.clone()


@CASES("no_grad inside a list of blocks", passes(2))
class SomeFrozen(Small):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))

    def middle(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            with torch.set_grad_enabled(index != 1):
                x = x + torch.tanh(block(x.detach() if index == 1 else x))
        return x


# --- autocast -----------------------------------------------------------------------------------------


class Cast(Small):
    """A part of the pass under an autocast of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.extra = nn.Conv2d(WIDTH, WIDTH, 3)

    def middle(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", **self.options):
            x = self.extra(x)
        return x.float()


def _under_autocast(model: Any, net: nn.Module, record: Record) -> None:
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            record.run(model)


HALF = {"dtype": torch.float32, "tolerance": 3e-2}
CASES.add("autocast(bfloat16) inside", lambda: Cast(dtype=torch.bfloat16), passes(2), **HALF)
CASES.add(
    "autocast(float16) inside autocast(bfloat16)", lambda: Cast(dtype=torch.float16), _under_autocast, **HALF
)


class OnlyWide(Cast):
    """Float32 alone: in bfloat16, a thousand and one is a thousand."""

    def __init__(self) -> None:
        super().__init__(enabled=False)

    def middle(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            wide = F.conv2d(x.float() * 0 + 1000, self.extra.weight * 0 + 0.001) * WIDTH * 9
            x = self.extra(x.float())
        return x + (wide - wide.bfloat16().float()) * 100


CASES.add("autocast(enabled=False) inside autocast", OnlyWide, _under_autocast, **HALF)
CASES.add(
    "autocast(enabled=False) without autocast",
    lambda: Cast(enabled=False),
    dtype=torch.float32,
    tolerance=1e-3,
)


@CASES("a part in float32 of a bfloat16 net", passes(2), dtype=torch.bfloat16, tolerance=1e-1)
class Widened(Small):
    def late(self, v: Tensor) -> Tensor:
        return F.softmax(v.float(), -1).to(v.dtype)


@CASES("a part in float64", passes(2), dtype=torch.float32, tolerance=1e-3)
class Doubled(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x.double().sigmoid().float()


# --- parametrised weights -----------------------------------------------------------------------------


class Parametrised(Small):
    """A convolution whose weight something computes."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.extra = wrap(nn.Conv2d(WIDTH, WIDTH, 3, padding=1))

    def middle(self, x: Tensor) -> Tensor:
        return self.extra(x)


class Symmetric(nn.Module):
    """Weights that are their own mirror image."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(-1)) / 2


def _symmetric(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def _weight_normed(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(layer)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.nn.utils.spectral_norm": torch.nn.utils.spectral_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "torch.nn.utils.weight_norm": _weight_normed,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "a parametrization of its own": _symmetric,
}
for name, wrapper in WRAPPERS.items():
    CASES.add(name, lambda wrapper=wrapper: Parametrised(wrapper), passes(3))

CASES.add(
    "parametrizations.spectral_norm, train and eval",
    lambda: Parametrised(parametrizations.spectral_norm),
    between(lambda net: net.eval(), lambda net: net.train()),
)
CASES.add(
    "a parametrization is removed",
    lambda: Parametrised(_symmetric),
    between(lambda net: parametrize.remove_parametrizations(net.extra, "weight")),
)


def _cached_parametrization(model: Any, net: nn.Module, record: Record) -> None:
    for _ in range(2):
        with parametrize.cached():
            record.run(model)


CASES.add("parametrize.cached() around a pass", lambda: Parametrised(_symmetric), _cached_parametrization)


@CASES("weight standardisation", passes(2))
class Standardised(Small):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv2d(WIDTH, WIDTH, 3)

    def middle(self, x: Tensor) -> Tensor:
        weight = self.extra.weight
        mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (weight - mean) / (std + 1e-5), self.extra.bias)


@CASES("a weight that is pruned", passes(2))
def pruned() -> nn.Module:
    net = Parametrised(lambda layer: layer)
    prune.l1_unstructured(net.extra, "weight", amount=0.3)
    return net


@CASES("a kernel computed from the image (dynamic filters)", passes(2), expected=SAME_OR_REFUSED)
class DynamicFilter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(WIDTH, WIDTH * 9)

    def middle(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        kernels = self.make(x.mean((2, 3))).view(n * c, 1, 3, 3)
        return F.conv2d(x.reshape(1, n * c, height, width), kernels, groups=n * c, padding=1).view_as(x)


# --- torch.func and higher-order operators ------------------------------------------------------------


def _conditional(x: Tensor) -> Tensor:
    return torch.cond(x.mean() > -1e9, lambda t: t * 2, lambda t: t.sin(), (x,))


CASES.on_map("torch.cond on a map", _conditional, expected=SAME_OR_REFUSED)
CASES.on_vector("torch.cond on features", _conditional, expected=SAME_OR_REFUSED)
CASES.on_vector("torch.vmap over features", torch.vmap(lambda v: v * v.sum()))
CASES.on_map("torch.vmap over a map's images", torch.vmap(lambda x: torch.tanh(x) * 2))


class FunctionalInside(Small):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv2d(WIDTH, WIDTH, 3)

    def middle(self, x: Tensor) -> Tensor:
        halved = {name: p / 2 for name, p in self.extra.named_parameters()}
        return torch.func.functional_call(self.extra, halved, (x,))


CASES.add("functional_call inside", FunctionalInside, passes(2))


# --- Python around operators --------------------------------------------------------------------------


@contextlib.contextmanager
def _noted(log: list[str], name: str) -> Iterator[None]:
    log.append(f"enter {name}")
    try:
        yield
    finally:
        log.append(f"exit {name}")


@CASES("a contextlib manager in forward", passes(2))
def context_manager() -> tuple[nn.Module, list[str]]:
    log: list[str] = []

    def middle(x: Tensor) -> Tensor:
        with _noted(log, "middle"):
            return torch.tanh(x)

    return Applied(middle), log


def _by_generator(x: Tensor) -> Tensor:
    parts = (part * (index + 1) for index, part in enumerate(x.split(2, 1)))
    return torch.cat([a + b for a, b in zip(parts, x.split(2, 1), strict=True)], 1)


def _by_exception(x: Tensor) -> Tensor:
    try:
        return x.view(-1, 7, 11, 13)
    except RuntimeError:
        return torch.tanh(x)


def _by_recursion(x: Tensor, depth: int = 3) -> Tensor:
    return x if depth == 0 else torch.tanh(_by_recursion(x, depth - 1)) + 0.1 * x


def _matched(x: Tensor) -> Tensor:
    match x.shape:
        case (1, *_):
            return x
        case (2, channels, *_):
            return x / channels
    raise ValueError(x.shape)


CASES.on_map("generators, zip and enumerate", _by_generator)
CASES.on_map("try and except", _by_exception)
CASES.on_map("recursion", _by_recursion)
CASES.on_map("match on the shape", _matched)
CASES.on_map("a lambda layer", lambda x: x * torch.sigmoid(1.702 * x))
CASES.on_map("with torch.profiler.record_function", lambda x: _profiled(x))


def _profiled(x: Tensor) -> Tensor:
    with torch.profiler.record_function("middle"):
        return torch.tanh(x)


@CASES("modules that take *args and **kwargs", passes(2))
class Variadic(Small):
    class Block(nn.Module):
        def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
            return sum(args) * kwargs.get("scale", 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def middle(self, x: Tensor) -> Tensor:
        return self.block(x, torch.tanh(x), scale=0.5)


class Pair(nn.Module):
    """Passes a tuple on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, skip = pair
        return self.layer(x) + skip, x


@CASES("nn.Sequential that passes tuples", passes(2))
class TuplePassing(Small):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Pair(nn.Conv2d(WIDTH, WIDTH, 3, padding=1)) for _ in range(2)))

    def middle(self, x: Tensor) -> Tensor:
        return sum(self.blocks((x, torch.tanh(x))))


@CASES("lazy modules", passes(2), expected=SAME_OR_REFUSED)
class Lazy(Small):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.LazyConv2d(WIDTH, 3)

    def middle(self, x: Tensor) -> Tensor:
        return self.extra(x)


@CASES("lazy modules that a plain pass initialised", passes(2))
def initialised_lazy() -> nn.Module:
    net = Lazy()
    net(torch.rand(1, 3, TILE, TILE))
    return net


@CASES("a scripted submodule", passes(2), expected=SAME_OR_REFUSED)
class Scripted(Small):
    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.jit.script(nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), nn.Tanh()))

    def middle(self, x: Tensor) -> Tensor:
        return self.extra(x)


@CASES("a submodule compiled with backend='eager'", passes(2), expected=SAME_OR_REFUSED)
class Compiled(Small):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), nn.Tanh())
        self.extra.compile(backend="eager")

    def middle(self, x: Tensor) -> Tensor:
        return self.extra(x)


# --- dropped at random --------------------------------------------------------------------------------


def _drop_path(rate: float) -> Callable[[Tensor], Tensor]:
    def drop(x: Tensor) -> Tensor:
        keep = 1 - rate
        mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep)
        return x + torch.tanh(x) * mask / keep

    return drop


def _floored(x: Tensor) -> Tensor:
    keep = 0.8
    mask = (keep + torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device)).floor_()
    return x + torch.tanh(x).div(keep) * mask


DRAWN = {"shape": (5, 3, 17, 23)}
CASES.on_map("DropPath, rate 0.5, by bernoulli_", _drop_path(0.5), passes(3), **DRAWN)
CASES.on_map("DropPath, rate 0.2, by bernoulli_", _drop_path(0.2), passes(3), **DRAWN)
CASES.on_map("DropPath by floor_ of rand", _floored, passes(3), **DRAWN)
CASES.on_map("stochastic depth by torch.bernoulli of a number", lambda x: _by_number(x), passes(3), **DRAWN)
CASES.on_map("functional dropout, p=0", lambda x: F.dropout(x, 0.0), passes(2))
CASES.on_map("functional dropout, training=False", lambda x: F.dropout(x, 0.5, training=False), passes(2))
CASES.on_vector("dropout of features", lambda v: F.dropout(v, 0.5), passes(3))
CASES.on_map("dropout of whole channels", lambda x: F.dropout2d(x, 0.5), passes(3), expected=SAME_OR_REFUSED)


def _by_number(x: Tensor) -> Tensor:
    survives = torch.bernoulli(torch.tensor(0.5, dtype=x.dtype))
    return x + survives * torch.tanh(x)


def _in_eval(model: Any, net: nn.Module, record: Record) -> None:
    model.eval()
    record.run(model)
    with torch.no_grad():
        record.run(model, backward=False)


@CASES("Dropout and DropPath layers in eval mode", _in_eval)
class Dropping(Small):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def middle(self, x: Tensor) -> Tensor:
        return self.drop(x)
