"""A pass that is refused memory in its middle begins again with smaller tiles and gives the same result."""

from __future__ import annotations

import copy

import pytest
import torch
from tile_operators import Evaluate, RefusedOnce, around_operators
from torch import Tensor, nn

from streamcnn import BudgetExceeded, StreamingModel
from streamcnn.ceiling.device import HostCeiling

SHAPE = (2, 3, 150, 131)


def make_net() -> nn.Module:
    """Two phases with random masks and running statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Dropout(0.3),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.BatchNorm2d(5, momentum=None),
        nn.Dropout2d(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    )
    return net.double()


def update(model: StreamingModel, *, autocast: bool = False) -> dict[str, Tensor]:
    """Everything that a training update leaves behind."""
    torch.manual_seed(7)
    image = torch.randn(
        SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(image.float() if autocast else image)
    output.square().sum().backward()
    left = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    left |= {"output": output.detach(), "random state": torch.get_rng_state()}
    assert image.grad is not None
    return {**left, "image gradient": image.grad, **dict(model.named_buffers())}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[dict[str, Tensor], int]:
    """What an update of a new net leaves that is refused nothing, and the operators that it evaluates."""
    counter = RefusedOnce(-1)
    with pytest.MonkeyPatch.context() as patch:
        around_operators(patch, counter)
        left = update(StreamingModel(make_net(), "1GiB", tile=64))
    return {name: value.clone() for name, value in left.items()}, counter.calls


@pytest.fixture(scope="module")
def planned() -> tuple[dict[str, Tensor], int]:
    """What an update leaves without a tile of its own, and the bytes that its plan projects."""
    model = StreamingModel(make_net(), "1GiB")
    model.resident_tail = False
    left = update(model)
    projected = model.plan(SHAPE, torch.float64).projected_bytes
    return {name: value.clone() for name, value in left.items()}, projected


@pytest.mark.parametrize("share", [0.0, 0.2, 0.45, 0.6, 0.8, 0.999])
def test_the_result_is_the_same(
    monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[dict[str, Tensor], int], share: float
) -> None:
    expected, num_calls = undisturbed
    refused = RefusedOnce(1 + int(share * num_calls))
    around_operators(monkeypatch, refused)
    model = StreamingModel(make_net(), "1GiB", tile=64)
    found = update(model)
    assert model.last_report is not None
    assert model.last_report.num_retries == 1
    assert "memory was refused 1 time and the pass begun again, 1 time by a smaller plan" in (
        model.last_report.explain()
    )
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(
    monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[dict[str, Tensor], int], share: float
) -> None:
    """Refused in the forward pass, in the first backward pass, or in the second and its forward pass."""
    expected, num_calls = undisturbed
    # Each backward pass but the first repeats the forward pass.
    refused = RefusedOnce(1 + int(share * 2 * num_calls))
    around_operators(monkeypatch, refused)
    model = StreamingModel(make_net(), "1GiB", tile=64)
    torch.manual_seed(7)
    image = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = model(image.requires_grad_()).square().sum()
    for retain in (True, False):
        model.zero_grad()
        image.grad = None
        loss.backward(retain_graph=retain)
        assert image.grad is not None
        left = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        left |= {"image gradient": image.grad, "random state": torch.get_rng_state()}
        left |= dict(model.named_buffers())
        assert_same(left, {name: value for name, value in expected.items() if name != "output"}, 1e-9)
    assert model.last_report is not None
    assert model.last_report.num_retries == 1


@pytest.mark.parametrize("at", [2, 12])
def test_without_a_tile_of_its_own_it_is_planned_for_less(
    monkeypatch: pytest.MonkeyPatch, planned: tuple[dict[str, Tensor], int], at: int
) -> None:
    expected, projected = planned
    refused = RefusedOnce(at)
    around_operators(monkeypatch, refused)
    model = StreamingModel(make_net(), "1GiB")
    model.resident_tail = False
    found = update(model)
    assert model.last_report is not None
    assert model.last_report.num_retries == 1
    assert model.last_report.projected_bytes < 0.95 * projected
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("tile", [None, 64])
def test_the_next_pass_begins_with_what_was_found(monkeypatch: pytest.MonkeyPatch, tile: int | None) -> None:
    refused = RefusedOnce(5)
    around_operators(monkeypatch, refused)
    model = StreamingModel(make_net(), "1GiB", tile=tile)
    model.resident_tail = False
    wanted = model.plan(SHAPE, torch.float64)
    with torch.no_grad():
        model(torch.zeros(SHAPE, dtype=torch.float64))
    assert model.last_report is not None
    assert model.last_report.num_retries == 1
    with torch.no_grad():
        model(torch.zeros(SHAPE, dtype=torch.float64))
        found = model.plan(SHAPE, torch.float64)
    assert model.last_report.num_retries == 0
    assert found.projected_bytes == model.last_report.projected_bytes < wanted.projected_bytes
    # Of another kind, it was not refused.
    assert model.plan(SHAPE, torch.float64) == wanted


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.9])
def test_where_code_was_not_looked_for_it_is_begun_as_before(
    monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[dict[str, Tensor], int], share: float
) -> None:
    net = make_net()
    _, num_calls = undisturbed
    first, second = (StreamingModel(copy.deepcopy(net), "1GiB", tile=64) for _ in range(2))
    for model in (first, second):
        update(model)
        model.zero_grad(set_to_none=True)
    expected = update(first)
    assert first.last_report is not None
    wanted = first.last_report.projected_bytes
    refused = RefusedOnce(1 + int(share * num_calls))
    around_operators(monkeypatch, refused)
    looks: list[bool] = []
    check = HostCeiling.check

    def noted(ceiling: HostCeiling, *, compiled: bool) -> None:
        looks.append(compiled)
        check(ceiling, compiled=compiled)

    monkeypatch.setattr(HostCeiling, "check", noted)
    assert_same(update(second), expected, 1e-12)
    report = second.last_report
    assert report is not None
    assert (report.num_retries, report.projected_bytes) == (1, wanted)
    # Not at first, and then as if for the first time.
    assert not looks[0]
    assert any(looks)
    # What is refused all the same is planned for less.
    second.zero_grad()
    refused.calls, refused.always = 0, True
    with pytest.raises(BudgetExceeded):
        update(second)


def test_what_did_not_go_through_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamingModel(make_net(), "1GiB")
    model.resident_tail = False
    wanted = model.plan(SHAPE, torch.float64)
    with monkeypatch.context() as patch:
        refused = RefusedOnce(3, always=True)
        around_operators(patch, refused)
        with pytest.raises(BudgetExceeded):
            model(torch.zeros(SHAPE, dtype=torch.float64))
    assert model.plan(SHAPE, torch.float64) == wanted


def test_the_mode_is_that_of_the_first_try(
    monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[dict[str, Tensor], int]
) -> None:
    expected, _ = undisturbed
    model = StreamingModel(make_net(), "1GiB", tile=64)
    refused = RefusedOnce(-1)
    around_operators(monkeypatch, refused)
    torch.manual_seed(7)
    image = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = model(image)
    model.eval()
    refused.at = refused.calls + 3
    output.square().sum().backward()
    assert model.last_report is not None
    assert model.last_report.num_retries == 1
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(found, {name: expected[name] for name in found}, 1e-9)


def test_autocast_is_that_of_the_first_try(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net().float()
    expected = update(StreamingModel(copy.deepcopy(net), "1GiB", tile=64), autocast=True)
    refused = RefusedOnce(40)
    around_operators(monkeypatch, refused)
    model = StreamingModel(net, "1GiB", tile=64)
    found = update(model, autocast=True)
    assert refused.calls > 40
    assert_same(found, expected, 3e-2)


class TwoOutputs(nn.Module):
    """The second output is the first where that is a global value, and another node where it is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2))
        self.drop = nn.Dropout(0.5).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x).relu()
        return y, self.drop(y)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("tails", [(True, False), (False, True)])
@pytest.mark.parametrize("at", [2, 12])
def test_another_resident_tail_is_no_matter(
    monkeypatch: pytest.MonkeyPatch, tails: tuple[bool, bool], train: bool, at: int
) -> None:
    torch.manual_seed(0)
    net = TwoOutputs().double()
    image = torch.randn(SHAPE, dtype=torch.float64)
    model = StreamingModel(net, "1GiB", tile=64)
    model.resident_tail = tails[0]
    refused = RefusedOnce(at)

    def changed(evaluate: Evaluate) -> Tensor:
        try:
            return refused(evaluate)
        except MemoryError:
            model.resident_tail = tails[1]
            raise

    around_operators(monkeypatch, changed)
    with torch.set_grad_enabled(train):
        found = model(image)
        expected = net(image)
    for output, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(output, reference, rtol=1e-12, atol=1e-12)
    if train:
        parameters = list(net.parameters())
        streamed = torch.autograd.grad([out.square().sum() for out in found], parameters)
        plain = torch.autograd.grad([out.square().sum() for out in expected], parameters)
        torch.testing.assert_close(streamed, plain, rtol=1e-9, atol=1e-9)
    assert refused.calls > at
    assert model.last_report is not None
    assert model.last_report.num_retries == 1


def test_inference_is_begun_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net().eval()
    image = torch.randn(SHAPE, dtype=torch.float64)
    refused = RefusedOnce(5)
    around_operators(monkeypatch, refused)
    model = StreamingModel(net, "1GiB", tile=64)
    with torch.no_grad():
        torch.testing.assert_close(model(image), net(image), rtol=1e-12, atol=1e-12)
    assert model.last_report is not None
    assert model.last_report.num_retries == 1


def test_a_pass_begun_again_by_the_same_plan_is_told_from_one_by_a_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = torch.randn(SHAPE, dtype=torch.float64)
    model = StreamingModel(make_net(), "1GiB", tile=64)
    # From now on the code of its steps is taken to be there.
    model(image)
    around_operators(monkeypatch, RefusedOnce(5))
    model(image)
    report = model.last_report
    assert report is not None
    assert (report.num_retries, report.num_smaller_plans) == (1, 0)
    assert "memory was refused 1 time and the pass begun again, by the same plan" in report.explain()


def test_when_the_smallest_tiles_are_refused_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    refused = RefusedOnce(3, always=True)
    around_operators(monkeypatch, refused)
    state = torch.get_rng_state()
    with pytest.raises(BudgetExceeded, match="tiles of 32x32 pixels, and there is no plan with smaller ones"):
        StreamingModel(net, "1GiB", tile=64)(
            torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator())
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is None for p in net.parameters())


def test_under_a_profiler_it_is_said_that_its_records_take_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = RefusedOnce(5)
    around_operators(monkeypatch, refused)
    model = StreamingModel(make_net(), "1GiB", tile=64)
    with torch.profiler.profile(), pytest.raises(BudgetExceeded, match="profile with budget=None"):
        update(model)
    with torch.profiler.profile() as profiled:
        update(model)
    assert any("convolution" in event.key for event in profiled.key_averages())
