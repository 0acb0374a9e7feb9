"""Norms that take along an activation and a sum: which do, what they give, and what they hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import plain_passes
import pytest
import torch
from helpers import assert_streamed_equals_plain, randomized, traced
from plain_passes import Block, Plain, make_net, take_passes
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamcnn import StreamingModel
from streamcnn.execution.steps import Steps
from streamcnn.graph.fusion import runs
from streamcnn.graph.ops import channel_kernels, fused_norms
from streamcnn.graph.program import Kind
from streamcnn.runtime import plan_cache
from streamcnn.support.models import load_model

LAST = torch.channels_last
SHAPE = (2, 3, 43, 41)


def chain(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *modules, nn.Conv2d(4, 2, 1))


def runs_of(net: nn.Module, num_images: int = 1) -> list[int]:
    """The lengths of a net's runs."""
    program, _ = traced(net.train(), (num_images, 3, 24, 24))
    nodes = [node for node in program.nodes.values() if node.kind is Kind.LOCAL]
    seen = {node.operands[0] for node in program.nodes.values() if node.kind is Kind.REDUCTION}
    return [len(run) for run in runs(nodes, seen | set(program.output_names))]


class Twice(nn.Module):
    """A norm that more than its activation reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.relu(y) * y


class Scaled(nn.Module):
    """A sum that is more than a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.add(self.norm(x), x, alpha=2))


class WithoutGradient(nn.Module):
    """An activation that autograd does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        with torch.no_grad():
            z = torch.relu(y)
        return z + x


class Overwritten(nn.Module):
    """What is normalised is overwritten between the norm and the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.relu(y + x.sigmoid_())


class Late(nn.Module):
    """A summand that is made of a smaller map, behind the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Conv2d(4, 1, 1)
        self.norm = nn.BatchNorm2d(4)
        self.factor = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        small = self.aside(x)
        y = self.norm(x)
        return torch.relu_(y.add_(small * self.factor))


class Broadcast(nn.Module):
    """A summand of fewer channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.offset = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x) + self.offset)


@torch.library.custom_op("streamcnn_tests::relu", mutates_args=(), tags=(torch.Tag.pointwise,))
def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0.5)


@torch.library.custom_op("streamcnn_tests::add", mutates_args=(), tags=(torch.Tag.pointwise,))
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y + 1


relu.register_fake(torch.empty_like)
add.register_fake(lambda x, y: torch.empty_like(x))


class NamedAsOthers(nn.Module):
    """A user's operators with the names of ATen's that do something else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(add(self.norm(x), x)) + relu(self.norm(x))


@pytest.mark.parametrize(
    ("net", "lengths"),
    [
        (chain(nn.BatchNorm2d(4), nn.ReLU()), [2]),
        (chain(nn.BatchNorm2d(4), nn.ReLU6(inplace=True)), [2]),
        (chain(nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Hardswish()), [2, 2]),
        (chain(nn.InstanceNorm2d(4), nn.LeakyReLU()), [2]),
        (chain(nn.BatchNorm2d(4), nn.GELU()), []),
        (chain(nn.BatchNorm2d(4)), []),
        (chain(nn.ReLU(), nn.BatchNorm2d(4)), []),
        (chain(Plain(4)), [3]),
        (chain(Block(4, 4, 1, nn.ReLU(), swaps=False)), [2, 3]),
        (chain(Block(4, 4, 1, nn.ReLU(), swaps=True)), [2, 3]),
        (chain(Twice()), []),
        (chain(Scaled()), []),
        (chain(WithoutGradient()), []),
        (chain(Overwritten()), []),
        (chain(NamedAsOthers()), []),
        (chain(Late()), []),
        (chain(Broadcast()), [3]),
    ],
)
def test_runs(net: nn.Module, lengths: list[int]) -> None:
    assert runs_of(net) == lengths


def test_norms_of_each_image_are_no_runs() -> None:
    """A card's kernels take one mean a channel, and that of a single image is one."""
    net = chain(nn.GroupNorm(2, 4), nn.ReLU(), nn.InstanceNorm2d(4), nn.SiLU())
    assert runs_of(net) == [2, 2]
    assert runs_of(net, num_images=2) == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Norms through the passes of a card, in plain operators: their activations, and whether they add."""
    found: list[tuple[str, bool]] = []
    take_passes(plain_passes, monkeypatch.setattr)
    original = plain_passes.normalised

    def told(*args: object) -> Tensor:
        found.append((args[4].kind, args[5] is not None))  # type: ignore[attr-defined]
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(plain_passes, "normalised", told)
    return found


@pytest.mark.parametrize("tile", [200, 24, (8, 200)])
def test_streamed_is_plain(calls: list[tuple[str, bool]], tile: int | tuple[int, int]) -> None:
    net = randomized(make_net()).to(memory_format=LAST)
    assert_streamed_equals_plain(net, SHAPE, tile=tile, one_tile=tile == 200)
    kinds = {("relu", False), ("leaky_relu", False), ("hardtanh", False), ("silu", False)}
    assert {*kinds, ("relu", True), ("hardswish", False), ("identity", False)} == set(calls)


@pytest.mark.parametrize("tile", [200, 24])
def test_running_statistics_are_taken_along_too(calls: list[tuple[str, bool]], tile: int) -> None:
    """As in inference, and where norms are frozen."""
    net = randomized(make_net()).to(memory_format=LAST).eval()
    assert_streamed_equals_plain(net, SHAPE, tile=tile, one_tile=tile == 200)
    assert {("silu", False), ("relu", True)} <= set(calls)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_take_activations_along(
    calls: list[tuple[str, bool]], without_gradients: Callable[[], AbstractContextManager[None]]
) -> None:
    net = randomized(make_net()).double().to(memory_format=LAST).eval()
    model = StreamingModel(net, tile=24)
    model.resident_tail = False
    image = torch.randn(SHAPE, dtype=torch.float64)
    with without_gradients():
        torch.testing.assert_close(model(image), net(image))
    assert {("silu", False), ("relu", True)} <= set(calls)


@pytest.mark.parametrize(("name", "adds"), [("resnet18", True), ("mobilenetv3_small_100", False)])
def test_networks_are_plain(calls: list[tuple[str, bool]], name: str, adds: bool) -> None:
    torch.manual_seed(0)
    net = randomized(load_model(name).train()).to(memory_format=LAST)
    assert_streamed_equals_plain(net, (1, 3, 75, 83), tile=200, one_tile=True, tolerance=1e-7, resident=None)
    assert (("relu", True) in calls) is adds


def test_without_kernels_operators_run_one_by_one(
    calls: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card without Triton, or where maps are NCHW."""
    monkeypatch.setattr(channel_kernels, "fits", lambda x: False)
    assert_streamed_equals_plain(randomized(make_net()), SHAPE, tile=24)
    assert not calls


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that there are while operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = [each.untyped_storage() for each in tree_leaves(result) if isinstance(each, Tensor)]
        self.made |= {StorageWeakRef(each): each.nbytes() for each in storages}
        self.made = {each: nbytes for each, nbytes in self.made.items() if not each.expired()}
        self.most = max(self.most, sum(self.made.values()))
        return result


@pytest.mark.parametrize(
    "net", [chain(nn.BatchNorm2d(4), nn.SiLU()), chain(Plain(4)), chain(Broadcast()), chain(Late())]
)
@pytest.mark.parametrize("has_kernels", [True, False])
def test_no_more_is_held_than_by_single_operators(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, has_kernels: bool
) -> None:
    """Also where a map lies so, or a summand is such, that the operators run one by one."""
    # Kernels take no memory but for what they give.
    make = SimpleNamespace(normalised=lambda x, *args: torch.empty_like(x))
    held = []
    for fuses in (False, True):
        take_passes(make, monkeypatch.setattr)  # type: ignore[arg-type]
        monkeypatch.setattr(channel_kernels, "fits", lambda x: has_kernels and x.dim() == 4)
        monkeypatch.setattr(
            plan_cache, "Steps", lambda program, plan, fuses, told=fuses: Steps(program, plan, fuses=told)
        )
        model = StreamingModel(net.eval().to(memory_format=LAST), tile=200)
        model.resident_tail = False
        with LiveBytes() as live:
            model(torch.rand(1, 3, 64, 64))
        held.append(live.most)
    assert 0 < held[1] <= held[0]


def test_an_activation_keeps_the_map_alone(calls: list[tuple[str, bool]]) -> None:
    """Nothing is saved of what a norm gives, nor of what its activation makes of that."""
    x = torch.randn(1, 4, 5, 6, requires_grad=True).to(memory_format=LAST)
    mean, scale, shift = (torch.rand(4, requires_grad=True) for _ in range(3))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        fused_norms._ActivatedNorm.apply(x, mean, scale, shift, fused_norms.Activation("silu"))
    assert [each.data_ptr() for each in saved if each.dim() == 4] == [x.data_ptr()]
