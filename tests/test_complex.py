"""Networks with complex values: Fourier features, complex parameters, reductions of complex maps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import Shape
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.graph.program import has_gradient

SHAPE = (2, 3, 21, 17)
TILE = (8, 7)


def loss_of(output: Tensor) -> Tensor:
    """A real number that depends on every part of ``output``, unevenly."""
    flat = torch.view_as_real(output).flatten() if output.is_complex() else output.flatten()
    return (flat * torch.linspace(0.5, 1.5, flat.numel(), dtype=flat.dtype)).sum()


def assert_same_gradients(
    net: nn.Module, shape: Shape = SHAPE, *, resident: bool | None = None, tile: tuple[int, int] = TILE
) -> None:
    """Raise unless streamed loss and gradients, parts of complex ones alike, are those of plain PyTorch."""
    image = torch.randn(shape, dtype=torch.float64)
    twin = copy.deepcopy(net)
    model = StreamingModel(twin, tile=tile)
    model.resident_tail = False
    results = []
    for module in (net, model):
        leaf = image.clone().requires_grad_()
        loss = loss_of(module(leaf))
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    plan = model.plan(shape, torch.float64)
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)
    for (name, found), expected in zip(twin.named_parameters(), net.parameters(), strict=True):
        assert expected.grad is not None
        assert found.grad is not None, f"{name} has no gradient"
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-11)
        assert expected.grad.abs().max() > 1e-6
    assert max((phase.num_tiles for phase in plan.phases), default=0) > 1
    if resident is not None:
        assert bool(plan.residents) is resident, plan.residents


class Between(nn.Module):
    """Two real convolutions with a function of the map between them."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function
        self.last = nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


class ComplexScale(nn.Module):
    """Multiplies a map by complex weights, makes it real, and convolves."""

    def __init__(self, make_real: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(4, 1, 1, dtype=torch.complex128))
        self.bias = nn.Parameter(torch.randn(1, 4, 1, 1, dtype=torch.complex128))
        self.make_real = make_real
        self.last = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.make_real(x * self.weight + self.bias))


class FourierUnit(nn.Module):
    """A spectral block with a complex parameter of the spectrum's extent."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(4, 21, 9, dtype=torch.complex128))
        self.last = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        spectrum = torch.fft.rfft2(x, norm="ortho") * self.weight
        return self.last(x + torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho"))


class ComplexConvolution(nn.Module):
    """A convolution with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(2, 4, 3, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).to(torch.complex128)
        return nn.functional.conv2d(x, self.weight, padding=1).abs()


def rotated(x: Tensor) -> Tensor:
    """``x`` times a phase that depends on it, so that both parts count."""
    return x * torch.exp(1j * x)


SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "there and back": lambda f: f + torch.fft.irfft2(torch.fft.rfft2(f), s=f.shape[-2:]),
    "filtered": lambda f: f * torch.fft.ifft2(torch.fft.fft2(f) * 0.5j).imag,
    "one axis": lambda f: f + torch.fft.irfft(torch.fft.rfft(f, dim=2), n=f.shape[2], dim=2),
}

POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "absolute": lambda z: z.abs(),
    "angle": lambda z: z.angle(),
    "real and imaginary part": lambda z: z.real * z.imag,
    "conjugate": lambda z: (z * z.conj().exp()).real + z.conj().imag,
    "as real pairs": lambda z: torch.view_as_real(z).prod(-1),
    "pairs and back": lambda z: torch.view_as_complex(torch.view_as_real(z).sin()).abs(),
    "made of two": lambda z: torch.complex(z.real.sin(), z.imag).abs() + torch.polar(z.abs(), z.real).imag,
    "sign": lambda z: z.sgn().real,
    "conjugate in a checkpoint": lambda z: (z.conj() - z.mean((2, 3), keepdim=True)).abs(),
}

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda f: rotated(f).mean((2, 3)).abs(),
    "sum": lambda f: rotated(f).sum((0, 2, 3)),
    "mean of the absolute": lambda f: torch.fft.rfft2(f).abs().mean(),
    "norm": lambda f: torch.linalg.vector_norm(rotated(f), dim=(2, 3)),
    "norm of order 3": lambda f: torch.linalg.vector_norm(rotated(f), 3, (2, 3)),
    "norm of order 1": lambda f: torch.linalg.vector_norm(rotated(f), 1, (2, 3)),
    "variance": lambda f: rotated(f).var((2, 3)),
    "variance over the batch": lambda f: rotated(f).var((0, 2, 3)),
    "deviation and mean": lambda f: sum(torch.std_mean(rotated(f), (2, 3))),
    "gate": lambda f: (rotated(f) * rotated(f).mean((2, 3), keepdim=True)).abs(),
}


@pytest.mark.parametrize("case", SPECTRA.values(), ids=SPECTRA.keys())
def test_spectrum_of_a_map(case: Callable[[Tensor], Tensor]) -> None:
    assert_same_gradients(Between(case).double(), resident=False)


@pytest.mark.parametrize("case", POINTWISE.values(), ids=POINTWISE.keys())
def test_complex_parameter(case: Callable[[Tensor], Tensor]) -> None:
    assert_same_gradients(_double(ComplexScale(case)), resident=False)


@pytest.mark.parametrize("case", REDUCTIONS.values(), ids=REDUCTIONS.keys())
def test_reduction_of_a_complex_map(case: Callable[[Tensor], Tensor]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), _Function(case)).double()
    assert_same_gradients(net)


def test_complex_parameter_of_a_spectrum() -> None:
    assert_same_gradients(_double(FourierUnit()), resident=False)


def test_complex_convolution() -> None:
    assert_same_gradients(_double(ComplexConvolution()), resident=False)


def test_complex_output() -> None:
    assert_same_gradients(nn.Sequential(nn.Conv2d(3, 4, 3), _Function(rotated)).double())


class Overwritten(nn.Module):
    """Mixes channels by a complex matrix of which a view was changed in place."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex128))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.clone()
        self.change(weight)
        mixed = (weight.real + 2 * weight.imag)[:, :, None, None]
        return self.last(nn.functional.conv2d(self.first(x), mixed))


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "adjoint": lambda w: w.adjoint().mul_(2 - 1j),
    "mH": lambda w: w.mH.mul_(1j),
    "H": lambda w: w.H.mul_(1j),
    "a row of the adjoint": lambda w: w.mH[1].mul_(1j),
    "transposed": lambda w: w.mT.mul_(1j),
    "a row": lambda w: w[-1].add_(w[0] * 1j),
    "some rows": lambda w: w[1:].mul_(torch.tensor([[1j], [2], [3 + 1j]])),
    "every other column": lambda w: w[:, ::2].mul_(1j),
    "the diagonal": lambda w: w.diagonal().mul_(1j),
    "the conjugate": lambda w: w.conj().mul_(2 - 1j),
    "the real part": lambda w: w.real.mul_(w.imag.clone()),
    "the imaginary part": lambda w: w.imag.add_(w.real),
    "the imaginary part of a row of the conjugate": lambda w: w.conj()[1].imag.mul_(3),
    "the real part of the real part": lambda w: w.real.real.mul_(3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_view_of_a_complex_parameter_is_changed(change: Callable[[Tensor], object]) -> None:
    assert_same_gradients(_double(Overwritten(change)), resident=False)


def channels_turned(f: Tensor) -> Tensor:
    z = rotated(f)
    z[:, 1:3] *= 1j
    z[:, 0] = z[:, 3].conj()
    return z.real + z.imag


def parts_changed(f: Tensor) -> Tensor:
    z = rotated(f)
    z.real.mul_(f)
    z.imag[:, 1:3] += z.real[:, 1:3]
    z.conj().mul_(2 - 1j)
    z[:, :2].imag.mul_(3)
    return z.real + z.imag


def rows_turned(f: Tensor) -> Tensor:
    z = rotated(f)
    z[:, :, 2:17:3] = z[:, :, 4:9] * 1j
    return z.real + z.imag


def low_frequencies(f: Tensor) -> Tensor:
    """As Fourier neural operators keep them."""
    spectrum = torch.fft.rfft2(f)
    kept = torch.zeros_like(spectrum)
    kept[:, :, :5, :6] = spectrum[:, :, :5, :6] * (2 - 1j)
    kept[:, :, -5:, :6] = spectrum[:, :, -5:, :6]
    return torch.fft.irfft2(kept, s=f.shape[-2:])


@pytest.mark.parametrize(
    "change",
    [channels_turned, parts_changed, rows_turned, low_frequencies],
    ids=["channels", "real and imaginary parts", "rows", "low frequencies"],
)
def test_a_part_of_a_complex_map_is_assigned(change: Callable[[Tensor], Tensor]) -> None:
    assert_same_gradients(Between(change).double(), resident=False)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.complex64, True),
        (torch.int64, False),
        (torch.bool, False),
    ],
)
def test_has_gradient(dtype: torch.dtype, expected: bool) -> None:
    assert has_gradient(dtype) is expected


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _double(net: nn.Module) -> nn.Module:
    """``net`` with its real parameters in float64; its complex ones are so already."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.double()
    return net
