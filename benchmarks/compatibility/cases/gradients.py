"""Gradients that are defined by code rather than derived from the forward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from benchmarks.compatibility.case import SAME_OR_REFUSED, WIDTH, Cases, Record, Small, between, passes

CASES = Cases("Gradients that code defines")


# --- torch.autograd.Function --------------------------------------------------------------------------


class Reverse(Function):
    """The identity, whose gradient is turned round: domain adaptation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.strength * gradient, None


class Sign(Function):
    """The sign with a straight-through gradient that is cut off beyond one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


class Swish(Function):
    """Memory-efficient swish with ``setup_context``, saved input and output."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, out = ctx.saved_tensors
        sigmoid = torch.sigmoid(x)
        return 2 * gradient * (out + sigmoid * (1 - out))


class Twofold(Function):
    """Two outputs whose gradients are not those of their formulas."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * first * x.cos() - 3 * second * x.sin()


class Threshold(Function):
    """A map and a mask that has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = (x > 0).to(x)
        ctx.save_for_backward(mask)
        ctx.mark_non_differentiable(mask)
        return x * mask, mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return gradient * (0.5 + mask)


class Scaled(Function):
    """A product that asks which gradients are needed, and defines them doubled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        to_x = 2 * gradient * scale if ctx.needs_input_grad[0] else None
        to_scale = 3 * (gradient * x).sum((0, 2, 3), keepdim=True) if ctx.needs_input_grad[1] else None
        return to_x, to_scale


class Clipped(Function):
    """The identity, whose gradient is divided by its own norm: a gradient that reads the whole map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / gradient.norm()


class Stop(Function):
    """A tensor changed in place and marked so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 5 * gradient


CASES.on_vector("autograd.Function: gradient reversal of features", lambda v: Reverse.apply(v, 0.7))
CASES.on_map("autograd.Function: gradient reversal of a map", lambda x: Reverse.apply(x, 0.7))
CASES.on_map("autograd.Function: straight-through sign of a map", Sign.apply)
CASES.on_vector("autograd.Function: straight-through sign of features", Sign.apply)
CASES.on_map("autograd.Function: setup_context, saved input and output", Swish.apply)
CASES.on_vector("autograd.Function: setup_context on features", Swish.apply)
CASES.on_map("autograd.Function: two outputs", lambda x: sum(Twofold.apply(x)))
CASES.on_map("autograd.Function: one of two outputs is used", lambda x: Twofold.apply(x)[1])
CASES.on_map("autograd.Function: an output without gradient", lambda x: sum(Threshold.apply(x)))
CASES.on_map(
    "autograd.Function: a gradient that reads the whole map", Clipped.apply, expected=SAME_OR_REFUSED
)
CASES.on_map(
    "autograd.Function: mark_dirty", lambda x: Stop.apply(x * 1), expected="changes its input in place"
)
CASES.on_map(
    "autograd.Function applied twice", lambda x: Reverse.apply(Reverse.apply(torch.tanh(x), 0.5), 3.0)
)


@CASES("autograd.Function: binarised weights of a convolution", passes(2))
class BinaryWeights(Small):
    def __init__(self) -> None:
        super().__init__()
        self.binary = nn.Conv2d(WIDTH, WIDTH, 3, bias=False)

    def middle(self, x: Tensor) -> Tensor:
        weight = self.binary.weight
        scale = weight.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, Sign.apply(weight) * scale)


def _scale_freezes(model: Any, net: Any, record: Record) -> None:
    record.run(model)
    net.scale.requires_grad_(False)
    record.run(model)


class Clipped(Function):
    """Clips at a number that a parameter holds, and quantises below it (PACT)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: Tensor) -> Tensor:
        ctx.save_for_backward(x, limit)
        return (x.clamp(0, limit.item()) * (15 / limit)).round() * (limit / 15)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, limit = ctx.saved_tensors
        inside = (x >= 0) & (x <= limit.item())
        return gradient * inside, (gradient * (x >= limit)).sum().view(1)


@CASES("autograd.Function: it reads a parameter's value (PACT)", passes(2))
class Quantised(Small):
    def __init__(self) -> None:
        super().__init__()
        self.limit = nn.Parameter(torch.ones(1))

    def middle(self, x: Tensor) -> Tensor:
        return Clipped.apply(x, self.limit)


class Limited(Function):
    """Clips at a limit, if a parameter says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: Tensor) -> Tensor:
        ctx.save_for_backward(x, limit)
        return x.clamp(max=float(limit)) if limit.item() > 0.2 else x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, limit = ctx.saved_tensors
        return gradient * (x < limit), gradient.sum().view(1)


@CASES("autograd.Function: it branches on a parameter's value", between(lambda net: net.limit.data.mul_(0.1)))
class Limiting(Quantised):
    def middle(self, x: Tensor) -> Tensor:
        return Limited.apply(x, self.limit)


@CASES("autograd.Function: ctx.needs_input_grad, once_differentiable", _scale_freezes)
class NeedsInputGradient(Small):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, WIDTH, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        return Scaled.apply(x, self.scale)


def _strength_grows(model: Any, net: Any, record: Record) -> None:
    for strength in (0.0, 0.5, 1.0):
        net.strength = strength
        record.run(model)


@CASES("autograd.Function: the reversal's strength grows", _strength_grows)
class GrowingReversal(Small):
    strength = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = F.relu(self.maps(x)).mean((2, 3))
        return self.head(v), Reverse.apply(v, self.strength).sum(1)


@CASES("autograd.Function: the reversal of a map grows", _strength_grows)
class GrowingMapReversal(Small):
    strength = 0.0

    def middle(self, x: Tensor) -> Tensor:
        return x + Reverse.apply(x.tanh(), self.strength)


class Weighted(Function):
    """A map weighted by channel, with an inner choice of the weights' gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, power: int) -> Tensor:
        ctx.power = power
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.power == 1:
            return gradient * 3, None
        return gradient.sign() * 3, None


def _power_changes(model: Any, net: Any, record: Record) -> None:
    for power in (1, 2, 1):
        net.power = power
        record.run(model)


@CASES("autograd.Function: code that is linear and then is not", _power_changes)
class ChangingWeights(Small):
    power = 1

    def middle(self, x: Tensor) -> Tensor:
        return Weighted.apply(x, self.power)


class Pair(Function):
    """Two results, whose gradients are None where nothing arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return x * weight, x.abs()

    @staticmethod
    def backward(ctx: Any, scaled: Tensor | None, size: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        if scaled is None:
            return size * x.sign() * 3, None
        return scaled * weight + (0 if size is None else size * x.sign()), (scaled * x).sum((0, 2, 3))[
            :, None, None
        ]


class Paired(Small):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        return Pair.apply(x, self.weight)[1]


CASES.add("autograd.Function: set_materialize_grads(False), a gradient does not arrive", Paired, passes(2))


def _without_gradients(model: Any, net: Any, record: Record) -> None:
    record.run(model)
    with torch.no_grad():
        record.run(model, backward=False)


CASES.add("autograd.Function: two results, under no_grad", Paired, _without_gradients)


class Again(Function):
    """Checkpointing by hand, as in diffusion models: the layer's parameters are given beside its input."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.parameters = layer, parameters
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.layer(x)
        return None, *torch.autograd.grad(y, (x, *ctx.parameters), gradient, allow_unused=True)


@CASES("autograd.Function: a layer is run again backward, its parameters are given", passes(2))
class RunAgain(Small):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(2, WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        return Again.apply(self.layer, x, *self.layer.parameters())


class AgainByBackward(Again):
    """The same for ``backward()`` alone, as libraries of reversible networks ask for."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("not compatible with .grad()")
        return Again.backward(ctx, gradient)


@CASES("autograd.Function: a layer is run again, in backward() alone", passes(2))
class RunAgainByBackward(RunAgain):
    def middle(self, x: Tensor) -> Tensor:
        return AgainByBackward.apply(self.layer, x, *self.layer.parameters())


class Floored(Function):
    """A gradient in steps of a thousandth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.div(gradient, 1e-3, rounding_mode="floor") * 1e-3


class Whole(Floored):
    """The same by whole numbers."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient * 1e5).to(torch.int64).to(gradient.dtype) / 1e5


class Halved(Floored):
    """The same in half precision."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.half().to(gradient.dtype)


def _blurred(function: type[Function]) -> Any:
    return lambda x: F.avg_pool2d(function.apply(x), 5, 1, 2)


CASES.on_map("autograd.Function: a gradient that is rounded, a filter behind it", _blurred(Floored))
CASES.on_map("autograd.Function: a gradient in whole numbers, a filter behind it", _blurred(Whole))
CASES.on_map("autograd.Function: a gradient in half precision, a filter behind it", _blurred(Halved))


class OwnGradient(Function):
    """A gradient that does not depend on the one that arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found: Tensor = torch.cos(ctx.saved_tensors[0])
        return found


@CASES("autograd.Function: the gradient that arrives is ignored, a convolution behind it", passes(2))
class OfOwnGradient(Small):
    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Conv2d(WIDTH, WIDTH, 5)

    def middle(self, x: Tensor) -> Tensor:
        return self.after(OwnGradient.apply(x))


# --- hooks on gradients -------------------------------------------------------------------------------


class MapHook(Small):
    def middle(self, x: Tensor) -> Tensor:
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda gradient: 2 * gradient)
        return x


class VectorHook(Small):
    def late(self, v: Tensor) -> Tensor:
        if v.requires_grad:
            v.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        return v


CASES.add("tensor.register_hook on a map", MapHook, passes(2), expected=SAME_OR_REFUSED)
CASES.add("tensor.register_hook on features", VectorHook, passes(2), expected=SAME_OR_REFUSED)


@CASES("grad_fn.name() as a factor", expected="grad_fn.name")
class NamedNode(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * len(x.grad_fn.name()) if x.grad_fn is not None else x


@CASES("a hook keeps a map's gradient (Grad-CAM)", passes(2), expected=SAME_OR_REFUSED)
class KeepsGradient(Small):
    gradient: Tensor | None = None

    def keep(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def middle(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        x.register_hook(self.keep)
        return x


def _lossy(x: Tensor) -> Tensor:
    def pack(saved: Tensor) -> Tensor:
        return saved.half()

    def unpack(packed: Tensor) -> Tensor:
        return packed.to(x.dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return x * torch.sigmoid(x)


def _doubled_at_node(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    if y.grad_fn is not None:
        y.grad_fn.register_prehook(lambda gradients: (2 * gradients[0],))
    return y


CASES.on_map("saved_tensors_hooks that keep half precision", _lossy, expected="saved_tensors_hooks")
CASES.on_map("grad_fn.register_prehook", _doubled_at_node, expected=r"calls grad_fn\.register_prehook")


@CASES("retain_grad on features", expected=SAME_OR_REFUSED)
class Retains(Small):
    def late(self, v: Tensor) -> Tensor:
        v = v * 2
        v.retain_grad()
        return v


@CASES("a full backward hook that changes gradients", passes(2), expected=SAME_OR_REFUSED)
def full_backward_hook() -> nn.Module:
    net = Small()
    net.norm.register_full_backward_hook(lambda module, to_input, to_output: (2 * to_input[0],))
    return net


@CASES("a full backward hook that only looks", passes(2), expected=SAME_OR_REFUSED)
def looking_backward_hook() -> tuple[nn.Module, list[Tensor]]:
    net, seen = Small(), []
    net.head.register_full_backward_hook(lambda module, to_input, to_output: seen.append(to_output[0].sum()))
    return net, seen


@CASES("a full backward pre-hook", passes(2), expected=SAME_OR_REFUSED)
def full_backward_pre_hook() -> nn.Module:
    net = Small()
    net.norm.register_full_backward_pre_hook(lambda module, to_output: (3 * to_output[0],))
    return net


@CASES(
    "parameter.register_hook in forward, which removes the hook of the last pass",
    passes(2),
    expected="outside",
)
class HookOfLastPass(Small):
    def __init__(self) -> None:
        super().__init__()
        self.handle: Any = None

    def middle(self, x: Tensor) -> Tensor:
        if self.handle is not None:
            self.handle.remove()
        self.handle = self.head.weight.register_hook(lambda gradient: gradient * 0.5)
        return x


@CASES("parameter.register_hook", passes(2))
def parameter_hook() -> nn.Module:
    net = Small()
    net.conv.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return net


@CASES("register_post_accumulate_grad_hook", passes(2))
def accumulate_hook() -> tuple[nn.Module, list[str]]:
    net, seen = Small(), []
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad.clone())))
    return net, Sorted(seen)


class Sorted:
    """Shows a list of pairs by name: the order in which gradients arrive is not promised."""

    def __init__(self, pairs: list[Any]) -> None:
        self._pairs = pairs

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return {"pairs": sorted(self._pairs, key=lambda pair: pair[0])}


# --- gradients that are stopped -----------------------------------------------------------------------


def _detached_in_place(x: Tensor) -> Tensor:
    stopped = torch.tanh(x)
    stopped.detach_()
    return x * stopped


def _requires_no_gradient(x: Tensor) -> Tensor:
    mask = (x.detach() > 0).to(x).requires_grad_(False)
    return x * mask


def _quantised(x: Tensor) -> Tensor:
    q = torch.round(x * 4) / 4
    return x + (q - x).detach()


@torch.no_grad()
def _target(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


CASES.on_map("x.data", lambda x: x * x.data)
CASES.on_map("x.detach()", lambda x: x * torch.tanh(x).detach())
CASES.on_map("x.detach_()", _detached_in_place)
CASES.on_map("requires_grad_(False) inside", _requires_no_gradient)
CASES.on_map("straight-through x + (q - x).detach()", _quantised)
CASES.on_map("a function under @torch.no_grad()", lambda x: x * _target(x))
CASES.on_vector("detached features", lambda v: v * v.detach().square())
CASES.on_map("everything is detached in front of the head", lambda x: x.detach())


@CASES("weights as w.data and w.detach()")
class DetachedWeight(Small):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv2d(WIDTH, WIDTH, 3)

    def middle(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.extra.weight.data) + F.conv2d(x, self.extra.weight.detach(), self.extra.bias)


@CASES("vector quantisation of a map, with its loss", passes(2), expected=SAME_OR_REFUSED)
class VectorQuantised(Small):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(8, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.maps(x)
        flat = x.permute(0, 2, 3, 1).reshape(-1, WIDTH)
        nearest = torch.cdist(flat, self.codes.weight).argmin(1)
        q = self.codes(nearest).view(x.shape[0], x.shape[2], x.shape[3], WIDTH).permute(0, 3, 1, 2)
        loss = F.mse_loss(q, x.detach()) + 0.25 * F.mse_loss(x, q.detach())
        return self.head((x + (q - x).detach()).mean((2, 3))), loss


@CASES("gumbel softmax, hard, of features", passes(2))
class Gumbel(Small):
    def late(self, v: Tensor) -> Tensor:
        return F.gumbel_softmax(v, tau=0.7, hard=True) * v


# --- complex numbers ----------------------------------------------------------------------------------

CASES.on_map("FNet: fft2(x).real", lambda x: torch.fft.fft2(x).real / 10)
CASES.on_map("rfft2(x).abs()", lambda x: torch.fft.rfft2(x).abs() / 10)


@CASES("a Fourier unit: rfft2, convolution, irfft2")
class FourierUnit(Small):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 1)

    def middle(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft2(x, norm="ortho")
        f = self.mix(torch.cat([f.real, f.imag], 1))
        real, imaginary = f.chunk(2, 1)
        return torch.fft.irfft2(torch.complex(real, imaginary), s=x.shape[-2:], norm="ortho")


@CASES("a complex parameter (global filter)")
class GlobalFilter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH, 29, 19, dtype=torch.complex64))

    def middle(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft2(x, norm="ortho") * self.filter
        return torch.fft.irfft2(f, s=x.shape[-2:], norm="ortho")


@CASES("view_as_complex of a parameter")
class ViewedAsComplex(Small):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH, 29, 19, 2))

    def middle(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(f, s=x.shape[-2:], norm="ortho")


# --- checkpoints --------------------------------------------------------------------------------------


class Checkpointed(Small):
    def __init__(self, use_reentrant: bool, norm: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), norm, nn.Tanh())
        self.use_reentrant = use_reentrant

    def middle(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


class CheckpointedWithDraws(Checkpointed):
    def middle(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return self.block(x) * torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype)

        return checkpoint(block, x, use_reentrant=self.use_reentrant)


for reentrant in (False, True):
    CASES.add(
        f"checkpoint inside, use_reentrant={reentrant}",
        lambda reentrant=reentrant: Checkpointed(reentrant, nn.GroupNorm(2, WIDTH)),
        passes(2),
    )
    # In plain PyTorch the block runs twice, and batch norm's statistics move twice.
    CASES.add(
        f"checkpoint around batch norm, use_reentrant={reentrant}",
        lambda reentrant=reentrant: Checkpointed(reentrant, nn.BatchNorm2d(WIDTH)),
        passes(2),
        expected=SAME_OR_REFUSED,
    )
CASES.add(
    "checkpoint inside, with random numbers",
    lambda: CheckpointedWithDraws(False, nn.Identity()),
    expected=SAME_OR_REFUSED,
)


@CASES("checkpoint_sequential inside")
class CheckpointedParts(Small):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3), nn.Tanh(), nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU()
        )

    def middle(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint_sequential(self.block, 2, x, use_reentrant=False)


# --- gradients inside forward -------------------------------------------------------------------------


@CASES("autograd.grad inside forward, of features", expected=SAME_OR_REFUSED)
class GradientPenalty(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = F.relu(self.maps(x)).mean((2, 3))
        out = self.head(v)
        (slope,) = torch.autograd.grad(out.square().sum(), v, create_graph=True)
        return out, slope.square().sum()


@CASES("backward inside forward", expected=SAME_OR_REFUSED)
class BackwardInside(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if torch.is_grad_enabled():
            out.square().sum().backward(retain_graph=True)
        return out


@CASES("torch.func.grad inside forward, of features", expected=SAME_OR_REFUSED)
class FunctionalGradient(Small):
    def late(self, v: Tensor) -> Tensor:
        return v + torch.func.grad(lambda u: torch.tanh(u).pow(3).sum())(v)


def _pulled_back(x: Tensor) -> Tensor:
    y, pull_back = torch.func.vjp(torch.tanh, x)
    return y + pull_back(x.detach().sin())[0]


def _pulled_back_twice(v: Tensor) -> Tensor:
    _, pull_back, other = torch.func.vjp(lambda a, b: (a * b, a + b), v, v.cos(), has_aux=True)
    left, right = pull_back(F.layer_norm(other, other.shape[1:]))
    return left + right + pull_back(v)[1]


def _curvature(v: Tensor) -> Tensor:
    slopes = torch.func.jacrev(lambda u: torch.tanh(u).pow(3).sum(1))(v)
    return slopes.sum(1) + torch.func.hessian(lambda u: torch.tanh(u).pow(3).sum())(v).sum((0, 1))


CASES.on_map("torch.func.vjp inside forward, of a map", _pulled_back)
CASES.on_vector("torch.func.vjp inside forward, pulled back twice", _pulled_back_twice)
CASES.on_vector("torch.func.jacrev and hessian inside forward", _curvature)
CASES.on_vector(
    "torch.func.vjp inside forward, with random numbers",
    lambda v: torch.func.vjp(lambda u: F.dropout(u).square(), v)[1](v)[0],
    expected="draws random numbers in a function that vjp",
)


def _tangent(v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(forward_ad.make_dual(v, v.cos()).tanh())
        return value + tangent


CASES.on_vector("forward_ad inside forward, of features", _tangent)


@CASES("a hook's closure holds a weight", passes(2), expected="leaves a tensor")
class HookWithWeight(Small):
    def middle(self, x: Tensor) -> Tensor:
        x, weight = x * 2, self.norm.weight
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * weight.detach()[:, None, None])
        return x


@CASES("features are returned as a leaf that requires a gradient", expected="require a gradient")
class NewLeaf(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = self.maps(x).mean((2, 3)).detach().requires_grad_()
        return self.head(v), v
