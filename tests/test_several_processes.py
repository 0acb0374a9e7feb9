"""What processes do together in a forward pass, compared with one that has all their images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from process_groups import in_two_processes
from torch import Tensor, nn
from torch import distributed as dist

from streamcnn import StreamingModel
from streamcnn.capture.guarded import guards
from streamcnn.errors import BudgetExceeded, UnsupportedModel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package here")

SIZES = ((40, 36), (33, 50))
"""Of the two processes' images; their plans differ."""


class Both(nn.Module):
    """Two branches and their sum."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Any:
        return self.first(x) + self.second(x)


class Apart(Both):
    """Two branches, each with a result."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x.sigmoid()).mean((2, 3))


def make_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Both(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8, momentum=None)
            ),
            nn.Sequential(nn.Conv2d(8, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8, affine=False)),
        ),
        nn.Tanh(),
        nn.BatchNorm2d(8, track_running_stats=False),
        Pooled(),
        nn.BatchNorm1d(8),
        nn.Linear(8, 5),
    ).to(dtype)


def image_of(rank: int, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.rand(2, 3, *SIZES[rank], generator=generator, dtype=dtype)


def loss_of(result: Tensor, rank: int) -> Tensor:
    return (result * torch.arange(1, 6, device=result.device) * (1 + rank)).sin().sum()


def with_all_images(layer: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """A layer on maps of several sizes, norms by the statistics of all of them."""
    if isinstance(layer, nn.Sequential):
        for each in layer:
            maps = with_all_images(each, maps)
        return list(maps)
    if isinstance(layer, Both):
        pairs = zip(with_all_images(layer.first, maps), with_all_images(layer.second, maps), strict=True)
        return [first + second for first, second in pairs]
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return [layer(x) for x in maps]
    rows = [x.transpose(0, 1).flatten(1).T for x in maps]
    joined = torch.cat(rows)
    normalised = layer(joined if isinstance(layer, nn.BatchNorm1d) else joined[:, :, None, None]).flatten(1)
    parts = normalised.split([len(each) for each in rows])
    return [
        part.T.reshape(x.transpose(0, 1).shape).transpose(0, 1) for part, x in zip(parts, maps, strict=True)
    ]


def two_steps(model: nn.Module, net: nn.Module, rank: int) -> dict[str, Any]:
    """Gradients of two steps, and what is left of them in the buffers."""
    for step in range(2):
        image = image_of(rank, step).to(next(net.parameters()).device).requires_grad_()
        result = model(image)
        loss_of(result, rank).backward()
    net.eval()
    with torch.no_grad():
        evaluated = model(image)
    return {
        "result": result.detach(),
        "evaluated": evaluated,
        "image": image.grad,
        "gradients": {name: p.grad for name, p in net.named_parameters()},
        "buffers": dict(net.named_buffers()),
    }


def normalised_together(rank: int) -> list[dict[str, Any]]:
    """The same net with other tiles, and with its last layers on whole maps."""
    found = []
    for tile, resident_tail in (((16, 12 + 4 * rank), False), ((40, 64), True)):
        net = nn.SyncBatchNorm.convert_sync_batchnorm(make_net())
        model = StreamingModel(net, tile=tile)
        model.resident_tail = resident_tail
        found.append(two_steps(model, net, rank))
    return found


def test_synchronised_batch_norm_is_batch_norm_of_all_images(tmp_path: Path) -> None:
    net = make_net()
    for step in range(2):
        images = [image_of(rank, step).requires_grad_() for rank in range(2)]
        results = with_all_images(net, images)
        sum(loss_of(result, rank) for rank, result in enumerate(results)).backward()
    plain = copy.deepcopy(net).eval()
    for first, second in zip(*in_two_processes(normalised_together, tmp_path), strict=True):
        for name, parameter in net.named_parameters():
            both = first["gradients"][name] + second["gradients"][name]
            torch.testing.assert_close(both, parameter.grad, rtol=1e-9, atol=1e-11)
        for rank, found in enumerate((first, second)):
            torch.testing.assert_close(found["result"], results[rank], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(found["image"], images[rank].grad, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(found["evaluated"], plain(images[rank]), rtol=1e-9, atol=1e-11)
            for name, buffer in net.named_buffers():
                torch.testing.assert_close(found["buffers"][name], buffer, rtol=1e-9, atol=1e-11)


def beside_plain_on_a_card(rank: int) -> list[dict[str, Any]]:
    """PyTorch's own synchronised norms, and the same streamed."""
    found = []
    for tile in (None, (16, 12 + 4 * rank)):
        net = nn.SyncBatchNorm.convert_sync_batchnorm(make_net().cuda())
        model = net if tile is None else StreamingModel(net, tile=tile)
        values = two_steps(model, net, rank)
        found.append(torch.utils._pytree.tree_map(lambda value: value.cpu(), values))
    return found


@pytest.mark.gpu
@pytest.mark.real
def test_synchronised_batch_norm_is_that_of_plain_pytorch(tmp_path: Path) -> None:
    for plain, streamed in in_two_processes(beside_plain_on_a_card, tmp_path):
        torch.testing.assert_close(streamed, plain, rtol=1e-8, atol=1e-10)


class WithCollective(nn.Module):
    """Weighs channels by what all processes have of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        weight = x.mean((2, 3))
        if self.kind == "all_reduce":
            dist.all_reduce(weight)
        elif self.kind == "largest":
            weight = weight * 2
            dist.all_reduce(weight, op=dist.ReduceOp.MAX)
            weight = weight * weight
        elif self.kind == "all_gather":
            gathered = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, weight)
            weight = torch.stack(gathered).sum(0) * weight
        elif self.kind == "differentiable":
            weight = torch.distributed.nn.functional.all_reduce(weight)
        elif self.kind == "broadcast":
            dist.broadcast(weight, 0)
        return self.last(x * weight[:, :, None, None]).square().mean((2, 3))


FOLLOWED = ("all_reduce", "largest", "all_gather", "differentiable")


def with_collectives(rank: int) -> dict[str, Any]:
    """Results and gradients of plain PyTorch and streamed; the error of what is not followed."""
    found: dict[str, Any] = {}
    for kind in FOLLOWED:
        nets = [WithCollective(kind).double() for _ in range(2)]
        for net, module in zip(nets, (nets[0], StreamingModel(nets[1], tile=(8, 8))), strict=True):
            result = module(image_of(rank, 0))
            result.sum().backward()
            found.setdefault(kind, []).append((result.detach(), [p.grad for p in net.parameters()]))
    with pytest.raises(UnsupportedModel) as error:
        StreamingModel(WithCollective("broadcast").double(), tile=(8, 8))(image_of(rank, 0))
    found["refused"] = str(error.value)
    # A group of one process, and what the other one has for it.
    net = nn.SyncBatchNorm.convert_sync_batchnorm(make_net(), dist.new_group([0]))
    found["alone"] = [
        module(image_of(rank, 0)).detach() for module in (make_net(), StreamingModel(net, tile=16))
    ]
    branches = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Apart(*branches).double())
    StreamingModel(net, tile=(16, 16))(image_of(rank, 0))[1].sum().backward()
    found["reached"] = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None}
    nets = (nn.SyncBatchNorm.convert_sync_batchnorm(make_net()), WithCollective("differentiable").double())
    found["exceeded"] = [refused_memory(net, rank) for net in nets]
    return found


def refused_memory(net: nn.Module, rank: int) -> str:
    """The error of a pass that needs more than it is given."""
    model = StreamingModel(net, budget="256MiB")
    model.observer = lambda event: hold_too_much()
    with pytest.raises(BudgetExceeded) as exceeded:
        model(image_of(rank, 0))
    return str(exceeded.value)


def hold_too_much() -> None:
    raise torch.OutOfMemoryError("made up")


def test_collectives_have_the_gradients_of_plain_pytorch(tmp_path: Path) -> None:
    for found in in_two_processes(with_collectives, tmp_path):
        for kind in FOLLOWED:
            plain, streamed = found[kind]
            torch.testing.assert_close(streamed, plain, rtol=1e-9, atol=1e-12)
        plain, streamed = found["alone"]
        torch.testing.assert_close(streamed, plain, rtol=1e-9, atol=1e-12)
        assert found["reached"] == {"second"}
        assert "the forward pass calls torch.distributed.broadcast" in found["refused"]
        for error in found["exceeded"]:
            assert "a pass in which processes meet is not begun again" in error


def test_cumulative_averages_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    begin = guards._Graphs.__call__

    def count(*args: Any) -> Any:
        captured.append(args)
        return begin(*args)

    monkeypatch.setattr(guards._Graphs, "__call__", count)
    model = StreamingModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)), tile=(16, 16))
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for thread in (first, second, first, second):
            thread.submit(model, torch.rand(1, 3, 32, 32)).result()
    assert len(captured) == 1


def test_synchronised_norms_in_one_process_are_ordinary_ones() -> None:
    nets = [make_net(), nn.SyncBatchNorm.convert_sync_batchnorm(make_net())]
    plain, streamed = (
        two_steps(module, net, 0)
        for module, net in zip((nets[0], StreamingModel(nets[1], tile=(16, 12))), nets, strict=True)
    )
    torch.testing.assert_close(streamed, plain, rtol=1e-9, atol=1e-11)
