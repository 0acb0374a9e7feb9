"""Blocks of published architectures, written as their authors' code has them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.compatibility.case import WIDTH, Cases, Record, Small, passes

CASES = Cases("Blocks of published architectures")


@CASES("CondConv: a kernel for each image, in groups", passes(2))
class CondConv(Small):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(3, WIDTH, WIDTH, 3, 3) * 0.1)
        self.route = nn.Linear(WIDTH, 3)

    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        routed = torch.sigmoid(self.route(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        kernels = (routed @ self.kernels.flatten(1)).view(n * c, c, 3, 3)
        return F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n).view(n, c, h, w)


@CASES("coordinate attention", passes(2))
class CoordinateAttention(Small):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(WIDTH, WIDTH, 1)
        self.rows = nn.Conv2d(WIDTH, WIDTH, 1)
        self.cols = nn.Conv2d(WIDTH, WIDTH, 1)

    def middle(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        rows = F.adaptive_avg_pool2d(x, (None, 1))
        cols = F.adaptive_avg_pool2d(x, (1, None)).permute(0, 1, 3, 2)
        rows, cols = F.hardswish(self.shared(torch.cat([rows, cols], 2))).split([h, w], 2)
        return x * self.cols(cols.permute(0, 1, 3, 2)).sigmoid() * self.rows(rows).sigmoid()


@CASES("involution", passes(2))
class Involution(Small):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(WIDTH, 9, 1)

    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = F.unfold(x, 3, padding=1).view(n, c, 9, h, w)
        return (parts * self.kernel(x).unsqueeze(1)).sum(2)


@CASES("mixture of experts behind a noisy gate, its loss on self", passes(3))
class Experts(Small):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)])

    def middle(self, x: Tensor) -> Tensor:
        logits = self.gate(x.mean((2, 3)))
        best, which = (logits + torch.randn_like(logits)).topk(2, 1)
        gates = torch.zeros_like(logits).scatter(1, which, best.softmax(1))
        load = gates.sum(0)
        self.aux_loss = load.var() / load.mean() ** 2
        return sum(gates[:, i, None, None, None] * expert(x) for i, expert in enumerate(self.experts))

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.aux_loss


@CASES("DropBlock", passes(3))
class DropBlock(Small):
    def middle(self, x: Tensor) -> Tensor:
        dropped = (torch.rand(x.shape[0], *x.shape[2:]) < 0.03).to(x.dtype)
        kept = 1 - F.max_pool2d(dropped[:, None], 3, 1, 1)
        return x * kept * kept.numel() / kept.sum()


@CASES("switchable normalisation", passes(3))
class SwitchableNorm(Small):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(2, 3))
        self.register_buffer("mean", torch.zeros(1, WIDTH, 1))

    def middle(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        mean, square = flat.mean(-1, keepdim=True), flat.square().mean(-1, keepdim=True)
        means = [mean, mean.mean(1, keepdim=True), mean.mean(0, keepdim=True)]
        squares = [square, square.mean(1, keepdim=True), square.mean(0, keepdim=True)]
        self.mean.mul_(0.9).add_(0.1 * means[2].data)
        w, v = self.weights.softmax(1)
        found = sum(a * m for a, m in zip(w, means, strict=True))
        var = sum(a * (s - m * m) for a, s, m in zip(v, squares, means, strict=True))
        return ((flat - found) / (var + 1e-3).sqrt()).view_as(x)


@CASES("wavelets and back", passes(2))
class Wavelets(Small):
    def middle(self, x: Tensor) -> Tensor:
        x = x[..., :28, :36]
        rows = x[:, :, 0::2], x[:, :, 1::2]
        a, b, c, d = (part[..., i::2] / 2 for part in rows for i in (0, 1))
        low, high = (a + b + c + d).sin(), b + d - a - c
        whole = torch.zeros_like(x)
        whole[..., 0::2, 0::2] = low - high
        whole[..., 0::2, 1::2] = low + high
        whole[..., 1::2, 0::2] = high * 2
        return x + whole


@CASES("StyleGAN's modulated convolution", passes(2))
class Modulated(Small):
    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Linear(WIDTH, WIDTH)
        self.kernel = nn.Parameter(torch.randn(WIDTH, WIDTH, 3, 3))

    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernels = self.kernel[None] * (self.style(x.mean((2, 3))) + 1)[:, None, :, None, None]
        kernels = kernels * (kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        y = F.conv2d(x.reshape(1, -1, h, w), kernels.flatten(0, 1), padding=1, groups=n)
        return F.leaky_relu(y.view(n, c, h, w), 0.2).clamp(-256, 256)


@CASES("a net run on the image's scales, turned and flipped", passes(2))
class Scales(Small):
    def forward(self, x: Tensor) -> Any:
        small = F.interpolate(x, scale_factor=0.5, mode="bilinear", recompute_scale_factor=True)
        found = [self.maps(x), self.maps(x.flip(3)).flip(3), self.maps(x.rot90(2, (2, 3))).rot90(-2, (2, 3))]
        found.append(F.interpolate(self.maps(small), found[0].shape[2:], mode="bilinear"))
        return torch.stack(found).amax(0), self.head(torch.stack(found).var(0).mean((2, 3)))


@CASES("attention MIL with a loss of the most attended instances (CLAM)", passes(2))
class InstanceLoss(Small):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, 1)
        self.instances = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Any:
        tokens = F.relu(self.maps(x)).flatten(2).transpose(1, 2)
        scores = self.attention(tokens).transpose(1, 2)
        bag = (scores.softmax(-1) @ tokens).squeeze(1)
        ends = torch.cat([scores[:, 0].topk(4)[1], (-scores[:, 0]).topk(4)[1]], 1)
        chosen = tokens.gather(1, ends[..., None].expand(-1, -1, WIDTH))
        labels = torch.tensor([1] * 4 + [0] * 4).repeat(x.shape[0])
        return self.head(bag), F.cross_entropy(self.instances(chosen).flatten(0, 1), labels)


@CASES("a recurrent unit that refines a detached flow (RAFT)", passes(2))
class Refined(Small):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(2 * WIDTH + 2, 2 * WIDTH, 3, padding=1)
        self.candidate = nn.Conv2d(2 * WIDTH + 2, WIDTH, 3, padding=1)
        self.flow = nn.Conv2d(WIDTH, 2, 1)

    def forward(self, x: Tensor) -> Any:
        context = self.maps(x)
        hidden, flow, found = torch.tanh(context), torch.zeros_like(x[:, :2]), []
        for _ in range(3):
            flow = flow.detach()
            given = torch.cat([context, flow], 1)
            update, reset = torch.sigmoid(self.gates(torch.cat([hidden, given], 1))).chunk(2, 1)
            new = torch.tanh(self.candidate(torch.cat([reset * hidden, given], 1)))
            hidden = (1 - update) * hidden + update * new
            flow = flow + self.flow(hidden)
            found.append(flow)
        return found


@CASES("the Lovasz hinge of all pixels", passes(2))
class LovaszHinge(Small):
    def middle(self, x: Tensor) -> Tensor:
        scores, target = x[:, 0].flatten(), (x[:, 1] > 0).to(x.dtype).flatten()
        errors, order = (1 - scores * (2 * target - 1)).sort(descending=True)
        target = target[order]
        common, union = target.sum() - target.cumsum(0), target.sum() + (1 - target).cumsum(0)
        jaccard = 1 - common / union
        jaccard[1:] = jaccard[1:] - jaccard[:-1].clone()
        return x + F.relu(errors) @ jaccard


@CASES("quarters and halves that layers see by themselves (MPRNet)", passes(2))
class MultiPatch(Small):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)])

    def middle(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        halves = []
        for half in (x[:, :, : h // 2], x[:, :, h // 2 :]):
            quarters = self.layers[0](half[..., : w // 2]), self.layers[0](half[..., w // 2 :])
            halves.append(self.layers[1](torch.cat(quarters, 3).relu()))
        return x + self.layers[2](torch.cat(halves, 2).sin())


@CASES("linear attention by equations (MAnet), upsampling by tensordot (HoVer-Net)", passes(2))
class Equations(Small):
    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        queries, keys, values = F.softplus(x).flatten(2).mT, F.softplus(x).flatten(2), x.flatten(2)
        norm = 1 / torch.einsum("bnc,bc->bn", queries, keys.sum(-1))
        mixed = torch.einsum("bnm,bmc,bn->bcn", queries, torch.einsum("bmn,bcn->bmc", keys, values), norm)
        blocks = torch.tensordot(mixed.view(n, c, h, w, 1), torch.ones(1, 2, 2, dtype=x.dtype), dims=1)
        return blocks.permute(0, 1, 2, 4, 3, 5).reshape(n, c, 2 * h, 2 * w)[:, :, ::2, ::2]


class Reparametrised(Small):
    """A 3x3 and a 1x1 branch, which become one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.small = nn.Conv2d(WIDTH, WIDTH, 1)

    def middle(self, x: Tensor) -> Tensor:
        return self.fused(x) if hasattr(self, "fused") else self.large(x) + self.small(x)

    def fuse(self) -> None:
        """Put one convolution in the place of both."""
        self.fused = copy.deepcopy(self.large)
        self.fused.weight.data += F.pad(self.small.weight.data, (1, 1, 1, 1))
        self.fused.bias.data += self.small.bias.data
        del self.large, self.small


def _fused_on_the_way(model: Any, net: Any, record: Record) -> None:
    record.run(model)
    net.fuse()
    record.run(model)
    record.run(model)


CASES.add("RepVGG: branches are fused between passes", Reparametrised, _fused_on_the_way)
