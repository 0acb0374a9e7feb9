"""Code that Dynamo does not follow, and what it must not lose: a timer stands in front of each thing."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.compatibility.case import SAME_OR_REFUSED, WIDTH, Cases, Record, Small, given, passes
from benchmarks.compatibility.cases.arguments import Filling, fill

CASES = Cases("Code that Dynamo does not follow")


class Timed(Small):
    """Reads the clock, as many nets do to log how long they take."""

    def maps(self, x: Tensor) -> Tensor:
        # A flag, and not the time itself: two runs must leave the same.
        self.began = time.perf_counter() > 0
        return super().maps(x)


class TimedAverage(Timed):
    """Keeps an average of the map's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))

    def averaged(self, x: Tensor) -> Tensor:
        """The average (C) after a map (N, C, H, W)."""
        return 0.9 * self.average + 0.1 * x.detach().mean((0, 2, 3))


@CASES("a timer", passes(2))
class TimerAlone(Timed):
    pass


@CASES("a timer, and try view, except RuntimeError: reshape", passes(2))
class TimedView(Timed):
    def middle(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        try:
            flat = y.view(x.shape[0], -1)
        except RuntimeError:
            flat = 2 * y.reshape(x.shape[0], -1)
        return x + flat.mean(1)[:, None, None, None]


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, seen: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@CASES("a TorchDispatchMode of its own that lists operators", expected="enters _Operators")
class OwnDispatchMode(Small):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def middle(self, x: Tensor) -> Tensor:
        with _Operators(self.seen):
            return torch.tanh(x)


def _under_inference(model: Any, net: nn.Module, record: Record) -> None:
    with torch.inference_mode():
        record("output", model(record.image(grad=False)).clone())
    record("buffers", dict(net.named_buffers()))


CASES.add("a timer, inference_mode around", Timed, _under_inference)


# --- functions and kinds of tensors -------------------------------------------------------------------


class Sign(torch.autograd.Function):
    """The sign, with a gradient that only its own backward gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


_sign = Sign.apply


@CASES("a timer, and autograd.Function by its class", passes(2))
class TimedFunction(Timed):
    def middle(self, x: Tensor) -> Tensor:
        return Sign.apply(x) + x


class Saturating(Sign):
    """It saves its own result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y) * 2


@CASES("a timer, and autograd.Function that saves its result", passes(2))
class TimedSaturating(Timed):
    def middle(self, x: Tensor) -> Tensor:
        return Saturating.apply(x) + x


class Counting(Sign):
    """It counts its calls."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Counting.calls += 1
        return x * Counting.calls


def _counted_from_0(model: Any, net: nn.Module, record: Record) -> None:
    Counting.calls = 0
    for _ in range(2):
        record.run(model)
    record("calls", Counting.calls)


@CASES("autograd.Function that counts its calls", _counted_from_0, expected="changes what is outside of it")
class Counted(Small):
    def middle(self, x: Tensor) -> Tensor:
        return Counting.apply(x)


class Printing(Sign):
    """It prints."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        print("shape", *x.shape)
        return x * 2


@CASES("autograd.Function that prints", passes(2))
class Printed(Small):
    def middle(self, x: Tensor) -> Tensor:
        return Printing.apply(x)


class Jittering(Sign):
    """It draws a number from Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * random.random()


@CASES("autograd.Function that draws from Python", passes(2), expected="draws numbers from Python")
class Jittered(Small):
    def middle(self, x: Tensor) -> Tensor:
        return Jittering.apply(x) * random.random()


@CASES("a timer, and autograd.Function by an alias of apply", passes(2), expected=SAME_OR_REFUSED)
class TimedAlias(Timed):
    def middle(self, x: Tensor) -> Tensor:
        return _sign(x) + x


class Silent(torch.autograd.Function):
    """A sine whose forward says once more that it records no gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.sin()
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0].cos()


@CASES("a timer, and no_grad in the forward of an autograd.Function", passes(2))
class TimedSilent(Timed):
    def middle(self, x: Tensor) -> Tensor:
        return Silent.apply(x)


class Nested(torch.autograd.Function):
    """A sine of cubes, whose gradient comes of a graph that forward has made and kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = x.pow(3).sin()
        ctx.save_for_backward(x, y)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        return torch.autograd.grad(y, x, gradient)[0]


@CASES("an autograd.Function that keeps a graph of its own", passes(2))
class KeepsGraph(Small):
    def middle(self, x: Tensor) -> Tensor:
        return Nested.apply(x)


@CASES("a timer, and record_function", passes(2))
class TimedProfile(Timed):
    def middle(self, x: Tensor) -> Tensor:
        with torch.profiler.record_function("middle"):
            return x.sin()


# --- states -------------------------------------------------------------------------------------------


@CASES("a timer, and a buffer is reassigned", passes(2))
class TimedReassigned(TimedAverage):
    def middle(self, x: Tensor) -> Tensor:
        self.average = self.averaged(x)
        return x - self.average[:, None, None]


@CASES("a timer, and a buffer's .data is assigned", passes(2))
class TimedBufferData(TimedAverage):
    def middle(self, x: Tensor) -> Tensor:
        self.average.data = self.averaged(x)
        return x - self.average[:, None, None]


@CASES("a timer, and a buffer by _foreach_mul_", passes(2))
class TimedForeach(Timed):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("decay", torch.ones(WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        torch._foreach_mul_([self.decay], 0.5)
        return x * self.decay[:, None, None]


@CASES("a timer, and a buffer that is None is set", passes(2))
class TimedNoneBuffer(Timed):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", None)

    def middle(self, x: Tensor) -> Tensor:
        if self.center is None:
            self.center = x.detach().mean((0, 2, 3))
        return x - self.center[:, None, None]


@CASES("a timer, and a norm with momentum=None", passes(3))
class TimedMomentum(Timed):
    def __init__(self) -> None:
        super().__init__()
        self.norm.momentum = None


@CASES("a timer, and a parameter's .data is assigned", passes(2))
class TimedParameterData(Timed):
    def middle(self, x: Tensor) -> Tensor:
        self.head.weight.data = self.head.weight.data * 0.5
        return x


@CASES("a timer, and a parameter is replaced", passes(2), expected=SAME_OR_REFUSED)
class TimedParameter(Timed):
    def middle(self, x: Tensor) -> Tensor:
        self.head.bias = nn.Parameter(self.head.bias.detach() * 0.5)
        return x


@CASES("a timer, and a parameter is made in the first forward", passes(3), expected=SAME_OR_REFUSED)
class TimedNewParameter(Timed):
    def middle(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(WIDTH, dtype=x.dtype))
        return x * self.scale[:, None, None]


@CASES("a timer, and self.features[name] = vector", passes(2))
class TimedFeatures(Timed):
    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}

    def middle(self, x: Tensor) -> Tensor:
        self.features["pooled"] = x.mean((2, 3))
        return x


class _Parts(NamedTuple):
    name: str
    value: Tensor
    more: tuple[Tensor, ...] = ()


@CASES("a timer, and tensors are kept in tuples", passes(2))
class TimedTuples(Timed):
    def __init__(self) -> None:
        super().__init__()
        self.kept: tuple[Any, ...] = ()
        self.by_name: dict[str, Any] = {}

    def middle(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3)).detach()
        self.kept = ((("pooled", pooled), ("twice", pooled * 2)), None, [pooled], pooled.max(1))
        self.by_name["parts"] = _Parts("parts", pooled.sin(), (pooled, x.detach()))
        return x


def _held_with_gradient(model: Any, net: Any, record: Record) -> None:
    clinical = torch.linspace(0, 1, 2 * WIDTH, dtype=torch.float64).view(2, WIDTH).requires_grad_()
    net.clinical = clinical * 2
    record.run(model)
    record("clinical gradient", clinical.grad)


@CASES("a timer, and self.clinical = vector with a gradient", _held_with_gradient)
class TimedClinical(Timed):
    def late(self, v: Tensor) -> Tensor:
        return v * self.clinical


@CASES("a timer, and a sample of torch.distributions that nothing reads", passes(2))
class TimedSample(Timed):
    def middle(self, x: Tensor) -> Tensor:
        concentration = torch.tensor(0.4, dtype=torch.float64)
        torch.distributions.Beta(concentration, concentration).sample()
        return x * torch.rand((), dtype=x.dtype)


# --- results and transforms ---------------------------------------------------------------------------


@dataclass
class _Found:
    logits: Tensor
    more: Any


class TimedDataclass(Timed):
    def forward(self, x: Tensor) -> Any:
        v = self.maps(x).mean((2, 3))
        return _Found(self.head(v), {"pooled": v, "inner": _Found(v.sin(), None)})


CASES.add("a timer, and the result is a dataclass with a dict and another", TimedDataclass, passes(2))


class TimedObject(Timed):
    def forward(self, x: Tensor) -> Any:
        return torch.distributions.Categorical(logits=super().forward(x))


def _likelihood(model: Any, net: nn.Module, record: Record) -> None:
    loss = -model(record.image()).log_prob(torch.tensor([1, 2])).sum()
    loss.backward()
    record("loss", loss)
    record.gradients("gradients")


CASES.add("a timer, and the result is a distribution", TimedObject, _likelihood, expected="returns an object")


@CASES("a timer, and vmap of jacrev of features", expected=r"a transform of torch\.func")
class TimedJacobian(Timed):
    def late(self, v: Tensor) -> Tensor:
        jacobians = torch.vmap(torch.func.jacrev(torch.tanh))(v)
        return v + jacobians.square().sum(2)


# --- arguments ----------------------------------------------------------------------------------------


class TimedFilling(Filling):
    def maps(self, x: Tensor) -> Tensor:
        self.began = time.perf_counter() > 0
        return super().maps(x)


CASES.add("a timer, and a list and a dict that forward fills", TimedFilling, fill)


@CASES("a timer, and x.new(size) of a size's part")
class TimedNew(Timed):
    def late(self, v: Tensor) -> Tensor:
        return v * v.new(v.size()[1:]).fill_(2).sum()


def _penalised(model: Any, net: Any, record: Record) -> None:
    image = record.image()
    (model(image).sum() + net.penalty()).backward()
    record.gradients("gradients", image)


class TimedClosure(Timed):
    def late(self, v: Tensor) -> Tensor:
        weight = self.head.weight
        self.penalty = lambda: weight.square().sum()
        return v


CASES.add("a timer, and a closure keeps a weight", TimedClosure, _penalised, expected="leaves a tensor")


class Sized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, size: torch.Size) -> Tensor:
        ctx.size = size
        return v * v.new(size).fill_(1).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * grads[0].new(ctx.size).fill_(1).sum(), None


@CASES("a timer, and sizes are an argument and a Function's operand", given(lambda _: (torch.Size([3]),)))
class TimedSize(Timed):
    def forward(self, x: Tensor, size: torch.Size) -> Any:
        v = Sized.apply(self.maps(x).mean((2, 3)), x.size()[2:])
        return self.head(v) * v.new(size).fill_(1).sum()
