"""Losses on maps inside of a model, beside plain PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE
from operator_cases import by_name
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.execution.executor import PassEvent
from streamcnn.graph.ops import losses
from streamcnn.graph.ops.late_checks import check_late, checked_at_the_end

SHAPE = (2, 3, 33, 29)
CLASSES = 4
Loss = Callable[..., Tensor]


class WithLoss(nn.Module):
    """A small net and a loss of what it gives."""

    def __init__(self, loss: Loss, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Conv2d(3, CLASSES, 3, padding=1)
        self.loss = loss

    def forward(self, x: Tensor, *maps: Tensor) -> Any:
        return self.loss(self.net(x), *maps)


def an_image(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=dtype)


def some_classes(size: tuple[int, int] = (33, 29)) -> Tensor:
    return torch.randint(CLASSES, (2, *size), generator=torch.Generator().manual_seed(2))


def both(module: nn.Module, image: Tensor, *maps: Tensor, **options: Any) -> tuple[Any, Any, StreamingModel]:
    """Loss and gradients, streamed and plain; a model whose loss is cut into tiles."""
    plain = copy.deepcopy(module)
    model = StreamingModel(module, tile=(16, 13), **options)
    model.resident_tail = False
    found = []
    for each in (model, plain):
        given = image.clone().requires_grad_()
        loss = each(given, *maps)
        loss.sum().backward()
        found.append([loss.detach(), given.grad, *(p.grad for p in each.parameters())])
    return *found, model


def assert_equal(streamed: list[Tensor], plain: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for ours, theirs in zip(streamed, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


CASES = {
    "mean": F.cross_entropy,
    "weights and an ignored class": partial(
        F.cross_entropy, weight=torch.tensor([1.0, 0.2, 3.0, 0.5]).double(), ignore_index=1
    ),
    "smoothed, ignored, weighted": partial(
        F.cross_entropy,
        weight=torch.tensor([1.0, 0.2, 3.0, 0.5]).double(),
        ignore_index=3,
        label_smoothing=0.3,
    ),
    "smoothed sum": partial(F.cross_entropy, reduction="sum", label_smoothing=0.3),
    "each pixel": partial(F.cross_entropy, reduction="none", ignore_index=0),
    "negative logarithms": lambda x, target: F.nll_loss(x.log_softmax(1), target, ignore_index=2),
    "soft margin": lambda x, target: F.soft_margin_loss(x[:, 1], (target - 1.5).sign().double()),
    "module": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.2, 3.0, 0.5]).double()),
}


@by_name(CASES)
def test_a_loss_of_classes_is_that_of_plain_pytorch(case: Loss) -> None:
    streamed, plain, model = both(WithLoss(case).double(), an_image(), some_classes())
    assert_equal(streamed, plain)
    plan = model.plan(SHAPE, inputs=(some_classes(),))
    assert plan.residents == ()


def test_the_target_may_be_of_the_size_of_a_smaller_output() -> None:
    net = nn.Sequential(nn.Conv2d(3, CLASSES, 3, stride=2, padding=1), nn.Tanh())
    streamed, plain, model = both(WithLoss(F.cross_entropy, net).double(), an_image(), some_classes((17, 15)))
    assert_equal(streamed, plain)
    assert model.plan(SHAPE, inputs=(some_classes((17, 15)),)).residents == ()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_where_every_pixel_is_ignored_the_loss_is_what_plain_pytorch_gives(label_smoothing: float) -> None:
    loss = partial(F.cross_entropy, ignore_index=255, label_smoothing=label_smoothing)
    target = torch.full((2, 33, 29), 255)
    streamed, plain, _ = both(WithLoss(loss).double(), an_image(), target)
    assert torch.isnan(streamed[0])
    assert_equal(streamed, plain)


def test_a_mean_over_many_pixels_is_finite_in_half_precision() -> None:
    torch.manual_seed(0)
    image, target = torch.randn(1, 3, 300, 250), torch.randint(CLASSES, (1, 300, 250))
    net = nn.Conv2d(3, CLASSES, 1).bfloat16()
    with torch.no_grad():
        streamed = StreamingModel(WithLoss(F.cross_entropy, net), tile=64)(image.bfloat16(), target)
        exact = F.cross_entropy(net.float()(image.bfloat16().float()), target)
    assert streamed.dtype == torch.bfloat16
    # Scores have eight bits, and so has the mean; a sum of eight bits would stop far below.
    assert abs(float(streamed) - float(exact)) < 0.03


def test_a_loss_is_that_of_plain_pytorch_under_autocast() -> None:
    module = WithLoss(F.cross_entropy)
    image, target = an_image(torch.float32), some_classes()
    with torch.autocast("cpu"):
        streamed, plain, _ = both(module, image, target)
    assert streamed[0].dtype == plain[0].dtype == torch.float32
    assert_equal(streamed, plain, tolerance=0.02)


def test_a_class_that_there_is_not_is_an_error_as_in_plain_pytorch() -> None:
    target = some_classes()
    target[1, 20, 7] = 4
    module = WithLoss(F.cross_entropy).double()
    with pytest.raises(IndexError, match="Target 4 is out of bounds"):
        module(an_image(), target)
    with pytest.raises(IndexError, match="Target 4 is out of bounds"):
        StreamingModel(module, tile=16)(an_image(), target)


@pytest.mark.parametrize("weight", [None, torch.ones(CLASSES, dtype=torch.float64)])
@pytest.mark.parametrize("unknown", [-1, CLASSES])
def test_a_class_that_there_is_not_is_told_when_the_phase_ends(
    monkeypatch: pytest.MonkeyPatch, weight: Tensor | None, unknown: int
) -> None:
    """As on a GPU, where it would end all work of the process if a kernel met it."""
    monkeypatch.setattr(losses, "_is_fatal", lambda target: not target.is_floating_point())
    module = WithLoss(partial(F.cross_entropy, weight=weight, ignore_index=2)).double()
    target = some_classes()
    streamed, plain, _ = both(module, an_image(), target)
    assert_equal(streamed, plain)
    target[1, 20, 7] = unknown
    model = StreamingModel(module, tile=16)
    model.resident_tail = False
    events: list[PassEvent] = []
    model.observer = events.append
    with pytest.raises(IndexError, match=f"Target {unknown} is out of bounds"):
        model(an_image(), target)
    assert [event.part for event in events] == ["phase", "phase"]


def test_a_late_check_waits_for_the_end_of_its_block_alone() -> None:
    made: list[list[int]] = []
    one, two, three, four = (torch.arange(count) for count in (1, 2, 3, 4))
    with checked_at_the_end():
        check_late(one, made.append)
        check_late(three, made.append)
        with checked_at_the_end():
            check_late(two, made.append)
        assert made == [[0, 1]]
    check_late(four, made.append)
    assert made == [[0, 1], [0], [0, 1, 2], [0, 1, 2, 3]]
    with suppress(KeyError), checked_at_the_end():
        check_late(one, made.append)
        raise KeyError
    assert len(made) == 4


@pytest.mark.parametrize("options", [{}, {"full": True, "reduction": "sum"}, {"reduction": "none"}], ids=str)
def test_a_loss_that_looks_at_its_variances(options: dict[str, Any]) -> None:
    loss = nn.GaussianNLLLoss(**options)

    def gaussian(x: Tensor, target: Tensor) -> Tensor:
        return loss(x[:, :2], target, F.softplus(x[:, 2:]))

    target = torch.randn(2, 2, 33, 29, dtype=torch.float64)
    module = WithLoss(gaussian).double()
    streamed, plain, model = both(module, an_image(), target)
    assert_equal(streamed, plain)
    assert model.plan(SHAPE, inputs=(target,)).residents == ()
    module.loss = lambda x, target: loss(x[:, :2], target, x[:, 2:])
    with pytest.raises(AssertionError, match="var has negative"):
        StreamingModel(module, tile=16)(an_image(), target)


def test_operands_of_other_extents_are_broadcast() -> None:
    target = torch.randn(2, 1, 33, 29, dtype=torch.float64)
    module = WithLoss(lambda x, y: F.mse_loss(*torch.broadcast_tensors(x, y))).double()
    streamed, plain, model = both(module, an_image(), target)
    assert_equal(streamed, plain)
    assert model.plan(SHAPE, inputs=(target,)).residents == ()


def test_what_looks_along_space_is_resident() -> None:
    def along_rows(x: Tensor, target: Tensor) -> Tensor:
        return x.gather(2, target[:, None].expand(-1, CLASSES, -1, -1)).mean((2, 3))

    streamed, plain, model = both(WithLoss(along_rows).double(), an_image(), some_classes())
    assert_equal(streamed, plain)
    (resident,) = model.plan(SHAPE, inputs=(some_classes(),)).residents
    assert resident.startswith("aten.gather: it looks values up along a spatial axis")


def test_the_logits_of_a_loss_are_not_gathered() -> None:
    module = WithLoss(F.cross_entropy, nn.Conv2d(3, 8, 3, padding=1))
    model = StreamingModel(module, tile=256)
    shape, target = (1, 3, 4096, 4096), torch.zeros(1, 4096, 4096, dtype=torch.int64)
    plan = model.plan(shape, inputs=(target,))
    logits = 8 * 4 * 4096**2
    assert plan.residents == ()
    assert plan.projected_bytes < logits / 2


class Reading(nn.Module):
    """The columns of an image as a text, and its CTC loss."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.SiLU(), nn.Conv2d(5, CLASSES, 3, padding=1))
        self.loss = loss

    def forward(self, x: Tensor, target: Tensor, *lengths: Tensor) -> Any:
        columns = self.body(x).mean(2).permute(2, 0, 1)
        return self.loss(columns.log_softmax(2), target, *lengths)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CTCLoss(),
        nn.CTCLoss(reduction="none", blank=2),
        nn.CTCLoss(reduction="sum", zero_infinity=True),
        torch.ctc_loss,
        lambda y, target, had, wanted: F.ctc_loss(y[:, 0], target[0], had[0], wanted[0]),
        lambda y, target, had, wanted: F.ctc_loss(y, target, had.tolist(), (3, 2)),
    ],
)
def test_ctc(loss: Loss) -> None:
    torch.manual_seed(0)
    target = torch.tensor([[1, 3, 1], [3, 3, 1]])
    # The second text has no room where reduction is "sum".
    lengths = torch.tensor([27, 2 if getattr(loss, "zero_infinity", False) else 9]), torch.tensor([3, 3])
    streamed, plain, model = both(Reading(loss).double(), an_image(), target, *lengths)
    for found, expected in zip(streamed, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert plain[1].norm() > 0
    assert sum(phase.num_tiles for phase in model.plan(SHAPE, inputs=(target, *lengths)).phases) > 1
