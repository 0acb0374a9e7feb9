"""Code that people write in a forward pass: streamed it is the same, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.compatibility.case import Case, Cases, Record, Small, Steps, one_pass, passes
from benchmarks.compatibility.cases import all_cases
from benchmarks.compatibility.comparison import Result, compare
from benchmarks.compatibility.snapshot import differences, snapshot
from streamcnn import StreamingModel
from streamcnn.errors import UnsupportedModel

# TorchScript, which a case has, is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")


def _parameters() -> list[Any]:
    return [
        pytest.param(case, id=f"{number:03} {case.name}", marks=[pytest.mark.slow] if case.slow else [])
        for number, case in enumerate(all_cases(), 1)
    ]


@pytest.mark.parametrize("case", _parameters())
def test_case(case: Case) -> None:
    result = compare(case)
    assert result.holds, result.explain()


# --- the comparison would notice ----------------------------------------------------------------------


def compared(
    monkeypatch: pytest.MonkeyPatch, forward: Any, expected: str = "same", steps: Steps = one_pass
) -> Result:
    """A case whose streamed passes are ``forward(net, image)``."""
    monkeypatch.setattr(StreamingModel, "forward", lambda model, image: forward(model.net, image))
    cases = Cases("none")
    cases.add("none", Small, steps, expected=expected)
    return compare(cases[0])


def test_the_plain_pass_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    result = compared(monkeypatch, lambda net, image: net(image))
    assert result.holds
    assert result.error == 0


def _leaves_attribute(net: nn.Module, image: Tensor) -> Tensor:
    net.left = 1
    return net(image)


def _leaves_hook(net: nn.Module, image: Tensor) -> Tensor:
    net.conv.register_forward_hook(lambda module, inputs, output: None)
    return net(image)


def _leaves_buffer(net: nn.Module, image: Tensor) -> Tensor:
    out = net(image)
    net.norm.running_mean[0] += 1e-6
    return out


def _prints(net: nn.Module, image: Tensor) -> Tensor:
    print("a tile")
    return net(image)


def _fails(net: nn.Module, image: Tensor) -> Tensor:
    raise RuntimeError("something")


def _gradient_mode(net: nn.Module, image: Tensor) -> Tensor:
    out = net(image)
    torch.set_default_dtype(torch.float64)
    return out


FAULTS = {
    "another output": lambda net, image: net(image) * (1 + 1e-8),
    "another gradient": lambda net, image: net(image * 1.0 + 1e-8 * image.detach()),
    "no gradient of the image": lambda net, image: net(image.detach()),
    "no gradient at all": lambda net, image: net(image).detach(),
    "another structure": lambda net, image: [net(image)],
    "an attribute is left": _leaves_attribute,
    "a hook is left": _leaves_hook,
    "a buffer differs": _leaves_buffer,
    "the default dtype is left": _gradient_mode,
    "something is printed": _prints,
    "another error": _fails,
}


@pytest.mark.parametrize("forward", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, forward: Any) -> None:
    result = compared(monkeypatch, forward, "same or refused")
    assert result.verdict == "WRONG"
    assert not result.holds


def _refuses(net: nn.Module, image: Tensor) -> Tensor:
    raise UnsupportedModel("not this one")


@pytest.mark.parametrize(
    ("expected", "holds"),
    [("same", False), ("same or refused", True), ("not this", True), ("another", False)],
)
def test_a_refusal_holds_where_it_is_expected(
    monkeypatch: pytest.MonkeyPatch, expected: str, holds: bool
) -> None:
    result = compared(monkeypatch, _refuses, expected)
    assert result.verdict == "refused: not this one"
    assert result.holds is holds


def test_a_refusal_must_not_change_the_net(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(net: nn.Module, image: Tensor) -> Tensor:
        net(image)
        raise UnsupportedModel("too late")

    assert compared(monkeypatch, forward, "same or refused").verdict == "WRONG"


def test_a_refusal_does_not_excuse_the_pass_before(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def forward(net: nn.Module, image: Tensor) -> Tensor:
        calls.append(1)
        return 2 * net(image) if len(calls) == 1 else _refuses(net, image)

    assert compared(monkeypatch, forward, "same or refused", passes(2)).verdict == "WRONG"


def test_a_refusal_does_not_do_where_another_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compared(monkeypatch, lambda net, image: net(image), "not this one").holds


def test_a_script_that_fails_on_the_plain_net_is_no_case() -> None:
    def steps(model: Any, net: nn.Module, record: Record) -> None:
        raise ZeroDivisionError

    cases = Cases("none")
    cases.add("none", Small, steps)
    with pytest.raises(ZeroDivisionError):
        compare(cases[0])


def test_a_fake_tensor_is_no_tensor() -> None:
    with torch._subclasses.FakeTensorMode():
        fake = torch.zeros(3)
    (found,) = differences(snapshot(torch.zeros(3)), snapshot(fake))
    assert found.error == float("inf")
