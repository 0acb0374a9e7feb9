"""What a forward pass leaves in the module and in the world outside."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.compatibility.case import (
    SAME_OR_REFUSED,
    WIDTH,
    Cases,
    Record,
    Small,
    backpropagate,
    passes,
    seed_everything,
)

CASES = Cases("What forward leaves behind")


# --- features that are kept ---------------------------------------------------------------------------


@CASES("self.features = map", passes(2), expected=SAME_OR_REFUSED)
class KeepsMap(Small):
    features: Any = None

    def middle(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(x)
        return self.features


@CASES("self.features = map.detach()", passes(2), expected=SAME_OR_REFUSED)
class KeepsDetachedMap(KeepsMap):
    def middle(self, x: Tensor) -> Tensor:
        self.features = x.detach()
        return x


@CASES("self.mean = self.mean.type_as(map)", passes(2))
class KeepsType(Small):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.full((1, WIDTH, 1, 1), 0.3)

    def middle(self, x: Tensor) -> Tensor:
        self.mean = self.mean.type_as(x)
        return x - self.mean


@CASES("self.features = vector", passes(2), expected=SAME_OR_REFUSED)
class KeepsVector(Small):
    features: Any = None

    def late(self, v: Tensor) -> Tensor:
        self.features = v
        return v


@CASES("self.features = vector.detach()", passes(2), expected=SAME_OR_REFUSED)
class KeepsDetachedVector(KeepsVector):
    def late(self, v: Tensor) -> Tensor:
        self.features = v.detach().clone()
        return v


@CASES("self.features = [map, vector]", passes(2), expected=SAME_OR_REFUSED)
class KeepsList(Small):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features = []
        x = F.relu(self.maps(x))
        self.features.append(x)
        v = x.mean((2, 3))
        self.features.append(v)
        return self.head(v)


@CASES("self.hidden = map, which the next pass detaches (a recurrent net)", passes(3))
class DetachedByTheNextPass(Small):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)
        self.hidden: Tensor | None = None

    def middle(self, x: Tensor) -> Tensor:
        before = torch.zeros_like(x) if self.hidden is None else self.hidden.detach()
        self.hidden = torch.tanh(self.gate(torch.cat([x, before], 1)))
        return self.hidden


@CASES("self.features[name] = vector", passes(2), expected=SAME_OR_REFUSED)
class KeepsDict(Small):
    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}

    def late(self, v: Tensor) -> Tensor:
        self.features["pooled"] = v
        return v


@CASES("a list of features grows", passes(3), expected=SAME_OR_REFUSED)
class GrowingFeatures(KeepsList):
    def forward(self, x: Tensor) -> Tensor:
        v = F.relu(self.maps(x)).mean((2, 3))
        self.features.append(v.detach())
        return self.head(v)


@CASES("a map kept in a closure's list", passes(2), expected=SAME_OR_REFUSED)
def map_in_closure() -> tuple[nn.Module, list[Tensor]]:
    kept: list[Tensor] = []

    class Keeping(Small):
        def middle(self, x: Tensor) -> Tensor:
            kept.append(x)
            return x

    return Keeping(), kept


@CASES("a forward hook stores a map into a dict", passes(2), expected=SAME_OR_REFUSED)
def hook_into_dict() -> tuple[nn.Module, dict[str, Tensor]]:
    net, kept = Small(), {}
    net.norm.register_forward_hook(lambda module, inputs, output: kept.update(norm=output))
    return net, kept


@CASES("a forward hook stores features into a dict", passes(2), expected=SAME_OR_REFUSED)
def small_hook_into_dict() -> tuple[nn.Module, dict[str, Tensor]]:
    net, kept = Small(), {}
    net.head.register_forward_pre_hook(lambda module, inputs: kept.update(pooled=inputs[0]))
    return net, kept


@CASES("a forward hook stores into self", passes(2), expected=SAME_OR_REFUSED)
def hook_into_self() -> nn.Module:
    net = Small()
    net.norm.register_forward_hook(lambda module, inputs, output: setattr(module, "seen", output.detach()))
    return net


@CASES("a forward hook stores shapes", passes(2))
def hook_of_shapes() -> tuple[nn.Module, dict[str, Any]]:
    net, shapes = Small(), {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda m, i, o, name=name: shapes.update({name: tuple(o.shape)}))
    return net, shapes


@CASES("a hook that counts calls by module", passes(2))
def hook_that_counts() -> tuple[nn.Module, dict[str, int]]:
    net, counts = Small(), defaultdict(int)

    def count(module: nn.Module, inputs: Any) -> None:
        counts[type(module).__name__] += 1

    for module in net.modules():
        module.register_forward_pre_hook(count)
    return net, counts


def _loss_on_features(model: Any, net: Any, record: Record) -> None:
    for index in range(2):
        record.mark()
        image = record.image(index)
        out = model(image)
        kept = record.world["pooled"]
        (out.square().sum() + kept.pow(3).sum()).backward()
        record(f"output {index}", out)
        record.gradients(f"gradient {index}", image)


CASES.add("a loss on hooked features", small_hook_into_dict, _loss_on_features, expected=SAME_OR_REFUSED)


@CASES("a loss is accumulated in self.aux_loss", passes(2), expected=SAME_OR_REFUSED)
class AuxiliaryLoss(Small):
    aux_loss: Any = 0.0

    def middle(self, x: Tensor) -> Tensor:
        self.aux_loss = 0.0
        self.aux_loss = self.aux_loss + x.abs().mean()
        return x


def _trained_with_auxiliary(model: Any, net: Any, record: Record) -> None:
    for index in range(2):
        record.mark()
        image = record.image(index)
        out = model(image)
        (out.square().sum() + net.aux_loss).backward()
        record(f"output {index}", out)
        record.gradients(f"gradient {index}", image)


CASES.add("training with self.aux_loss", AuxiliaryLoss, _trained_with_auxiliary, expected=SAME_OR_REFUSED)


# --- caches -------------------------------------------------------------------------------------------


def _grid(height: int, width: int, like: Tensor) -> Tensor:
    rows = torch.linspace(-1, 1, height, dtype=like.dtype, device=like.device)
    columns = torch.linspace(-1, 1, width, dtype=like.dtype, device=like.device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]


def _shapes_in_turn(model: Any, net: Any, record: Record) -> None:
    for shape in ((2, 3, 29, 37), (1, 3, 23, 41), (2, 3, 29, 37)):
        record.run(model, shape=shape)


@CASES("a cache of grids keyed by shape", _shapes_in_turn)
class CachedGrid(Small):
    def __init__(self) -> None:
        super().__init__()
        self.grids: dict[tuple[int, int], Tensor] = {}

    def middle(self, x: Tensor) -> Tensor:
        key = (x.shape[2], x.shape[3])
        if key not in self.grids:
            self.grids[key] = _grid(*key, x)
        return x + self.grids[key].sum(1, keepdim=True)


@CASES("a cached grid is made when the shape changes", _shapes_in_turn)
class RemadeGrid(Small):
    grid: Any = None

    def middle(self, x: Tensor) -> Tensor:
        if self.grid is None or self.grid.shape[-2:] != x.shape[-2:]:
            self.grid = _grid(x.shape[2], x.shape[3], x)
        return x + self.grid.sum(1, keepdim=True)


@functools.lru_cache(maxsize=8)
def _cached_positions(height: int, width: int) -> Tensor:
    return torch.arange(height)[:, None] / height + torch.arange(width)[None] / width


def _clear_and_run(model: Any, net: Any, record: Record) -> None:
    _cached_positions.cache_clear()
    _shapes_in_turn(model, net, record)
    # Others that call it must find values.
    record("cached", _cached_positions(29, 37))


@CASES("lru_cache'd positions", _clear_and_run)
class LruCached(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x + _cached_positions(x.shape[2], x.shape[3]).to(x)


@CASES("self.last_shape", _shapes_in_turn)
class LastShape(Small):
    last_shape: Any = None

    def middle(self, x: Tensor) -> Tensor:
        self.last_shape = x.shape
        self.last_size = x.numel()
        return x


@CASES("functools.cached_property", passes(2))
class CachedProperty(Small):
    @functools.cached_property
    def scale(self) -> Tensor:
        return torch.linspace(1, 2, WIDTH, dtype=torch.float64).view(1, -1, 1, 1)

    def middle(self, x: Tensor) -> Tensor:
        return x * self.scale


# --- buffers ------------------------------------------------------------------------------------------


@CASES("a buffer that is None is set in forward", passes(3))
class NoneBuffer(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", None)

    def late(self, v: Tensor) -> Tensor:
        if self.center is None:
            self.center = v.detach().mean(0)
        return v - self.center


class Averaging(Small):
    """Keeps a moving average of the pooled vector."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.linspace(0, 1, WIDTH))

    def update(self, mean: Tensor) -> None:
        raise NotImplementedError

    def late(self, v: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.update(v.mean(0))
        return v - self.average


@CASES("an EMA buffer by copy_", passes(3))
class ByCopy(Averaging):
    def update(self, mean: Tensor) -> None:
        self.average.copy_(0.9 * self.average + 0.1 * mean)


@CASES("an EMA buffer by lerp_", passes(3))
class ByLerp(Averaging):
    def update(self, mean: Tensor) -> None:
        self.average.lerp_(mean, 0.1)


@CASES("an EMA buffer by mul_().add_()", passes(3))
class ByMulAdd(Averaging):
    def update(self, mean: Tensor) -> None:
        self.average.mul_(0.9).add_(mean, alpha=0.1)


@CASES("an EMA buffer by .data", passes(3))
class ByData(Averaging):
    def update(self, mean: Tensor) -> None:
        self.average.data = 0.9 * self.average.data + 0.1 * mean


@CASES("a buffer is reassigned", passes(3))
class Reassigned(Averaging):
    def update(self, mean: Tensor) -> None:
        self.average = self.average * 0.9 + 0.1 * mean


@CASES("a buffer is read, then changed", passes(3))
class ReadThenChanged(Averaging):
    def late(self, v: Tensor) -> Tensor:
        out = v - self.average
        with torch.no_grad():
            self.average += 0.1 * v.mean(0)
        return out


@CASES("a tensor attribute is averaged", passes(3), expected=SAME_OR_REFUSED)
class AveragedAttribute(Small):
    def __init__(self) -> None:
        super().__init__()
        self.average = torch.zeros(WIDTH, dtype=torch.float64)

    def late(self, v: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * v.detach().mean(0)
        return v - self.average


@CASES("a parameter changes in forward under no_grad", passes(2), expected=SAME_OR_REFUSED)
class MovingParameter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def late(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            self.center.mul_(0.9).add_(0.1 * v.mean(0))
        return v - self.center


def _attended(v: Tensor, bank: Tensor) -> Tensor:
    return F.softmax(v @ bank.T, -1) @ bank


@CASES("a memory bank written at an index", passes(3))
class MemoryBank(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(6, WIDTH))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, v: Tensor) -> None:
        start = int(self.pointer)
        self.queue[start : start + len(v)] = v
        self.pointer[0] = (start + len(v)) % len(self.queue)

    def late(self, v: Tensor) -> Tensor:
        out = v + _attended(v, self.queue.clone())
        self.enqueue(v)
        return out


@CASES("a memory bank whose pointer is a Python number", passes(4))
class PythonMemoryBank(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(6, WIDTH))
        self.pointer = 0

    def late(self, v: Tensor) -> Tensor:
        out = v + _attended(v, self.queue.clone())
        with torch.no_grad():
            self.queue[self.pointer : self.pointer + len(v)] = v
        self.pointer = (self.pointer + len(v)) % len(self.queue)
        return out


@CASES("a memory bank that is shifted by cat", passes(3))
class ShiftedBank(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(6, WIDTH))

    def late(self, v: Tensor) -> Tensor:
        out = v + _attended(v, self.queue)
        self.queue = torch.cat([self.queue[len(v) :], v.detach()])
        return out


@CASES("a map-sized buffer is averaged", passes(2), expected=SAME_OR_REFUSED)
class MapBuffer(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("background", torch.zeros(1, WIDTH, 29, 37))

    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.background.lerp_(x.mean(0, keepdim=True), 0.1)
        return x - self.background


@CASES("statistics of the image's brightness", passes(2))
class Brightness(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += x.shape[0]
            self.total += x.mean((0, 2, 3))
        return super().forward(x - (self.total / self.seen).view(1, -1, 1, 1))


@CASES("a first batch that initialises (ActNorm)", passes(3), expected=SAME_OR_REFUSED)
class ActNorm(Small):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, WIDTH, 1, 1))
        self.ready = False

    def middle(self, x: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.shift.copy_(-x.mean((0, 2, 3), keepdim=True))
            self.ready = True
        return x + self.shift


# --- things that are made -----------------------------------------------------------------------------


@CASES("a module without parameters is made in forward", passes(2))
class MakesModule(Small):
    def middle(self, x: Tensor) -> Tensor:
        return nn.LeakyReLU(0.3)(nn.AvgPool2d(2)(x))


@CASES("self.act = module in forward", passes(2))
class KeepsModule(Small):
    def middle(self, x: Tensor) -> Tensor:
        self.act = nn.LeakyReLU(0.3)
        return self.act(x)


@CASES("a layer with parameters is made in the first forward", passes(2), expected=SAME_OR_REFUSED)
class MakesLayer(Small):
    def __init__(self) -> None:
        super().__init__()
        self.extra = None

    def middle(self, x: Tensor) -> Tensor:
        if self.extra is None:
            self.extra = nn.Conv2d(x.shape[1], WIDTH, 3).to(x)
        return self.extra(x)


@CASES("a convolution with drawn weights is made in every forward", passes(2), expected=SAME_OR_REFUSED)
class MakesThrownAwayLayer(Small):
    def middle(self, x: Tensor) -> Tensor:
        return nn.Conv2d(WIDTH, WIDTH, 3).to(x)(x)


@CASES("a lazily made constant", passes(2))
class LazyConstant(Small):
    kernel: Any = None

    def middle(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            self.kernel = torch.ones(WIDTH, 1, 3, 3, dtype=x.dtype) / 9
        return F.conv2d(x, self.kernel, groups=WIDTH)


@CASES("an attribute is set and deleted", passes(2))
class SetAndDeleted(Small):
    def middle(self, x: Tensor) -> Tensor:
        self.kept = x
        out = torch.tanh(self.kept)
        del self.kept
        return out


@CASES("a weight is another one for one call: deleted, set, deleted, set", passes(3))
class OtherWeight(Small):
    def late(self, v: Tensor) -> Tensor:
        own = self.head.weight
        del self.head.weight
        self.head.weight = 2 * own
        v = torch.tanh(v) + self.head(v).mean(1, keepdim=True)
        del self.head.weight
        self.head.weight = own
        return v


@CASES("a method is another one for a while", passes(2))
class OtherMethod(Small):
    def act(self, x: Tensor) -> Tensor:
        return torch.sin(x)

    def middle(self, x: Tensor) -> Tensor:
        y = self.act(x)
        self.act = torch.cos
        y = y * self.act(x)
        del self.act
        return y + self.act(x)


@CASES("a cache that moves what it used to its end", passes(3))
class LeastRecent(Small):
    def __init__(self) -> None:
        super().__init__()
        self.cache = OrderedDict(a=1.0, b=2.0, c=4.0)

    def middle(self, x: Tensor) -> Tensor:
        oldest = next(iter(self.cache))
        self.cache.move_to_end(oldest)
        return x * self.cache[oldest]


@CASES("a flag that restores itself", passes(2))
class Restores(Small):
    def __init__(self) -> None:
        super().__init__()
        self.busy = False

    def middle(self, x: Tensor) -> Tensor:
        self.busy = True
        try:
            return x * (2 if self.busy else 1)
        finally:
            self.busy = False


@CASES("an ordered dict of what was called", passes(2))
def called_names() -> tuple[nn.Module, OrderedDict[str, int]]:
    called: OrderedDict[str, int] = OrderedDict()

    class Calls(Small):
        def middle(self, x: Tensor) -> Tensor:
            called["middle"] = called.get("middle", 0) + 1
            return x

        def late(self, v: Tensor) -> Tensor:
            called["late"] = called.get("late", 0) + 1
            return v

    return Calls(), called


def _accumulates(model: Any, net: Any, record: Record) -> None:
    images = [record.image(index) for index in range(2)]
    for index, image in enumerate(images):
        record.mark()
        seed_everything(index)
        out = model(image)
        record(f"output {index}", out)
        backpropagate(out, index)
    record.gradients("accumulated gradient", *images)


CASES.add("gradients accumulate over two passes", ByLerp, _accumulates)
