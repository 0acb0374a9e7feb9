"""States that a forward pass reads and writes, in which order, and what results have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable
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

CASES = Cases("States that are read and written, and results that depend on each other")


def _several_forwards(model: Any, net: nn.Module, record: Record) -> None:
    """Three forwards before their backwards: each must have kept the states as it read them."""
    outputs = []
    for index in range(3):
        seed_everything(index)
        outputs.append(model(record.image(index)))
    for index, output in enumerate(outputs):
        record(f"output {index}", output)
        backpropagate(output, index)
        record.gradients(f"gradient {index}")
    record("buffers", dict(net.named_buffers()))


def _channels(x: Tensor) -> Tensor:
    return x.detach().mean((0, 2, 3), keepdim=True)


# --- buffers that are read and written ----------------------------------------------------------------


class Centered(Small):
    """Holds a value for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.rand(1, WIDTH, 1, 1))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        self.center.mul_(0.9).add_(_channels(x), alpha=0.1)


@CASES("a map minus a buffer that is then updated", passes(2))
class ReadThenUpdated(Centered):
    def middle(self, x: Tensor) -> Tensor:
        y = x - self.center
        self.update(x)
        return y


@CASES("a map minus a buffer that is then reassigned", passes(2))
class ReadThenReassigned(Centered):
    def middle(self, x: Tensor) -> Tensor:
        y = x - self.center
        self.center = self.center * 0.9 + _channels(x) * 0.1
        return y


@CASES("a buffer is read on the map and written at the end", passes(2))
class WrittenAtTheEnd(Centered):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.maps(x) - self.center)
        out = self.head(y.mean((2, 3)))
        with torch.no_grad():
            self.center.copy_(y.mean((0, 2, 3), keepdim=True))
        return out


@CASES("a buffer is updated twice, read between and after", passes(2))
class UpdatedTwice(Centered):
    def middle(self, x: Tensor) -> Tensor:
        self.update(x)
        y = torch.sin(x * self.center)
        self.center = self.center * 0.5 + _channels(y)
        return y + torch.cos(x - self.center)


@CASES("a buffer's copy is a factor, then it is updated; three forwards", _several_forwards)
class CopyThenUpdated(Centered):
    def middle(self, x: Tensor) -> Tensor:
        y = torch.sin(x * self.center.clone())
        self.update(x)
        return y


CASES.add("a map minus a buffer that is then updated; three forwards", ReadThenUpdated, _several_forwards)


@CASES("relu of features minus a buffer that is then updated", passes(2))
class ReadThenUpdatedLate(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.rand(1, WIDTH))

    def late(self, v: Tensor) -> Tensor:
        y = F.relu(v - self.center)
        with torch.no_grad():
            self.center.mul_(0.9).add_(v.mean(0, keepdim=True), alpha=0.1)
        return y


@CASES("a momentum encoder moved by _foreach_mul_ and _foreach_add_", passes(2))
class ForeachEncoder(Small):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(self.conv).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            moving = list(self.encoder.parameters())
            torch._foreach_mul_(moving, 0.9)
            torch._foreach_add_(moving, [self.conv.weight], alpha=0.1)
            target = self.encoder(x).mean((2, 3))
        return super().forward(x) + target[:, :4]


class TwoBuffers(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.zeros(WIDTH))
        self.register_buffer("second", torch.zeros(WIDTH))


@CASES("buffers by _foreach_copy_", passes(2))
class ForeachCopy(TwoBuffers):
    def middle(self, x: Tensor) -> Tensor:
        mean = x.detach().mean((0, 2, 3))
        torch._foreach_copy_([self.first, self.second], [mean, mean * 2])
        return x


@CASES("buffers by _foreach_lerp_", passes(2))
class ForeachLerp(TwoBuffers):
    def middle(self, x: Tensor) -> Tensor:
        mean = x.detach().mean((0, 2, 3))
        torch._foreach_lerp_([self.first, self.second], [mean, mean * 2], 0.1)
        return x - self.first[:, None, None]


@CASES("a codebook moved by .data (VQ-VAE)", passes(3))
class Codebook(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(8, WIDTH))
        self.register_buffer("sizes", torch.ones(8))
        self.register_buffer("sums", torch.randn(8, WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        flat = x.permute(0, 2, 3, 1).reshape(-1, WIDTH)
        nearest = torch.cdist(flat, self.codes).argmin(1)
        chosen = F.one_hot(nearest, 8).to(x.dtype)
        rows = F.embedding(nearest, self.codes).view(x.shape[0], x.shape[2], x.shape[3], WIDTH)
        if self.training:
            self.sizes.data.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
            self.sums.data.mul_(0.9).add_((chosen.t() @ flat).detach(), alpha=0.1)
            self.codes.data.copy_(self.sums / (self.sizes + 1e-5).unsqueeze(1))
        return x + (rows.permute(0, 3, 1, 2) - x).detach()


@CASES("a queue and a momentum encoder (MoCo)", passes(3))
class Moco(Small):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(nn.Sequential(self.conv, self.norm)).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(4, 10), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query = F.normalize(super().forward(x), dim=1)
        with torch.no_grad():
            trained = (*self.conv.parameters(), *self.norm.parameters())
            for weight, moving in zip(trained, self.encoder.parameters(), strict=True):
                moving.data = moving.data * 0.9 + weight.data * 0.1
            order = torch.randperm(x.shape[0])
            pooled = F.relu(self.encoder(x[order])).mean((2, 3))
            key = F.normalize(self.head(pooled), dim=1)[torch.argsort(order)]
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone().detach()], 1)
        with torch.no_grad():
            self.queue[:, (self.pointer + torch.arange(x.shape[0])) % 10] = key.T
            self.pointer[0] = (self.pointer[0] + x.shape[0]) % 10
        return logits / 0.2, torch.zeros(x.shape[0], dtype=torch.long)


@CASES("a parameter is written after its use and used again", passes(2))
class WrittenParameter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.rand(WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        y = x + self.shift[:, None, None]
        with torch.no_grad():
            self.shift.mul_(0.5)
        return y + 2 * self.shift[:, None, None]


@CASES("a weight's norm is limited in forward (max-norm)", passes(2))
class MaxNorm(Small):
    def maps(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv.weight.copy_(torch.renorm(self.conv.weight, 2, 0, 0.2))
            self.head.weight.clamp_(-0.1, 0.1)
        return super().maps(x)


# --- .data of what a gradient needs -------------------------------------------------------------------

_BY_DATA = r"past autograd .* whose values the gradient of aten\."


@CASES("a gain's .data changes after its use, which the gradient reads", passes(2), expected=_BY_DATA)
class GainByData(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.linspace(0.5, 1, WIDTH).view(-1, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        y = x * self.gain
        self.gain.data.mul_(0.9)
        return y


@CASES("weights are limited by .data after their use", expected=_BY_DATA)
class LimitedAfterwards(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for weight in self.parameters():
            weight.data.clamp_(-0.2, 0.2)
        return y


@CASES("the result of a sigmoid is doubled by .data", expected=_BY_DATA)
class DoubledByData(Small):
    def middle(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        y.data.mul_(2)
        return y


@CASES("a map behind a norm is clamped by .data", passes(2))
class ClampedByData(Small):
    def middle(self, x: Tensor) -> Tensor:
        x.data.clamp_(-1, 1)
        self.norm.running_mean.data.mul_(0.5)
        return x


# --- between forward and backward ---------------------------------------------------------------------


def _changed_before_backward(change: Callable[[Any], Any]) -> Any:
    """One pass of a net that ``change`` changes between forward and backward."""

    def steps(model: Any, net: nn.Module, record: Record) -> None:
        image = record.image()
        out = model(image)
        change(net)
        record.mark()
        backpropagate(out)
        record.gradients("gradient", image)
        record("buffers", dict(net.named_buffers()))

    return steps


@CASES(
    "a buffer that backward does not need changes before it",
    _changed_before_backward(lambda net: net.center.add_(1)),
    expected="modified by an inplace",
)
class AddedCenter(Centered):
    def middle(self, x: Tensor) -> Tensor:
        return x + self.center


def _replace_data(net: Any) -> None:
    net.conv.weight.data = net.conv.weight.data * 2


CASES.add(
    "weight.data changes in place before backward",
    Small,
    _changed_before_backward(lambda net: net.conv.weight.data.mul_(2)),
)
CASES.add(
    "weight.data is replaced before backward",
    Small,
    _changed_before_backward(_replace_data),
    expected="was replaced between forward and backward",
)


# --- statistics of batch norm -------------------------------------------------------------------------


@CASES("a running variance is read, then moved by its norm", passes(2))
class VarianceThenNorm(Small):
    def middle(self, x: Tensor) -> Tensor:
        y = F.relu(x + self.norm.running_var[:, None, None])
        return y + self.norm(y)


@CASES("a running mean is read on the map, then moved by its norm", passes(2))
class MeanThenNorm(Small):
    def maps(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(x) - self.norm.running_mean[:, None, None]))


CASES.add(
    "a running mean is read on the map, then moved by its norm; three forwards",
    MeanThenNorm,
    _several_forwards,
)


@CASES("running statistics are written before their norm", passes(2))
class WrittenBeforeNorm(Small):
    def maps(self, x: Tensor) -> Tensor:
        self.norm.running_mean.mul_(0.5)
        self.norm.running_var.add_(0.5)
        return super().maps(x)


def _without_gradients(model: Any, net: nn.Module, record: Record) -> None:
    """Batch norm keeps its statistics for backward: behind it they can only be written without one."""
    for _ in range(2):
        with torch.no_grad():
            record.run(model, backward=False)


@CASES("a running mean is written after its norm, and read", _without_gradients)
class WrittenAfterNorm(Small):
    def middle(self, x: Tensor) -> Tensor:
        self.norm.running_mean.mul_(0.5)
        return x + self.norm.running_mean[:, None, None]


@CASES("a running mean is written in a backbone under no_grad", passes(2))
class WrittenInBackbone(Small):
    def maps(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = super().maps(x)
            self.norm.running_mean.mul_(0.5)
        return y * self.head.weight.sum() + self.norm.running_mean[:, None, None]


@CASES("num_batches_tracked is set to zero after its norm", passes(2))
class ZeroedCounter(Small):
    def middle(self, x: Tensor) -> Tensor:
        self.norm.num_batches_tracked.zero_()
        return x


@CASES("reset_running_stats before the norm", passes(2))
class ResetBefore(Small):
    def maps(self, x: Tensor) -> Tensor:
        self.norm.reset_running_stats()
        return super().maps(x)


@CASES("reset_running_stats after the norm", _without_gradients)
class ResetAfter(Small):
    def middle(self, x: Tensor) -> Tensor:
        self.norm.reset_running_stats()
        return x


@CASES("a norm in eval mode, then in training mode, in one forward", expected="past autograd")
class EvalThenTrain(Small):
    def maps(self, x: Tensor) -> Tensor:
        self.norm.eval()
        y = super().maps(0.5 * x)
        self.norm.train()
        return super().maps(x) + y


@CASES("a norm's momentum is 0 for one call", passes(2))
class MomentumZero(Small):
    def maps(self, x: Tensor) -> Tensor:
        momentum, self.norm.momentum = self.norm.momentum, 0.0
        y = super().maps(0.5 * x)
        self.norm.momentum = momentum
        return super().maps(x) + y


@CASES("a view of a running mean is taken before its norm and read after", passes(2))
class ViewOfMean(Small):
    def maps(self, x: Tensor) -> Tensor:
        mean = self.norm.running_mean.view(1, -1, 1, 1)
        return super().maps(x) + mean


@CASES("a copy of a running mean is taken before its norm and read after", passes(2))
class CopyOfMean(Small):
    def maps(self, x: Tensor) -> Tensor:
        mean = self.norm.running_mean.clone()
        return super().maps(x) + (mean + self.norm.running_mean)[:, None, None]


@CASES("one norm three times, momentum=None", passes(3))
class CumulativeThrice(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm.momentum = None

    def maps(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(self.norm(self.conv(x))) * 2)


@CASES("a branch on norm.momentum is None", passes(2))
class BranchOnMomentum(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm.momentum = None

    def middle(self, x: Tensor) -> Tensor:
        return x * (2.0 if self.norm.momentum is None else 1.0)


@CASES("momentum is None, and set in the second forward", passes(3))
class ScheduledMomentum(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm.momentum = None
        self.step = 0

    def maps(self, x: Tensor) -> Tensor:
        self.step += 1
        if self.step == 2:
            self.norm.momentum = 0.3
        return super().maps(x)


@CASES("momentum=None, and the counter is written", passes(2))
class WrittenCounter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm.momentum = None

    def maps(self, x: Tensor) -> Tensor:
        self.norm.num_batches_tracked.fill_(4)
        return super().maps(x)


@CASES("norms whose results nothing reads", passes(2))
class UnreadNorms(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm_2 = nn.BatchNorm2d(WIDTH)
        self.norm_3 = nn.InstanceNorm2d(WIDTH, track_running_stats=True)

    def middle(self, x: Tensor) -> Tensor:
        self.norm_3(self.norm_2(x).relu())
        return x


@CASES("F.batch_norm with rows of a buffer", passes(2))
class RowsAsStatistics(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(2, WIDTH))
        self.register_buffer("variances", torch.ones(2, WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.means[0], self.variances[0], training=True)


@CASES("batch renormalisation by hand", passes(3))
class BatchRenorm(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, WIDTH, 1, 1))
        self.register_buffer("deviation", torch.ones(1, WIDTH, 1, 1))
        self.register_buffer("seen", torch.tensor(0))

    def middle(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        deviation = x.std((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
        most = (self.seen + 1).clamp(1, 3)
        ratio = (deviation.detach() / self.deviation).clamp(1 / most, most)
        shift = ((mean.detach() - self.mean) / self.deviation).clamp(-most, most)
        y = (x - mean) / deviation * ratio + shift
        self.mean += 0.1 * (mean.detach() - self.mean)
        self.deviation += 0.1 * (deviation.detach() - self.deviation)
        self.seen += 1
        return y


# --- states and arguments that share memory -----------------------------------------------------------


def _one_buffer(model: Any, net: nn.Module, record: Record) -> None:
    """Made here: a change of the net's type would part them."""
    whole = torch.linspace(0, 1, WIDTH * 2, dtype=torch.float64)
    net.register_buffer("whole", whole)
    net.register_buffer("part", whole[:WIDTH])
    record.run(model)
    record.run(model)


@CASES("a buffer is changed and a view of it is read", _one_buffer, expected=SAME_OR_REFUSED)
class ViewedBuffer(Small):
    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.whole.mul_(0.5)
        return x * self.part[:, None, None]


def _shared_statistics(model: Any, net: Any, record: Record) -> None:
    net.norm_2.running_mean = net.norm.running_mean
    net.norm_2.running_var = net.norm.running_var
    record.run(model)
    record.run(model)


@CASES("two norms share their statistics", _shared_statistics)
class SharedStatistics(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm_2 = nn.BatchNorm2d(WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm_2(x * 2)


def _view_of_argument(model: Any, net: nn.Module, record: Record) -> None:
    first = torch.rand(2, WIDTH, dtype=torch.float64)
    record.run(model, first, first[:, :3])
    record("first", first)


@CASES("an argument is changed and another is a view of it", _view_of_argument, expected=SAME_OR_REFUSED)
class ViewedArgument(Small):
    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        first.mul_(2)
        return self.head(self.maps(x).mean((2, 3)) * first) + second.sum()


def _own_states(model: Any, net: Any, record: Record) -> None:
    record.run(model, net.norm.running_mean)
    record.run(model, net.head.weight)


@CASES("an argument is the net's own buffer, then its weight", _own_states)
class OwnStateAsArgument(Small):
    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return super().forward(x) + given.sum()


# --- draws and seeds ----------------------------------------------------------------------------------


def _factor(x: Tensor, **options: Any) -> Tensor:
    return torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype, **options)


def _draws_by_features(x: Tensor) -> Tensor:
    weights = x.mean((2, 3)).softmax(1).detach()
    index = torch.multinomial(weights, 2)
    return x * torch.bernoulli(weights)[:, :, None, None] + index.sum()


def _drawn_first_used_last(x: Tensor) -> Tensor:
    first, second = _factor(x), _factor(x)
    y = x * second
    return y - y.mean((2, 3), keepdim=True) + first


def _unread_draws(x: Tensor) -> Tensor:
    torch.rand(3)
    F.dropout(x.mean((2, 3)), 0.5)
    return x * _factor(x)


class _Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value + torch.rand_like(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _unread_function(x: Tensor) -> Tensor:
    _Noisy.apply(torch.linspace(0, 1, 3, dtype=x.dtype).requires_grad_())  # type: ignore[no-untyped-call]
    _Noisy.apply(x)  # type: ignore[no-untyped-call]
    return x * _factor(x)


def _unread_map(x: Tensor) -> Tensor:
    torch.rand_like(x)
    return x * _factor(x)


def _seeded_in_a_fork(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = _factor(x)
    return x * first + _factor(x)


def _seeded_generator(x: Tensor) -> Tensor:
    return x * _factor(x, generator=torch.Generator().manual_seed(0))


CASES.on_map("multinomial and bernoulli of features", _draws_by_features, passes(2))
CASES.on_map("what is drawn first is used last", _drawn_first_used_last, passes(2))
CASES.on_map("draws that nothing reads", _unread_draws, passes(2))
CASES.on_map("a function that draws, and that nothing reads", _unread_function, passes(2))
CASES.on_map("a drawn map that nothing reads", _unread_map, passes(2), expected=SAME_OR_REFUSED)
CASES.on_map("manual_seed inside fork_rng", _seeded_in_a_fork, passes(2), expected=SAME_OR_REFUSED)
CASES.on_map("a generator seeded in every forward", _seeded_generator, passes(2), expected=SAME_OR_REFUSED)


def _two_gradients(model: Any, net: nn.Module, record: Record) -> None:
    """What was drawn is kept for the second gradient, and drawing in between must not matter."""
    seed_everything(1)
    loss = model(record.image()).square().sum()
    record("first", torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))
    torch.rand(5)
    record("second", torch.autograd.grad(loss, list(net.parameters())))


@CASES("two gradients through random paths and spectral norm", _two_gradients)
class RandomSpectral(Small):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.utils.spectral_norm(nn.Conv2d(WIDTH, WIDTH, 3, padding=1))

    def middle(self, x: Tensor) -> Tensor:
        return x + self.branch(x) * torch.bernoulli(torch.full((2, 1, 1, 1), 0.5, dtype=x.dtype))


# --- results that depend on each other ----------------------------------------------------------------


def _grad_cam(model: Any, net: nn.Module, record: Record) -> None:
    """The gradient of the logits with respect to the second result, then a backward pass of all."""
    for index in range(2):
        record.mark()
        seed_everything(index)
        outputs = model(record.image(index))
        record(f"outputs {index}", outputs)
        cam = torch.autograd.grad(outputs[0].square().sum(), outputs[1], retain_graph=True)
        record(f"gradient of features {index}", cam)
        backpropagate(outputs, index)
        record.gradients(f"gradient {index}")
        record(f"buffers {index}", dict(net.named_buffers()))


class WithFeatures(Small):
    """Returns the features too."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        v = F.relu(self.middle(self.maps(x))).mean((2, 3))
        return self.head(self.late(v)), v


@CASES("Grad-CAM, a buffer is read and updated behind the features", _grad_cam)
class CamAndCenter(WithFeatures):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.rand(1, WIDTH))

    def late(self, v: Tensor) -> Tensor:
        y = v - self.center
        with torch.no_grad():
            self.center.mul_(0.9).add_(v.mean(0, keepdim=True), alpha=0.1)
        return y.sin()


@CASES("Grad-CAM, one norm in front of the features and behind them", _grad_cam)
class CamAndSharedNorm(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.conv(x))
        return self.head(self.norm(x * 2 + 1).mean((2, 3)).sin()), x


@CASES("Grad-CAM, a copy of a running mean taken before its norm", _grad_cam)
class CamAndCopyOfMean(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.norm.running_mean.clone()
        v = F.relu(self.maps(x)).mean((2, 3))
        return self.head(v * 2 + mean), v


@CASES("Grad-CAM, draws in front of the features and behind them", _grad_cam)
class CamAndDraws(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.rand(1, dtype=x.dtype)
        features = self.maps(x) * torch.rand(1, dtype=x.dtype)
        v = features.mean((2, 3)).sin()
        return self.head(v * first + torch.rand(1, dtype=x.dtype)), features


@CASES("Grad-CAM, features are changed in place after their use", _grad_cam)
class CamAndChange(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = self.maps(x).mean((2, 3))
        logits = self.head(v * 2)
        v += 1
        return logits + v[:, :4], v


@CASES("Grad-CAM, four results in a chain", _grad_cam)
class CamOfChain(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.maps(x)
        sines = features.sin()
        v = sines.mean((2, 3))
        return self.head(v.cos()), features, sines, v


def _changed_outputs(model: Any, net: nn.Module, record: Record) -> None:
    for index in range(2):
        seed_everything(index)
        outputs = model(record.image(index))
        outputs[1].add_(1.0)
        outputs[0].mul_(2)
        record(f"outputs {index}", outputs)
        backpropagate(outputs, index)
        record.gradients(f"gradient {index}")


@CASES("two results are changed in place by the caller", _changed_outputs)
class IndependentResults(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = self.maps(x).mean((2, 3))
        return self.head(v), self.head(v * 2).sum(1)


# --- attributes through the model ---------------------------------------------------------------------


def _set_through_model(model: Any, net: Any, record: Record) -> None:
    record.run(model)
    model.factor = 3.0
    record("factor", (model.factor, net.factor, model.described()))
    record.run(model)


@CASES("an attribute is set, and a method called, through the model", _set_through_model)
class Described(Small):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.5

    def described(self) -> str:
        return f"times {self.factor}"

    def middle(self, x: Tensor) -> Tensor:
        return x * self.factor


# --- values of states that decide ---------------------------------------------------------------------


@CASES("a flag in a buffer: .item() == 0 initialises (ActNorm)", passes(3))
class ActNorm(Small):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, WIDTH, 1, 1))
        self.register_buffer("initialised", torch.tensor(0, dtype=torch.uint8))

    def middle(self, x: Tensor) -> Tensor:
        if self.initialised.item() == 0:
            self.shift.data.copy_(-_channels(x))
            self.initialised.fill_(1)
        return x + self.shift


@CASES("a counter in a buffer: if self.count < 2", passes(4))
class WarmUp(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(0))

    def middle(self, x: Tensor) -> Tensor:
        if self.count < 2:
            x = x * 0.5
        if (self.count % 2 == 1).item():
            x = x.sin()
        self.count += 1
        return x


@CASES("a weight's norm as a number", passes(2))
class ScaledByNorm(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x / max(1.0, float(self.head.weight.detach().norm()))


@CASES("a buffer's value is read after it has changed", passes(2))
class ReadAfterChange(WarmUp):
    def middle(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * 0.5 if self.count == 1 else x


@CASES("a running mean's value is read after its norm", passes(2), expected="reads a value of a tensor")
class MeanReadAfterNorm(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * 0.5 if float(self.norm.running_mean.sum()) < 0 else x


@CASES("a part of a buffer's copy is changed, and its value read", passes(2))
class CopyReadAfterChange(Centered):
    def middle(self, x: Tensor) -> Tensor:
        copied = self.center.clone()
        copied[:, 0] += 5
        copied.view(-1)[1:].neg_()
        return x * float(copied.sum())


@CASES("a tensor is filled in parts, and its value read", passes(2))
class FilledReadAfterwards(Small):
    def middle(self, x: Tensor) -> Tensor:
        sizes = torch.zeros(2)
        sizes[0], sizes[1] = x.shape[-1], x.shape[-2]
        torch._foreach_add_([sizes], 1)
        return x / float(sizes.prod())


@CASES("a tensor made of numbers decides", passes(2))
class NumbersDecide(Small):
    def middle(self, x: Tensor) -> Tensor:
        widths = torch.tensor([(1.0, 1.5)], dtype=x.dtype)
        if not bool((widths > 0).all()):
            raise ValueError("widths must be positive")
        return x.sin() * x.new_tensor([3.0, 2.0])[1].item() if torch.equal(widths, widths) else x


@CASES("a buffer is compared by torch.allclose", passes(2))
class ComparedBuffer(Centered):
    def middle(self, x: Tensor) -> Tensor:
        is_known = not torch.allclose(self.center, torch.full_like(self.center, 0.25))
        self.center.fill_(0.25)
        return x - self.center if is_known else x.sin()


def _called_with_numbers(model: Any, net: nn.Module, record: Record) -> None:
    for number in (0.5, 2.0):
        record.run(model, torch.tensor(number))


@CASES("an argument's value", _called_with_numbers)
class Threshold(Small):
    def forward(self, x: Tensor, threshold: Tensor) -> Tensor:
        return super().forward(x.sin() if threshold > 1 else x)


@CASES("a mask in a buffer picks channels, others in each pass", passes(3))
class MaskedChannels(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(WIDTH) != 1)

    def middle(self, x: Tensor) -> Tensor:
        picked = x[:, self.mask]
        self.mask = ~self.mask
        return x + picked.sum(1, keepdim=True)


@CASES("channels whose weights are large: nonzero", passes(2))
class LargeWeights(Small):
    def middle(self, x: Tensor) -> Tensor:
        sizes = self.conv.weight.detach().abs().mean((1, 2, 3))
        return x + x[:, torch.nonzero(sizes >= sizes.median())[:, 0]].amax(1, keepdim=True)
