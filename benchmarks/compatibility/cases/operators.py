"""Operators that people write on maps and vectors: assignments, indexing, branches on values, geometry."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import einops
import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from benchmarks.compatibility.case import SAME_OR_REFUSED, WIDTH, Applied, Cases, Record, Small, passes

CASES = Cases("Operators, assignments and results")


# --- assignments to a part ----------------------------------------------------------------------------


def written(name: str, **options: Any) -> Callable[[Callable[[Tensor], Any]], None]:
    """Add a case of a function that changes a fresh map in place, and returns another or None."""

    def decorate(change: Callable[[Tensor], Any]) -> None:
        def function(x: Tensor) -> Tensor:
            x = x * 2
            changed = change(x)
            return x if changed is None else changed

        CASES.on_map(name, function, **options)

    return decorate


@written("x[:, 0] = value")
def _(x: Tensor) -> None:
    x[:, 0] = 0.5


@written("x[:, :2] = tensor")
def _(x: Tensor) -> None:
    x[:, :2] = x[:, 2:4] * 3


@written("x[:, 1:3] += tensor")
def _(x: Tensor) -> None:
    x[:, 1:3] += x[:, 3:5]


@written("x[:, ::2] *= number")
def _(x: Tensor) -> None:
    x[:, ::2] *= 3


@written("x[..., 3:9, 5:11] = value")
def _(x: Tensor) -> None:
    x[..., 3:9, 5:11] = 0.25


@written("x[:, :, 0] = 0 and x[:, :, :, -1] = 0")
def _(x: Tensor) -> None:
    x[:, :, 0] = 0
    x[:, :, :, -1] = 0


@written("x[:, :, 1::2] = tensor")
def _(x: Tensor) -> None:
    x[:, :, 1::2] = x[:, :, 0:-1:2] * 2


@written("x[x > 0.5] = value")
def _(x: Tensor) -> None:
    x[x > 0.5] = 0.5


@written("x[mask of channels] = value")
def _(x: Tensor) -> None:
    mask = torch.zeros(WIDTH, dtype=torch.bool)
    mask[[1, 4]] = True
    x[:, mask] = 0.5


@written("x[:, [0, 2]] = tensor")
def _(x: Tensor) -> None:
    x[:, [0, 2]] = x[:, [1, 3]]


@written("x[index of images] *= number")
def _(x: Tensor) -> None:
    x[torch.tensor([1])] *= 3


@written("x[:, 0].mul_(2)")
def _(x: Tensor) -> None:
    x[:, 0].mul_(2)


@written("x[:, :3][:, 1].add_(1)")
def _(x: Tensor) -> None:
    x[:, :3][:, 1].add_(1)


@written("a view is changed, and the base read")
def _(x: Tensor) -> Tensor:
    half = x[:, :3]
    half.mul_(2)
    return x + x.square()


@written("the base is changed, and a view read")
def _(x: Tensor) -> Tensor:
    half = x[:, :3]
    x.add_(1)
    return torch.cat([half, x[:, 3:]], 1)


@written("two halves are changed in place")
def _(x: Tensor) -> None:
    first, second = x[:, :3], x[:, 3:]
    first.add_(second)
    second.mul_(0.5)


@written("a flattened view is changed in place")
def _(x: Tensor) -> None:
    x.view(x.shape[0], -1).mul_(2)


@written("a transposed view is changed in place")
def _(x: Tensor) -> None:
    x.permute(0, 2, 3, 1)[..., 0].zero_()


@written("zero_ and fill_ of parts")
def _(x: Tensor) -> None:
    x[:, 0].zero_()
    x[:, 1].fill_(0.3)


@written("copy_ into a part")
def _(x: Tensor) -> None:
    x[:, 0].copy_(x[:, 1] * 2)


@written("masked_fill_")
def _(x: Tensor) -> None:
    x.masked_fill_(x < 0, 0.1)


@written("masked_scatter_ and where in place", expected=SAME_OR_REFUSED)
def _(x: Tensor) -> None:
    x.masked_scatter_(x < 0, x.detach().square())


@written("index_put_, index_add_ and index_fill_ of channels")
def _(x: Tensor) -> None:
    x.index_fill_(1, torch.tensor([0]), 0.5)
    x.index_add_(1, torch.tensor([1, 2]), x[:, 3:5].clone())
    x.index_copy_(1, torch.tensor([5]), x[:, :1].clone())


@written("index_put_ of positions")
def _(x: Tensor) -> None:
    rows, columns = torch.tensor([3, 9]), torch.tensor([20, 5])
    x.index_put_((torch.zeros(2, dtype=torch.long), torch.tensor([1, 2]), rows, columns), x.new_tensor(0.5))


@written("clamp_, relu_ and pow_ in a chain")
def _(x: Tensor) -> None:
    x.clamp_(-0.9, 0.9).add_(1).pow_(2)


@written("x = torch.where(mask, ...) after a change")
def _(x: Tensor) -> Tensor:
    x.mul_(2)
    return torch.where(x > 0, x, x.sin())


@written("out= of an operator", expected=SAME_OR_REFUSED)
def _(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.clamp(x.detach(), 0, 1, out=out)
    return x * out


@written("x += y leaves x in its type")
def _(x: Tensor) -> Tensor:
    low = (x * 0).float()
    low += 0.1 * torch.ones_like(x)
    low.flatten(2).mul_(x.cos().round().flatten(2) + 1.1)
    return x * low


@written("a loss in float32 that is summed up by +=")
def _(x: Tensor) -> Tensor:
    total = torch.zeros(len(x), dtype=torch.float32)
    for exponent in (1, 2):
        total += 0.1 + 0 * x.mean((1, 2, 3)) ** exponent
    scales = [total.clone()]
    with torch.no_grad():
        torch._foreach_mul_(scales, [0.3 * torch.ones_like(total, dtype=x.dtype)])
    return x * scales[0].view(-1, 1, 1, 1)


@written("a map that is filled by parts")
def _(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 2 * WIDTH, *x.shape[2:], dtype=x.dtype)
    out[:, :WIDTH] = x
    out[:, WIDTH:] = x.square()
    return out[:, ::2]


@written("new_zeros filled at strided positions")
def _(x: Tensor) -> Tensor:
    n, c, height, width = x.shape
    out = x.new_zeros(n, c, 2 * height, 2 * width)
    out[:, :, ::2, ::2] = x
    out[:, :, 1::2, 1::2] = -x
    return out


def _swin_mask(x: Tensor) -> Tensor:
    """The mask of shifted windows: constants written by slices into a map of the image's extents."""
    height, width = x.shape[2:]
    mask = torch.zeros(1, 1, height, width, dtype=x.dtype)
    count = 0
    for rows in (slice(0, -8), slice(-8, -4), slice(-4, None)):
        for columns in (slice(0, -8), slice(-8, -4), slice(-4, None)):
            mask[:, :, rows, columns] = count
            count += 1
    return x * (1 + mask)


CASES.on_map("a mask filled by slices (Swin)", _swin_mask)


def _temporal_shift(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :2, :, :-1] = x[:, :2, :, 1:]
    out[:, 2:4, :, 1:] = x[:, 2:4, :, :-1]
    out[:, 4:] = x[:, 4:]
    return out


CASES.on_map("channels shifted by slices", _temporal_shift)


@CASES("the image is changed in place")
class ChangesImage(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x[:, 0] -= 0.5
        x /= 0.25
        return super().forward(x)


def _keeps_image(model: Any, net: nn.Module, record: Record) -> None:
    image = record.image(grad=False)
    record.run(model, image=image)
    record("image afterwards", image)


@CASES("the caller's image is changed in place", _keeps_image, expected=SAME_OR_REFUSED)
class ChangesCallersImage(Small):
    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.25)
        return super().forward(x)


# --- values that decide -------------------------------------------------------------------------------


def _by_boolean_mask(x: Tensor) -> Tensor:
    return x * x[x > 0].mean()


def _by_float(x: Tensor) -> Tensor:
    return x * 2 if float(x.mean()) > 0 else x.square()


def _by_item(x: Tensor) -> Tensor:
    return x / x.abs().max().item()


def _by_truth(x: Tensor) -> Tensor:
    return x * 2 if (x.mean() < 1e9) else x.square()


def _finite(x: Tensor) -> Tensor:
    if torch.isnan(x).any() or not torch.isfinite(x).all():
        raise ValueError("not finite")
    return x


def _nonzero(x: Tensor) -> Tensor:
    rows, columns = torch.nonzero(x[0, 0] > 0, as_tuple=True)
    return x * x[0, 1, rows, columns].mean()


def _unique(x: Tensor) -> Tensor:
    return x * len(torch.unique((x[:, 0] > 0).long()))


def _while(x: Tensor) -> Tensor:
    while x.abs().mean() > 0.3:
        x = x / 2
    return x


def _to_numpy(x: Tensor) -> Tensor:
    return x * float(x.detach().numpy().std())


def _listed(v: Tensor) -> Tensor:
    return v * torch.tensor([max(row) for row in v.tolist()], dtype=v.dtype)[:, None]


CASES.on_map("a boolean mask's values", _by_boolean_mask, expected=SAME_OR_REFUSED)
CASES.on_map("float(x.mean()) decides", _by_float, passes(3), expected=SAME_OR_REFUSED)
CASES.on_map(".item() of a map's maximum", _by_item, expected=SAME_OR_REFUSED)
CASES.on_map("a comparison decides", _by_truth, expected=SAME_OR_REFUSED)
CASES.on_map("an isnan check", _finite, expected=SAME_OR_REFUSED)
CASES.on_map("nonzero", _nonzero, expected=SAME_OR_REFUSED)
CASES.on_map("torch.unique", _unique, expected=SAME_OR_REFUSED)
CASES.on_map("while on a value", _while, expected=SAME_OR_REFUSED)
CASES.on_map("x.detach().numpy()", _to_numpy, expected=SAME_OR_REFUSED)
CASES.on_vector("tolist() of features", _listed, expected=SAME_OR_REFUSED)
CASES.on_vector(
    "a branch on features", lambda v: v * 2 if v.sum() > 0 else -v, passes(3), expected=SAME_OR_REFUSED
)


def _asserted(x: Tensor) -> Tensor:
    assert x.dim() == 4, "no map"
    assert x.shape[1] == WIDTH
    torch._assert(x.shape[0] > 0, "empty")
    return x


CASES.on_map("assert on shapes", _asserted)


def _raises(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model)
    # Plain batch norm has moved its statistics when the assertion fails, and a streamed pass changes nothing.
    net.eval()
    net.limit = 1e-9
    record.mark()
    try:
        model(record.image())
    except AssertionError as error:
        record("the error", str(error))


@CASES("assert on values, true and false", _raises, expected=SAME_OR_REFUSED)
class AssertsValues(Small):
    limit = 1e9

    def middle(self, x: Tensor) -> Tensor:
        assert x.abs().max() < self.limit, "too large"
        return x


def _raised_by_user(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model)
    record.mark()
    try:
        model(record.image(shape=(1, 3, 17, 19)))
    except KeyError as error:
        record("the error", str(error))


@CASES("an error of the net's own", _raised_by_user, expected=SAME_OR_REFUSED)
class Raises(Small):
    def middle(self, x: Tensor) -> Tensor:
        if x.shape[2] < 20:
            raise KeyError("no such size")
        return x


def _weighed(x: Tensor) -> Tensor:
    """One number per image (N, 1, 1, 1) that depends on every value of ``x`` in another way."""
    weights = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
    return (x.square() * weights).mean((1, 2, 3), keepdim=True)


# --- selection and order ------------------------------------------------------------------------------

CASES.on_map("topk over space", lambda x: x.flatten(2).topk(5, -1)[0][..., None])
CASES.on_map("topk over channels", lambda x: x + _weighed(x.topk(2, 1)[0]))
CASES.on_vector("topk, sort and argsort of features", lambda v: v.sort(-1)[0] + v[:, v[0].argsort()])
CASES.on_map("sort over channels", lambda x: x.sort(1)[0] * torch.arange(WIDTH).view(1, -1, 1, 1))
CASES.on_map(
    "argmax and one_hot over channels", lambda x: x * F.one_hot(x.argmax(1), WIDTH).permute(0, 3, 1, 2)
)
CASES.on_map(
    "argmax over space", lambda x: x.flatten(2).gather(2, x.flatten(2).argmax(-1, keepdim=True))[..., None]
)
CASES.on_map("gather over channels", lambda x: x + _weighed(x.gather(1, x.argsort(1)[:, :2])))
CASES.on_map(
    "scatter_add over space",
    lambda x: torch.zeros(*x.shape[:2], 4, dtype=x.dtype).scatter_add(
        2, (x.detach().flatten(2) > 0).long(), x.flatten(2)
    )[..., None],
)
CASES.on_map("index_select of channels", lambda x: x + _weighed(x.index_select(1, torch.tensor([3, 1, 1]))))
CASES.on_map("take_along_dim", lambda x: x + _weighed(torch.take_along_dim(x, x.argmax(1, keepdim=True), 1)))
CASES.on_map(
    "bucketize", lambda x: x * torch.bucketize(x.detach(), torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype))
)
CASES.on_map("x[:, index tensor]", lambda x: x + _weighed(x[:, torch.tensor([2, 0])]))
CASES.on_map(
    "x[rows, columns] with index tensors",
    lambda x: x[:, :, torch.tensor([3, 9]), torch.tensor([5, 1])][..., None],
)


def _of_bytes(model: Any, net: nn.Module, record: Record, dtype: torch.dtype) -> None:
    for seed in range(2):
        image = (record.image(seed, grad=False) * 50 + 128).clamp(0, 255).to(dtype)
        record.run(model, image=image)


@CASES(
    "an embedding of the image's values",
    lambda model, net, record: _of_bytes(model, net, record, torch.float64),
)
class EmbeddedBytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, WIDTH)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x[:, 0].long()).permute(0, 3, 1, 2)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


CASES.add(
    "an embedding of a uint8 image",
    EmbeddedBytes,
    lambda model, net, record: _of_bytes(model, net, record, torch.uint8),
    expected=SAME_OR_REFUSED,
)


# --- geometry -----------------------------------------------------------------------------------------


def _warped(x: Tensor) -> Tensor:
    theta = torch.tensor([[[0.9, 0.1, 0.0], [-0.1, 0.9, 0.05]]], dtype=x.dtype).expand(x.shape[0], -1, -1)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


@CASES("a spatial transformer")
class Transformer(Small):
    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Linear(WIDTH, 6)

    def middle(self, x: Tensor) -> Tensor:
        theta = self.where(x.mean((2, 3))).view(-1, 2, 3) * 0.1 + torch.eye(2, 3, dtype=x.dtype)
        return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=True), align_corners=True)


def _windows(x: Tensor) -> Tensor:
    return F.fold(F.unfold(x, 3, padding=1) * 0.5, x.shape[-2:], 3, padding=1)


CASES.on_map("grid_sample of affine_grid", _warped)
CASES.on_map("unfold and fold", _windows)
CASES.on_map("tensor.unfold", lambda x: x.unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2)))
CASES.on_map("F.interpolate to a size, bilinear", lambda x: F.interpolate(x, (13, 50), mode="bilinear"))
CASES.on_map("F.interpolate by 2, nearest", lambda x: F.interpolate(x, scale_factor=2))
CASES.on_map(
    "F.interpolate, bicubic, antialiased",
    lambda x: F.interpolate(x, (13, 17), mode="bicubic", antialias=True),
)
CASES.on_map("roll", lambda x: torch.cat([x, x.roll((3, -5), (2, 3))], 1)[:, ::2] ** 2)
CASES.on_map("flip", lambda x: x * x.flip(3) + x.flip(2))
CASES.on_map("rot90 and transpose", lambda x: torch.rot90(x, 1, (2, 3)) * x.transpose(2, 3))
CASES.on_map("cumsum over space", lambda x: x.cumsum(2) / 29)
CASES.on_map(
    "pixel_unshuffle of a padded map", lambda x: x + _weighed(F.pixel_unshuffle(F.pad(x, (0, 3, 0, 3)), 4))
)
CASES.on_map("an integral image, and rows in order", lambda x: x.cumsum(2).cumsum(3) / 900 + x.sort(3)[0])
CASES.on_map("diff along the rows", lambda x: x.diff(dim=2))
CASES.on_map("einsum over channels", lambda x: torch.einsum("nchw,ndhw->ncd", x, x)[..., None] / 100)
CASES.on_map(
    "einops.rearrange to patches",
    lambda x: (
        x + _weighed(einops.rearrange(F.pad(x, (0, 3, 0, 3)), "n c (h p) (w q) -> n (c p q) h w", p=4, q=4))
    ),
)
CASES.on_map(
    "einops.reduce and repeat",
    lambda x: (
        x
        + einops.repeat(
            einops.reduce(x, "n c h w -> n c", "mean"), "n c -> n c h w", h=x.shape[2], w=x.shape[3]
        )
    ),
)
CASES.on_map(
    "meshgrid of positions",
    lambda x: x + torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")[0],
)
CASES.on_map("softmax over space", lambda x: x.flatten(2).softmax(-1).view_as(x) * 100)
CASES.on_map("logsumexp over space", lambda x: x.logsumexp((2, 3), keepdim=True))
CASES.on_map("std and var over space", lambda x: (x / x.std((2, 3), keepdim=True)) ** 2)


def _short_time_fourier(x: Tensor) -> Tensor:
    window = torch.hann_window(8, dtype=x.dtype)
    rows = x.flatten(0, 2)
    spectrum = torch.stft(rows, 8, 4, window=window, return_complex=True)
    return torch.istft(spectrum, 8, 4, window=window, length=x.shape[3]).view_as(x)


CASES.on_map("torch.istft of rows", _short_time_fourier, expected="istft.* looks at the values")
CASES.on_map(
    "quantile over space", lambda x: x.flatten(2).quantile(0.9, -1)[..., None, None], expected=SAME_OR_REFUSED
)
CASES.on_map("median over space", lambda x: x.flatten(2).median(-1)[0][..., None, None])
CASES.on_map("amax over everything", lambda x: x / x.abs().amax())
CASES.on_map("norm of the map", lambda x: 50 * x / x.norm())
CASES.on_map(
    "torch.cov of a map's channels",
    lambda x: torch.stack([torch.cov(each.flatten(1)).sum(0) for each in x])[..., None, None],
)
CASES.on_map(
    "corrcoef as a method, of maps and of vectors",
    lambda x: (x.transpose(0, 1).flatten(1).corrcoef().sum(0) + x[0, 0, 0].corrcoef()).view(1, -1, 1, 1),
)
CASES.on_map("channels_last", lambda x: torch.tanh(x.contiguous(memory_format=torch.channels_last)))


def _stripes(x: Tensor) -> Tensor:
    stripes = "(n s) g (k w) d"
    y = einops.rearrange(x[:, :, :28], f"n (g d) (s k) w -> {stripes}", g=2, k=4)
    shares = torch.einsum("bgqd,bgkd->bgqk", y, y.tanh()).softmax(-1)
    y = torch.einsum("bgqk,bgkd->bgqd", shares, y)
    return einops.rearrange(y, f"{stripes} -> n (g d) (s k) w", n=len(x), k=4)


CASES.on_map("attention within stripes, by einsum", _stripes)


@CASES("einops layers")
class EinopsLayers(Small):
    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = Rearrange("n c h w -> n h w c"), Rearrange("n h w c -> n c h w")
        self.layer = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def middle(self, x: Tensor) -> Tensor:
        return x + self.back(self.layer(self.there(x)))


@CASES("attention over a pooled map")
class Attention(Small):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def middle(self, x: Tensor) -> Tensor:
        tokens = F.adaptive_avg_pool2d(x, 5).flatten(2).transpose(1, 2)
        return self.attend(tokens, tokens, tokens)[0].transpose(1, 2)[..., None]


@CASES("a recurrent net over the rows", expected=SAME_OR_REFUSED)
class Recurrent(Small):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def middle(self, x: Tensor) -> Tensor:
        return self.cell(x.mean(3).transpose(1, 2))[0].transpose(1, 2)[..., None]


@CASES("a class token joined with the tokens of a map (CoaT, ViT)", passes(2))
class ClassToken(Small):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.linspace(-1, 1, WIDTH).view(1, 1, WIDTH))
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)

    def middle(self, x: Tensor) -> Tensor:
        tokens = torch.cat((self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), 1)
        tokens = self.block(tokens)
        return tokens[:, 1:].transpose(1, 2).reshape(x.shape) * tokens[:, 0][..., None, None]


@CASES("LSTMs over the rows and over the columns (ReNet)", passes(2))
class Lines(Small):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.columns = nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)

    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rows = self.rows(x.permute(0, 2, 3, 1).reshape(n * h, w, c))[0].reshape(n, h, w, c)
        columns = self.columns(rows.transpose(1, 2).reshape(n * w, h, c))[0]
        return x + columns.reshape(n, w, h, c).permute(0, 3, 2, 1)


CASES.on_vector(
    "a product with a sparse matrix",
    lambda v: torch.sparse.mm(torch.eye(WIDTH, dtype=v.dtype).to_sparse(), v.T).T,
)


# --- results ------------------------------------------------------------------------------------------


@dataclass
class Found:
    """A result with names."""

    logits: Tensor
    features: Tensor | None
    note: str = "fine"


class Named(NamedTuple):
    """A result with names and places."""

    logits: Tensor
    features: Tensor


Untyped = namedtuple("Untyped", ["logits", "features"])


class Returning(Small):
    """Makes its result from logits, features and a map."""

    def __init__(self, make: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.maps(x))
        v = x.mean((2, 3))
        return self.make(self.head(v), v, x)


class Plain:
    """A result of a class that nobody has registered."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


RESULTS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "a tuple": lambda logits, v, x: (logits, v),
    "a tuple of one": lambda logits, v, x: (logits,),
    "a list of lists": lambda logits, v, x: [[logits], [v, [x]]],
    "a dict with None, numbers and texts": lambda logits, v, x: {
        "out": logits,
        "aux": None,
        "n": 3,
        "what": "a",
    },
    "an OrderedDict": lambda logits, v, x: OrderedDict(out=logits, features=v),
    "a NamedTuple": lambda logits, v, x: Named(logits, v),
    "a namedtuple": lambda logits, v, x: Untyped(logits, v),
    "a dataclass": lambda logits, v, x: Found(logits, v),
    "a dataclass with None": lambda logits, v, x: Found(logits, None, "none"),
    "a dict of a list of tuples with a map": lambda logits, v, x: {"all": [(logits, x), (v, 1.5)]},
    "the same tensor twice": lambda logits, v, x: (logits, logits),
    "a view and its base": lambda logits, v, x: (logits, logits[:, :2]),
    "a detached tensor": lambda logits, v, x: (logits, v.detach()),
    "a mask and indices": lambda logits, v, x: (logits, x.detach() > 0, logits.argmax(1)),
    "a constant tensor": lambda logits, v, x: (logits, torch.ones(3)),
    "a shape": lambda logits, v, x: (logits, x.shape),
    "an empty list": lambda logits, v, x: {"out": logits, "rest": []},
}
for name, make in RESULTS.items():
    CASES.add(f"the result is {name}", lambda make=make: Returning(make), passes(2))
CASES.add(
    "the result is an object", lambda: Returning(lambda logits, v, x: Plain(logits)), expected=SAME_OR_REFUSED
)
CASES.add(
    "the result is a generator's tuple", lambda: Returning(lambda logits, v, x: tuple(t for t in (logits, v)))
)


@CASES("the image itself is returned")
class ReturnsImage(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


@CASES("a penalty on weights is returned")
class ReturnsPenalty(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), sum(p.square().sum() for p in self.parameters())


@CASES("only what does not depend on the image is returned", expected=SAME_OR_REFUSED)
class ReturnsWeights(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.head.weight.square().sum()


def _train_and_eval(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model)
    model.eval()
    record.run(model)
    model.train()
    record.run(model)


@CASES("another result in eval mode", _train_and_eval)
class TrainAndEval(Small):
    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return {"out": out} if self.training else out.softmax(-1)


# --- what is printed ----------------------------------------------------------------------------------


class Handler(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__()
        self.kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


def _printing(x: Tensor) -> Tensor:
    print("shape", tuple(x.shape))
    return x


def _printing_values(x: Tensor) -> Tensor:
    print(f"mean {x.detach().mean():.4f}")
    return x


def _warning(x: Tensor) -> Tensor:
    warnings.warn("an odd size", stacklevel=2)
    return x


def _same_memory(x: Tensor) -> Tensor:
    y = x.clone()
    return y * 2 if x.data_ptr() == y.data_ptr() else y * 3


def _same_storage(x: Tensor) -> Tensor:
    y = x.clone()
    return y * 2 if x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() else y * 3


def _hinge_at_zero(v: Tensor) -> Tensor:
    zero = (v - v.detach()).sum()
    least = max(v.relu().amin(), (3 * v).relu().amin())
    return v * least + 2 * max(0, zero) + 3 * max(zero, 0) + min(v.mean(), 0.0)


CASES.on_map("data_ptr() decides", _same_memory, expected="data_ptr")
CASES.on_map("the data_ptr() of storages decides", _same_storage, expected="data_ptr")
CASES.on_vector("Python's max and min of equal values", _hinge_at_zero)


@CASES("maps without channels, images, rows and columns")
class Empty(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.maps(x)
        rest = torch.cat([x[:, :0], x], 1) + x[..., :0].sum() + x[:, :, 5:5].sum()
        return self.head(rest.mean((2, 3))), x[:, :0], x[:0], x[:, :, :0], x[..., :0]


CASES.on_map("print of shapes", _printing, passes(2))
CASES.on_map("print of values", _printing_values, passes(2), expected=SAME_OR_REFUSED)
CASES.on_map("warnings.warn", _warning, passes(2))


@CASES("logging", passes(2))
def logs() -> tuple[nn.Module, list[str]]:
    kept: list[str] = []
    logger = logging.Logger("net", logging.INFO)
    logger.addHandler(Handler(kept))

    def middle(x: Tensor) -> Tensor:
        logger.info("a map of %s", tuple(x.shape))
        return x

    return Applied(middle), kept


@CASES("tqdm over layers", passes(2))
class WithProgress(Small):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(2))

    def middle(self, x: Tensor) -> Tensor:
        from tqdm import tqdm

        for layer in tqdm(self.layers, bar_format="{n}", mininterval=1e9):
            x = torch.tanh(layer(x))
        return x


# --- decisions that hang on a rounding ----------------------------------------------------------------


def _decided_by_roundings(x: Tensor) -> Tensor:
    ones = 1 + 0 * x
    covered = F.adaptive_avg_pool2d(ones, (10, 10)).floor().mean((2, 3), keepdim=True)
    spread = (0.1 * ones).std((2, 3), keepdim=True)
    whole = ones.norm(dim=3, keepdim=True).square().amax(2, keepdim=True)
    return x * covered + x * (spread == 0) + spread * (1 + x) + x * (whole - x.shape[3]).round(decimals=6)


def _infinite_scores(x: Tensor) -> Tensor:
    scores = x.masked_fill(x.detach() > 0.5, -torch.inf)
    shares = F.interpolate(scores, (9, 11), mode="area").exp()
    return x * shares.mean((2, 3), keepdim=True) + F.adaptive_avg_pool2d(scores, (10, 9)).exp().mean()


CASES.on_map("decisions by coverage, deviation and norm", _decided_by_roundings)
CASES.on_map("means of scores that are masked by -inf", _infinite_scores)
