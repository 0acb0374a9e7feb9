"""On a CUDA device: kernels for maps whose channels lie beside each other, and passes through them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import ModuleType

import emulated_card
import plain_passes
import pytest
import torch
from gpu_cases import GPU, SHAPE, assert_same, make_net, update
from helpers import randomized
from plain_passes import ACTIVATIONS
from torch import Tensor

from streamcnn import StreamingModel
from streamcnn.graph.ops import channel_kernels
from streamcnn.stores import MemoryStore

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu_left_clean")]


@pytest.fixture(params=["Triton", "ATen"])
def kernels(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """Whose kernels are called where channels lie beside each other."""
    if request.param == "ATen":
        monkeypatch.setenv(channel_kernels.VARIABLE, "0")
    elif emulated_card.is_wanted() and not emulated_card.interprets_kernels():
        pytest.skip("the emulated card runs Triton's kernels under the interpreter alone")
    channel_kernels._passes.cache_clear()
    assert (channel_kernels._passes(GPU, torch.float32) is None) is (request.param == "ATen")
    yield request.param
    channel_kernels._passes.cache_clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, kernels: str) -> list[str]:
    """The kernels for channels beside each other, each time that one is called."""
    called: list[str] = []

    def told(module: ModuleType, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (called.append(name), function(*args))[1])

    if kernels == "ATen":
        for name in ("update_stats", "elemt", "backward_reduce", "backward_elemt"):
            told(torch, f"batch_norm_{name}")
    else:
        from streamcnn.graph.ops import triton_passes

        for name in ("moments", "normalised", "gradients", "plus_line"):
            told(triton_passes, name)
    return called


@pytest.mark.parametrize("tile", [64, (32, 200), 200])
@pytest.mark.parametrize("num_images", [1, 2])
def test_channels_last(
    monkeypatch: pytest.MonkeyPatch, launched: list[str], num_images: int, tile: int | tuple[int, int]
) -> None:
    """Through the kernels for this layout, with maps that keep it from phase to phase.

    In float32: on a card convolutions of float64 give NCHW, whatever they are given.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    read: list[Tensor] = []
    original = MemoryStore._read
    monkeypatch.setattr(MemoryStore, "_read", lambda *args: (read.append(original(*args)), read[-1])[1])
    net = make_net().to(GPU, memory_format=torch.channels_last)
    image = torch.randn((num_images, *SHAPE[1:]), device=GPU).to(memory_format=torch.channels_last)
    expected = update(copy.deepcopy(net).double(), image.double())
    launched.clear()
    model = StreamingModel(net, "3GB", tile=tile)
    model.resident_tail = False
    assert_same(update(model, image), expected, 1e-4)
    assert len(set(launched)) == 4
    assert len(read) >= 4
    assert all(part.stride(1) == 1 for part in read)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gaps", [False, True])
def test_kernels_for_channels_last(kernels: str, dtype: torch.dtype, gaps: bool) -> None:
    """Each computes what it says, also of a view cut out of a map and where the mean is large."""
    torch.manual_seed(0)
    whole = 20 + torch.randn(2, 5, 40, 33, dtype=torch.float64)
    whole = whole.to(GPU, dtype, memory_format=torch.channels_last)
    x = whole[:, :, 1:-2, 3:] if gaps else whole
    assert channel_kernels.fits(x)
    assert not channel_kernels.fits(x.contiguous())
    assert channel_kernels.takes_activations(x) is (kernels == "Triton")
    gradient = torch.randn(x.shape, device=GPU).to(dtype).to(memory_format=torch.channels_last)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    mean, variance = channel_kernels.moments(x)
    assert mean.dtype == variance.dtype == stats
    scale, slope, offset = (torch.rand(5, dtype=stats, device=GPU) + 0.5 for _ in range(3))
    sent_on, total, product = channel_kernels.gradients(x, gradient, mean, scale, offset)
    exact, sent = x.double(), gradient.double()
    middle, a, b, c = (v.double()[:, None, None] for v in (mean, scale, slope, offset))
    expected = {
        "mean": (mean, exact.mean((0, 2, 3))),
        "variance": (variance, exact.var((0, 2, 3), correction=0)),
        "normalised": (
            channel_kernels.normalised(x, mean, scale, offset),
            (exact - middle) * a + c,
        ),
        "gradient": (sent_on, sent * a),
        "sum": (total, sent.sum((0, 2, 3))),
        "product": (product, (sent * (exact - middle)).sum((0, 2, 3))),
        "line": (
            channel_kernels.plus_line(gradient, x, channel_kernels.line(mean, slope, offset)),
            sent + b * (exact - middle) + c,
        ),
    }
    accuracy = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[str(dtype)[6:]]
    for name, (found, right) in expected.items():
        of_maps = found.dim() == 4
        assert found.dtype == (dtype if of_maps else stats), name
        assert not of_maps or found.is_contiguous(memory_format=torch.channels_last), name
        # Sums and statistics are not rounded to the map's type.
        allowed = (accuracy if of_maps else min(accuracy, 1e-5)) * float(right.abs().max())
        assert float((found.double() - right).abs().max()) <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2, 3, 5), (2, 24, 90, 111), (1, 64, 333, 400), (3, 2050, 8, 8)])
def test_norms_that_take_activations_along(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As in plain operators, in float64, of maps of some sizes and alignments."""
    if emulated_card.is_wanted() and not emulated_card.interprets_kernels():
        pytest.skip("the emulated card runs Triton's kernels under the interpreter alone")
    torch.manual_seed(0)
    x, gradient, summand, mean, scale, shift = (
        each.to(GPU) for each in plain_passes.operands(shape, dtype, torch.Generator().manual_seed(0))
    )
    assert channel_kernels.takes_activations(x)
    expected = [*plain_passes.moments(x.double())]
    found = [*channel_kernels.moments(x)]
    for activation in ACTIVATIONS:
        for added in (None, summand):
            found.append(channel_kernels.normalised(x, mean, scale, shift, activation, added))
            expected.append(plain_passes.normalised(x.double(), mean, scale, shift, activation, added))
        given = (mean, scale, shift, activation)
        found.extend(channel_kernels.gradients(x, gradient, *given))
        expected.extend(plain_passes.gradients(x.double(), gradient.double(), *given))
    for value, right in zip(found, expected, strict=True):
        error = (value.double() - right).abs().max() / right.abs().max()
        assert float(error) <= 64 * torch.finfo(value.dtype).eps


@pytest.mark.parametrize("tile", [200, 24, (8, 200)])
def test_fused_norms(
    monkeypatch: pytest.MonkeyPatch, launched: list[str], tile: int | tuple[int, int]
) -> None:
    """A net with every form that is fused."""
    # Not by `flags()`, which leaves cuDNN off, and PyTorch's own convolutions give NCHW.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net = randomized(plain_passes.make_net()).to(GPU, memory_format=torch.channels_last)
    image = torch.randn(2, 3, 43, 41, device=GPU).to(memory_format=torch.channels_last)
    expected = update(copy.deepcopy(net).double(), image.double())
    launched.clear()
    model = StreamingModel(net, "3GB", tile=tile)
    model.resident_tail = False
    assert_same(update(model, image), expected, 1e-3)
    assert len(set(launched)) == 4
