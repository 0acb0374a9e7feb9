"""Parts of a pass that are compiled: the same results, and as it was where nothing can be compiled."""

from __future__ import annotations

import copy
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, randomized
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch import config
from torch._inductor.exc import InvalidCxxCompiler
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from streamcnn import StreamingModel
from streamcnn.execution import compiled_steps
from streamcnn.execution.compiled import Compiled
from streamcnn.execution.compiled_steps import CompiledSteps
from streamcnn.execution.compiler import Compile, Run, by_inductor
from streamcnn.graph.ops import samples
from streamcnn.graph.ops.rules import Sample
from streamcnn.runtime import plan_cache

SHAPE = (2, 3, 24, 40)


class Net(nn.Module):
    """Statistics, a gate, dropout of maps and of the head, and a residual that is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.other = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.GroupNorm(2, 6)
        self.gate, self.drop = nn.Conv2d(6, 6, 1), nn.Dropout2d(0.3)
        self.head = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, momentum=None)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        y = self.other(self.second(self.drop(x)))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y = F.max_pool2d(F.silu(y.add_(x)), 2)
        return self.head(y.mean((2, 3)))


def traced(module: nn.Module, inputs: list[Tensor]) -> Run:
    """What Inductor is given, carried out by PyTorch's own operators."""
    with config.patch(backward_pass_autocast="off", force_non_lazy_backward_lowering=True):
        run: Run = aot_eager(module, inputs)
        return run


@pytest.fixture
def compile_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Compile], None]]:
    """Gives what is to stand in for Inductor."""

    def stand_in(compile_module: Compile) -> None:
        monkeypatch.setattr(plan_cache, "Compiled", lambda program: Compiled(program, compile_module))

    yield stand_in
    torch._dynamo.reset()


def update(model: nn.Module, image: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of a forward and a backward pass."""
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = [leaf for leaf in pytree.tree_leaves(model(image)) if leaf.is_floating_point()]
    sum((output.double() * torch.randn_like(output.double())).sum() for output in outputs).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    values = {f"output {place}": output.detach() for place, output in enumerate(outputs)}
    return {**values, **gradients, **buffers}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Errors are relative, but of what is small against the largest value, such as a bias's before a norm."""
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(value.double().norm() for value in expected.values())
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp(min=floor)
        assert error <= tolerance, f"{name}: {error}"


def models(net: nn.Module, **options: Any) -> tuple[StreamingModel, StreamingModel]:
    """The same model with and without compiling."""
    return StreamingModel(copy.deepcopy(net), **options, compile=True), StreamingModel(net, **options)


def num_compiled(model: StreamingModel) -> int | None:
    assert model.last_report is not None
    return model.last_report.num_compiled


@pytest.mark.parametrize("options", [{"tile": (24, 20)}, {}], ids=["tiles", "whole maps"])
@pytest.mark.parametrize("casts", [False, True], ids=["float64", "autocast"])
def test_what_was_met_is_compiled_before_the_next_pass(
    compile_by: Callable[[Compile], None], options: dict[str, Any], casts: bool
) -> None:
    compile_by(traced)
    torch.manual_seed(0)
    net = Net().to(torch.float32 if casts else torch.float64)
    compiling, plain = models(net, **options)
    image = torch.randn(SHAPE, dtype=torch.float32 if casts else torch.float64)
    counts: list[int] = []
    for seed in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            found, expected = (update(model, image, seed) for model in (compiling, plain))
        assert_close(found, expected)
        counts.append(num_compiled(compiling) or 0)
    assert counts[0] == 0 < counts[1] == counts[2]
    assert compiling.last_report is not None
    assert f"{counts[1]} parts of it are compiled" in compiling.last_report.explain()
    assert num_compiled(plain) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.name)
def test_every_operator_is_the_same_compiled(compile_by: Callable[[Compile], None], sample: Sample) -> None:
    compile_by(traced)
    torch.manual_seed(0)
    compiling, plain = models(randomized(sample.build()).double().train(sample.train), tile=(43, 20))
    compiling.resident_tail = plain.resident_tail = False
    image = torch.randn(sample.shape, dtype=torch.float64)
    for seed in range(2):
        found, expected = (update(model, image, seed) for model in (compiling, plain))
        assert_close(found, expected)
    assert num_compiled(compiling)


def test_inference_is_compiled_too(compile_by: Callable[[Compile], None]) -> None:
    compile_by(traced)
    compiling, plain = models(Net().double().eval(), tile=(24, 20))
    image = torch.randn(SHAPE, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad():
            assert_close({"output": compiling(image)}, {"output": plain(image)})
    assert num_compiled(compiling)


def test_another_threads_pass_may_meet_new_steps_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    # Many, so that the threads do meet.
    monkeypatch.setattr(compiled_steps, "_MOST", 20_000)
    steps = CompiledSteps(traced)
    known: list[Any] = [SimpleNamespace(level=level % 9, direction="forward") for level in range(20_000)]
    meeting = threading.Thread(target=lambda: [steps(step) for step in known])
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        meeting.start()
        while meeting.is_alive():
            assert steps.num_compiled == 0
            assert steps.candidates(torch.device("cpu"), None) == []
    finally:
        sys.setswitchinterval(interval)
        meeting.join()


def test_steps_are_recorded_on_one_thread(
    compile_by: Callable[[Compile], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd has a thread for each GPU, which does not see all that a recorder sets for its own."""
    on_others, make_fx = [], compiled_steps.make_fx

    def noting(function: Callable[..., Any]) -> Any:
        def noted(*given: Tensor) -> Any:
            on_others.append(torch._C._is_multithreading_enabled())
            return function(*given)

        return make_fx(noted)

    monkeypatch.setattr(compiled_steps, "make_fx", noting)
    compile_by(traced)
    model, _ = models(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double(), tile=24)
    model.resident_tail = False
    for _ in range(2):
        update(model, torch.randn(SHAPE, dtype=torch.float64))
    assert on_others
    assert not any(on_others)
    assert torch._C._is_multithreading_enabled()


def test_only_the_commonest_kinds_of_tiles_are_compiled(compile_by: Callable[[Compile], None]) -> None:
    met: list[int] = []

    def counted(module: nn.Module, inputs: list[Tensor]) -> Run:
        met.append(1)
        return traced(module, inputs)

    compile_by(counted)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).double()
    model = StreamingModel(net, tile=8, compile=True)
    for _ in range(3):
        with torch.no_grad():
            model(torch.randn(SHAPE, dtype=torch.float64))
    # Nine kinds of tiles: corners, edges and what is inside.
    assert len(met) == 4 == num_compiled(model)


def test_what_cannot_be_compiled_runs_as_it_is(compile_by: Callable[[Compile], None]) -> None:
    def fails_backward(module: nn.Module, inputs: list[Tensor]) -> Run:
        if "convolution_backward" in str(getattr(module, "code", "")):
            raise NotImplementedError("no such kernel\nwith details")
        return traced(module, inputs)

    compile_by(fails_backward)
    compiling, plain = models(Net().double(), tile=(24, 20))
    image = torch.randn(SHAPE, dtype=torch.float64)
    for model in (compiling, plain):
        update(model, image)
    with pytest.warns(
        UserWarning, match=r"of \d+ parts of a pass cannot be compiled .*backward: no such kernel$"
    ):
        found = update(compiling, image)
    assert_close(found, update(plain, image))
    assert num_compiled(compiling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(update(compiling, image), update(plain, image))


def test_without_a_compiler_one_message_says_so(compile_by: Callable[[Compile], None]) -> None:
    tried: list[int] = []

    def no_compiler(module: nn.Module, inputs: list[Tensor]) -> Run:
        tried.append(1)
        raise InvalidCxxCompiler

    compile_by(no_compiler)
    compiling, plain = models(Net().double(), tile=(24, 20))
    image = torch.randn(SHAPE, dtype=torch.float64)
    for model in (compiling, plain):
        update(model, image)
    with pytest.warns(UserWarning, match="compile=True: nothing can be compiled here: .*compiler"):
        update(compiling, image)
    update(plain, image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(update(compiling, image), update(plain, image))
    assert len(tried) == 1
    assert num_compiled(compiling) == 0


def test_compiled_parts_that_are_refused_memory_run_as_planned(compile_by: Callable[[Compile], None]) -> None:
    def greedy(module: nn.Module, inputs: list[Tensor]) -> Run:
        def run(*given: Tensor) -> Any:
            raise MemoryError("refused")

        return run

    compile_by(greedy)
    compiling, plain = models(Net().double(), budget="1GiB", tile=(24, 20))
    image = torch.randn(SHAPE, dtype=torch.float64)
    for _ in range(3):
        assert_close(update(compiling, image), update(plain, image))
    assert num_compiled(compiling) == 0


class Asserting(nn.Module):
    """A model that checks its own values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        torch._assert_async(y.abs().max() < 100, "too large")
        return y


class Hooked(nn.Module):
    """A model that notes its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.noted = nn.Conv2d(3, 4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        y.register_hook(self.note)
        return y

    def note(self, gradient: Tensor) -> None:
        self.noted += 1


def test_a_models_own_checks_are_not_compiled_away(compile_by: Callable[[Compile], None]) -> None:
    compile_by(traced)
    model = StreamingModel(Asserting(), tile=(24, 20), compile=True)
    image = torch.randn(SHAPE)
    update(model, image)
    with pytest.warns(UserWarning, match="segment 0: .*asserted' does more than compute"):
        update(model, image)
    with pytest.raises(AssertionError, match="too large"):
        model(image * 1e6)


def test_hooks_on_gradients_are_called_in_every_pass(compile_by: Callable[[Compile], None]) -> None:
    compile_by(traced)
    net = Hooked()
    model = StreamingModel(net, compile=True)
    image = torch.randn(SHAPE)
    update(model, image)
    for _ in range(2):
        with pytest.warns(
            UserWarning, match="nothing is compiled of this model: its own functions and hooks"
        ):
            update(model, image)
    assert net.noted == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_compiles_steps_and_segments() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    compiling, plain = models(net.double())
    for model in (compiling, plain):
        model.resident_tail = False
    image = torch.randn(SHAPE, dtype=torch.float64)
    for seed in range(2):
        assert_close(update(compiling, image, seed), update(plain, image, seed))
    # Convolution and normalisation, each forward and backward, and the values between them.
    assert num_compiled(compiling) == 7


@pytest.mark.parametrize("sizes", [{"x": 2**24}, {"y": 2**12, "x": 2**12}])
def test_a_pass_does_not_time_kernels(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]) -> None:
    """Where Inductor has one form of a kernel alone, it takes no memory to choose among several."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    from torch._inductor import config as inductor
    from torch._inductor.runtime.triton_heuristics import pointwise

    given: dict[str, Any] = {}
    monkeypatch.setattr(
        torch._inductor, "compile", lambda module, inputs, options: given.update(options) or module
    )
    by_inductor(nn.Identity(), [])
    with inductor.patch(given):
        chosen = {"autotune_pointwise": inductor.triton.autotune_pointwise}
    card = SimpleNamespace(type="cuda", warp_size_or_default=32)
    forms = pointwise(sizes, {"device": card}, inductor_meta=chosen, return_configs=True)
    assert len(forms) == 1
