"""Captured forward passes: used again while they hold, made anew when they do not."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.capture import capture
from streamcnn.capture.guarded import dynamo_graphs, guards
from streamcnn.errors import UnsupportedModel
from streamcnn.runtime import plan_cache

SHAPE = (2, 3, 29, 37)
TOLERANCE = 1e-9


class Net(nn.Module):
    """A convolution with batch norm, a place for code, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.norm(self.conv(x))).sin().mean((2, 3)))


def streamed(net: nn.Module, **options: Any) -> StreamingModel:
    model = StreamingModel(net, tile=16, **options)
    model.resident_tail = False
    return model


def pair(net: nn.Module) -> tuple[nn.Module, StreamingModel]:
    """The plain net and its streamed twin."""
    net = net.double()
    return copy.deepcopy(net), streamed(net)


def image(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """One pass in both directions: output, gradients, buffers."""
    model.zero_grad()
    output = model(image(seed))
    (output * torch.tensor([1.0, -2.0], dtype=torch.float64)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients, **{n: b.clone() for n, b in model.named_buffers()}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.double().norm()) for value in expected.values())
    for name, value in expected.items():
        distance = float((found[name].double() - value.double()).norm())
        assert distance <= TOLERANCE * max(float(value.double().norm()), 1e-6 * largest), name


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many graphs were captured and plans made."""
    counts = {"graphs": 0, "plans": 0}

    def counted(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(dynamo_graphs, "functionalized", "graphs")
    counted(plan_cache, "make_plan", "plans")
    return counts


# --- used again, or not ----------------------------------------------------------------------------------


def test_while_nothing_changes_one_capture_and_one_plan_do(made: dict[str, int]) -> None:
    plain, model = pair(Net())
    for seed in range(4):
        assert_same(update(model, seed), update(plain, seed))
    assert made == {"graphs": 1, "plans": 1}


class Table(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = {"scale": 1.0}

    def middle(self, x: Tensor) -> Tensor:
        return x * self.table["scale"]


def test_what_has_changed_is_captured_anew_and_known_again_when_it_is_back(made: dict[str, int]) -> None:
    plain, model = pair(Table())
    for scale in (1.0, 3.0, 1.0, 3.0):
        plain.table["scale"] = model.net.table["scale"] = scale
        assert_same(update(model), update(plain))
    assert made == {"graphs": 2, "plans": 2}


def test_inference_has_a_capture_of_its_own(made: dict[str, int]) -> None:
    plain, model = pair(Net())
    update(model), update(plain)
    with torch.no_grad():
        assert torch.allclose(model(image()), plain(image()), rtol=0, atol=1e-12)
    assert_same(update(model), update(plain))
    assert made == {"graphs": 2, "plans": 2}


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def middle(self, x: Tensor) -> Tensor:
        self.step += 1
        return x


def test_a_counter_counts_and_does_not_cost_a_plan(made: dict[str, int]) -> None:
    plain, model = pair(Counting())
    for _ in range(3):
        assert_same(update(model), update(plain))
    assert model.net.step == plain.step == 3
    assert made["plans"] == 1


def test_planning_alone_leaves_no_trace() -> None:
    _, model = pair(Counting())
    model.plan(SHAPE, torch.float64)
    assert model.net.step == 0


class Drawing(Net):
    def middle(self, x: Tensor) -> Tensor:
        print("drawing")
        return x * random.random()


def test_code_that_cannot_be_guarded_runs_once_a_pass(
    made: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, model = pair(Drawing())
    for seed in range(3):
        random.seed(seed)
        expected = update(plain)
        random.seed(seed)
        assert_same(update(model), expected)
    assert capsys.readouterr().out == "drawing\n" * 6
    # Every pass is captured, and what was drawn is another number each time.
    assert made == {"graphs": 0, "plans": 3}


class Announcing(Net):
    def middle(self, x: Tensor) -> Tensor:
        print("here")
        return x


def test_captures_that_are_alike_share_a_plan(made: dict[str, int]) -> None:
    plain, model = pair(Announcing())
    for seed in range(3):
        assert_same(update(model, seed), update(plain, seed))
    assert made["plans"] == 1


@pytest.fixture
def _compilation_off() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("_compilation_off")
def test_where_compilation_is_switched_off_each_pass_is_captured() -> None:
    plain, model = pair(Net())
    for seed in range(2):
        assert_same(update(model, seed), update(plain, seed))


def test_images_of_ever_new_sizes_do_not_pile_up_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "MOST_GRAPHS", 2)
    monkeypatch.setattr(guards, "MANY_SIZES", 10)
    plain, model = pair(Net())
    for height in (20, 21, 22, 20):
        x = torch.randn(1, 3, height, 23, dtype=torch.float64)
        assert torch.allclose(model(x), plain(x), rtol=0, atol=1e-12)
    assert model._call._guarded.count <= 2


# --- what is left, and what is refused -------------------------------------------------------------------


class Branching(Net):
    def middle(self, x: Tensor) -> Tensor:
        self.seen = x
        return x if x.mean() > 0 else -x


def test_a_refusal_prints_nothing_and_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    _, model = pair(Branching())
    with pytest.raises(UnsupportedModel, match=r"reads a value of a tensor .*capture.py:\d+: return x if"):
        model(image())
    assert capfd.readouterr() == ("", "")
    assert not hasattr(model.net, "seen")
    copy.deepcopy(model.net)


class Spectral(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(self.conv)


def test_a_forward_pass_that_is_repeated_reads_what_it_read_before() -> None:
    results = []
    for model in pair(Spectral()):
        output = model(image())
        output[:, 0].sum().backward(retain_graph=True)
        (output[:, 1] ** 2).sum().backward()
        results.append(
            {
                n: v.grad if v.grad is not None else v
                for n, v in (*model.named_parameters(), *model.named_buffers())
            }
        )
    assert_same(results[1], results[0])


def test_a_report_counts_what_waiting_passes_hold() -> None:
    _, model = pair(Net())
    first = model(image())
    assert model.last_report is not None
    assert model.last_report.waiting_bytes == 0
    second = model(image(1))
    # Of the first pass the convolution's output waits: (2, 4, 27, 35) in float64.
    assert model.last_report.waiting_bytes == 2 * 4 * 27 * 35 * 8
    (first + second).sum().backward()
    model(image(2))
    assert model.last_report.waiting_bytes == 0


# --- further results -------------------------------------------------------------------------------------


class WithFeatures(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.norm(self.conv(x)).sin()
        return self.head(features.mean((2, 3))), features


def test_the_gradient_of_a_result_with_respect_to_another() -> None:
    found = []
    for model in pair(WithFeatures()):
        logits, features = model(image())
        (weights,) = torch.autograd.grad(logits[:, 0].sum(), features, retain_graph=True)
        (logits.sum() + (features**2).sum()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"weights": weights, "features": features.detach(), **gradients})
    assert_same(found[1], found[0])


# --- the functional graph --------------------------------------------------------------------------------


class Written(Net):
    def middle(self, x: Tensor) -> Tensor:
        x = x * 1
        first, second = x[:, :2], x.narrow(1, 2, 2)
        first.mul_(2)
        second[:, 0, 3:-2].add_(first[:, 1, 3:-2])
        x.transpose(2, 3)[..., 4:9] = 0.5
        return x + x.flatten(2).cumsum(1).view_as(x)


def test_writes_through_views_reach_what_they_view() -> None:
    plain, model = pair(Written())
    assert_same(update(model), update(plain))


class Copied(Net):
    def middle(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y.copy_(x.sin() * 2)
        return y.cos()


def test_a_map_that_is_copied_into_another() -> None:
    plain, model = pair(Copied())
    assert_same(update(model), update(plain))


class Clipped(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data.clamp_(-0.1, 0.1)
        with torch.no_grad():
            self.head.weight.mul_(0.5)
        return super().forward(x)


def test_a_write_that_autograd_does_not_see_keeps_the_gradient() -> None:
    plain, model = pair(Clipped())
    for _ in range(2):
        assert_same(update(model), update(plain))
    assert torch.equal(model.net.head.weight, plain.head.weight)


def test_equal_graphs_have_equal_keys() -> None:
    from streamcnn.capture.forward_pass import capture as captured

    first, second = (captured(Net(), SHAPE, torch.float32) for _ in range(2))
    assert first.key == second.key
    assert first.key != captured(Net().eval(), SHAPE, torch.float32).key
    assert isinstance(first, capture.RawGraph)


def test_guards_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a line of the log, Dynamo would fill a buffer larger than the caches at each capture."""

    def timed(*_: object) -> float:
        raise AssertionError("guards are timed")

    monkeypatch.setattr(torch._dynamo.guards, "profile_guard_manager", timed)
    plain, model = pair(Net())
    assert torch.allclose(model(image()), plain(image()))


class Fivefold(torch.autograd.Function):
    """Multiplies by a factor; its gradient is not that of its formula."""

    @staticmethod
    def forward(x: Tensor, factor: float = 2) -> Tensor:
        return factor * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.factor = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 5 * ctx.factor * gradient, None


fivefold = Fivefold.apply


class Applies(nn.Module):
    """A function of the user's, in code that is captured anew at each pass if it draws."""

    def __init__(self, apply: Callable[[Tensor], Tensor], *, draws: bool) -> None:
        super().__init__()
        self.conv, self.apply_it, self.draws = nn.Conv2d(3, 4, 3), apply, draws

    def forward(self, x: Tensor) -> Tensor:
        if self.draws:
            random.random()
        return self.apply_it(self.conv(x))


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("arguments", [(), (3.0,)])
def test_a_function_has_its_default_arguments(arguments: tuple[float, ...], draws: bool) -> None:
    plain, model = pair(Applies(lambda x: Fivefold.apply(x, *arguments), draws=draws))
    for each in (plain, model):
        each(image()).square().mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "apply",
    [
        lambda x: fivefold(x, 3.0),
        lambda x: fivefold(x, 3.0) + 1,
        lambda x: Fivefold.apply(fivefold(x, 3.0), 2.0),
    ],
)
def test_an_apply_by_another_name_is_followed_or_refused(apply: Callable[[Tensor], Tensor]) -> None:
    plain, model = pair(Applies(apply, draws=False))
    for each in (plain, model):
        each(image()).square().mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    # That it is followed by its own name does not let it be passed over afterwards.
    pair(Applies(lambda x: Fivefold.apply(x), draws=True))[1](image())
    with pytest.raises(UnsupportedModel, match=r"the apply of Fivefold by another name.*write \.apply"):
        pair(Applies(apply, draws=True))[1](image())


class ReadsOutside(nn.Conv2d):
    """Reads a closure's variable, an entry of a default, and whether its weight is frozen."""

    def __init__(self, scale: Callable[[], float]) -> None:
        super().__init__(3, 4, 3)
        self.scale = scale

    def shifted(self, x: Tensor, by: list[float] = [0.0]) -> Tensor:  # noqa: B006
        return x + by[0]

    def forward(self, input: Tensor) -> Tensor:
        found = self.shifted(super().forward(input).mean((2, 3))) * self.scale()
        return found if self.weight.requires_grad else -found


def test_what_is_outside_is_looked_at_whatever_dynamo_makes_of_dicts_that_are_as_they_were() -> None:
    """With the settings that are PyTorch 2.11's defaults."""
    scale = 2.0
    net = ReadsOutside(lambda: scale)
    model, image = StreamingModel(net, tile=16), torch.rand(1, 3, 30, 30)
    settings = dict.fromkeys(
        (
            "use_recursive_dict_tags_for_guards",
            "skip_guards_on_constant_func_defaults",
            "skip_tensor_guards_with_matching_dict_tags",
        ),
        True,
    )
    with torch._dynamo.config.patch(settings):
        for value in (2.0, 3.0, 5.0):
            scale = value
            torch.testing.assert_close(model(image), net(image))
        for value in (1.0, 2.0, 0.0):
            ReadsOutside.shifted.__defaults__[0][0] = value
            torch.testing.assert_close(model(image), net(image))
        for value in (False, True):
            net.weight.requires_grad_(value)
            torch.testing.assert_close(model(image), net(image))
