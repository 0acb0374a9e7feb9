"""verify(): it sees what is wrong, and leaves the model as it was."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from streamcnn import verification, verify
from streamcnn.execution.backward_tile import BackwardTile
from streamcnn.execution.combiner import Combiner
from streamcnn.execution.interpreter import TileRun
from streamcnn.runtime.streamed_pass import Pass
from streamcnn.verification import Verification, relative_errors, rounding

SHAPE = (2, 3, 25, 29)
TILE = 12


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.Dropout2d(0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def check(net: nn.Module | None = None, **options: Any) -> Verification:
    return verify(make_net() if net is None else net, SHAPE, tile=TILE, **options)


def test_right_results_have_small_errors() -> None:
    found = check()
    assert found.max_error < 1e-9
    assert set(found.errors) == {
        "output 0",
        "image gradient",
        *(f"gradient of {name}" for name, _ in make_net().named_parameters()),
        *(f"buffer {name}" for name, _ in make_net().named_buffers()),
    }
    assert found.num_phases == 2
    assert found.num_tiles == 9
    assert found.notes == ("1 dropout layers were switched off",)
    assert check(make_net().eval()).notes == ()


class WithDecision(nn.Module):
    """A network that says the class as well."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.net(x)
        return scores, scores.argmax(1), scores > 0


def test_outputs_may_be_whole_numbers_and_truths() -> None:
    found = check(WithDecision())
    assert found.max_error < 1e-9
    assert {"output 0", "output 1", "output 2"} <= found.errors.keys()


@dataclass
class Parts:
    """A result with names, one of them for a result within it."""

    scores: Tensor
    inner: Any
    share: float = 0.5


class Pair(NamedTuple):
    mean: Tensor
    nothing: None = None


class Structured(nn.Module):
    """Adds an error to one output only, of which no gradient knows, in copies of its copies."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.copies, self.error = 0, error

    def __deepcopy__(self, memo: dict[int, Any]) -> Structured:
        copied = copy.copy(self)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        copied.copies += 1
        return copied

    def forward(self, x: Tensor) -> Parts:
        x = self.conv(x)
        mean = x.mean((2, 3)) + (self.error if self.copies == 2 else 0.0)
        return Parts(x.amax((2, 3)), {"pair": [Pair(mean)]})


def test_outputs_in_dataclasses_and_other_structures_are_compared() -> None:
    found = check(Structured())
    assert {name for name in found.errors if name.startswith("output")} == {f"output {i}" for i in range(3)}
    assert found.max_error < 1e-9
    wrong = check(Structured(error=1e-3)).errors
    assert wrong["output 1"] > 1e-5
    assert max(error for name, error in wrong.items() if name != "output 1") < 1e-9


class Conditioned(nn.Module):
    """A network of an image, a map, numbers of the image, and a factor by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 3, padding=1)
        self.factor = nn.Parameter(torch.full((5, 1, 1), 0.7))

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        numbers: dict[str, Tensor],
        *,
        factor: Tensor | None = None,
        rows: Tensor | None = None,
        power: int = 1,
    ) -> Tensor:
        x = self.conv(torch.cat((x, mask), 1)) * self.factor
        if factor is not None:
            x = x * factor
        x = x.mean((2, 3)) + numbers["age"] ** power
        return x if rows is None else x[rows]


def further_inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "inputs": (torch.rand(2, 1, *SHAPE[2:]), {"age": torch.rand(2, 5, requires_grad=True)}),
        "named_inputs": {"factor": torch.rand(5, 1, 1), "rows": torch.tensor([1, 0]), "power": 2},
    }


def test_further_inputs_go_into_both_passes_and_their_gradients_are_compared() -> None:
    given = further_inputs()
    found = check(Conditioned(), **given)
    assert found.max_error < 1e-9
    assert set(found.errors) == {
        "output 0",
        "image gradient",
        "gradient of conv.weight",
        "gradient of conv.bias",
        "gradient of factor",
        "gradient of input 0",
        "gradient of input 1['age']",
        "gradient of input factor",
    }
    # The caller's own are neither cast nor given gradients.
    assert given["inputs"][1]["age"].grad is None
    assert given["inputs"][0].dtype == torch.float32
    assert not given["inputs"][0].requires_grad


def test_wrong_gradients_of_further_inputs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Combiner, "add_map_gradient", ignored)
    errors = check(Conditioned(), **further_inputs()).errors
    assert errors["gradient of input 0"] > 0.1


class Fourier(nn.Module):
    """A filter with a complex parameter, a complex buffer, and a complex output besides a real one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(4, 1, 1, dtype=torch.complex64))
        self.register_buffer("phase", torch.tensor(0.6 + 0.8j))

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x) * self.weight * self.phase + shift
        return x.mean((2, 3)), x.abs().mean((2, 3))


def test_complex_parameters_buffers_inputs_and_outputs_are_compared() -> None:
    found = check(Fourier(), inputs=(torch.randn(4, 1, 1, dtype=torch.complex64),))
    assert found.max_error < 1e-9
    assert {"gradient of weight", "gradient of input 0", "buffer phase", "output 0"} <= found.errors.keys()


def test_errors_of_imaginary_parts_are_seen() -> None:
    assert errors_of(torch.tensor([3 + 4j]), torch.tensor([3 + 1j])) == pytest.approx(3 / 5)


def test_float32_shows_rounding() -> None:
    assert 1e-9 < check(dtype=torch.float32).errors["output 0"] < 1e-5


def test_sizes_are_errors_where_the_true_value_is_zero() -> None:
    large, noise = 1e3 * torch.ones(1), 1e-4 * torch.ones(1)
    errors, sizes = relative_errors(
        {"gradient": {"x": large, "bias": noise}}, {"gradient": {"x": large, "bias": 0 * noise}}
    )
    # The plain one is rounding alone, a tenth of the floor of 1e-6 * 1e3; the streamed one is exact.
    assert errors["bias"] == pytest.approx(0.1)
    assert sizes == {"x": 1.0, "bias": 0.0}


def test_explain_names_the_worst_first() -> None:
    text = Verification(
        {"a": 0.5, "b": 2e-16, "c": 1.0}, num_tiles=4, num_phases=2, sizes={}, notes=("a note",)
    ).explain()
    assert text == (
        "streamed in 2 phases of up to 4 tiles against plain PyTorch: "
        "largest error 1.00e+00 over 3 comparisons\n"
        "  1.00e+00  c\n"
        "  5.00e-01  a\n"
        "  2.00e-16  b\n"
        "a note"
    )


def test_explain_counts_one_phase_and_one_tile() -> None:
    text = Verification({"a": 0.5}, num_tiles=1, num_phases=1, sizes={}, notes=()).explain()
    assert text.startswith("streamed in 1 phase of up to 1 tile against plain PyTorch")


def shifted(*args: Any) -> Tensor:
    value: Tensor = ORIGINAL_EVALUATE(*args)
    return value + 1e-6


def zeroed(tile: BackwardTile, name: str, share: Tensor) -> Tensor:
    return torch.zeros_like(share)


def ignored(*args: Any) -> None:
    pass


ORIGINAL_EVALUATE = TileRun.evaluate_operator


@pytest.mark.parametrize(
    ("owner", "method", "wrong", "names"),
    [
        (TileRun, "evaluate_operator", shifted, {"output 0"}),
        (BackwardTile, "arriving", zeroed, {"gradient of 0.weight", "image gradient"}),
        (Combiner, "add_map_gradient", ignored, {"gradient of 0.weight", "image gradient"}),
    ],
    ids=["values", "reduction gradients", "map gradients"],
)
def test_wrong_results_are_seen(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, wrong: Any, names: set[str]
) -> None:
    monkeypatch.setattr(owner, method, wrong)
    errors = check().errors
    assert all(errors[name] > 1e-9 for name in names), errors


def test_wrong_buffers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pass, "updated", lambda self, values, outputs: outputs)
    assert check().errors["buffer 1.running_mean"] == pytest.approx(1)


def errors_of(expected: Tensor, found: Tensor) -> float:
    return relative_errors({"output": {"x": expected}}, {"output": {"x": found}})[0]["x"]


def test_errors_that_a_maximum_would_hide() -> None:
    ones, nan = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    assert errors_of(ones, nan) == math.inf
    assert errors_of(nan, ones) == math.inf
    assert errors_of(ones, torch.ones(1)) == math.inf
    assert errors_of(ones, torch.ones(3, 3)) == math.inf
    assert errors_of(ones, 2 * ones) == pytest.approx(1)
    missing, _ = relative_errors({"gradient": {"x": ones}}, {"gradient": {}})
    surplus, _ = relative_errors({"gradient": {}}, {"gradient": {"x": ones, "zero": 0 * ones, "nan": nan}})
    assert missing == {"x": 1.0}
    assert surplus == {"x": math.inf, "zero": 0.0, "nan": math.inf}
    net = make_net()
    with torch.no_grad():
        net[7].weight[0, 0] = math.nan
    assert check(net).max_error == math.inf


def test_gradients_that_were_there_do_not_hide_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 1e12)
    monkeypatch.setattr(Combiner, "add_map_gradient", ignored)
    assert check(net).errors["gradient of 0.weight"] > 0.1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_the_model_and_the_random_state_stay_as_they_were(training: bool, context: Any) -> None:
    net = make_net().train(training)
    net[0].requires_grad_(False)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    identities = [id(tensor) for tensor in (*net.parameters(), *net.buffers())]
    states = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state()
    with context():
        found = check(net)
    assert "gradient of 3.weight" in found.errors
    assert "gradient of 0.weight" not in found.errors
    assert [id(tensor) for tensor in (*net.parameters(), *net.buffers())] == identities
    assert all(torch.equal(value, states[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters() if p.grad is not None)
    assert [p.requires_grad for p in net.parameters()].count(False) == 2
    assert all(module.training is training for module in net.modules())
    assert net[4].p == 0.3
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_random_state_is_put_back_after_an_error() -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x if x.sum() > 0 else -x

    branching, other = Branching(nn.Conv2d(3, 4, 3)), nn.Conv2d(5, 4, 3)
    random_state = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match="cannot be captured"):
        verify(branching, SHAPE)
    with pytest.raises(RuntimeError, match="to have 5 channels, but got 3"):
        verify(other, SHAPE)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_numbers_are_drawn_on_the_host_whatever_device_is_the_default() -> None:
    net, shape = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (2, 3, 29, 23)
    expected = verify(net, shape, tile=12).errors, rounding(net, shape)
    with torch.device("meta"):
        assert (verify(net, shape, tile=12).errors, rounding(net, shape)) == expected


def test_rounding_is_looked_at_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def note(model: nn.Module, call: Any, seed: int) -> dict[str, dict[str, Tensor]]:
        devices.append(call.image.device.type)
        return {}

    monkeypatch.setattr(verification, "_everything", note)
    assert rounding(nn.Conv2d(3, 2, 3).to("meta"), (1, 3, 9, 8)) == {}
    assert devices == ["meta", "meta"]
