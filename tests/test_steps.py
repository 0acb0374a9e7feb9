"""What is computed for a tile: a function of tensors, which another implementation can stand in for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import streaming_plan
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from streamcnn import StreamingModel
from streamcnn.capture.capture import module_states
from streamcnn.execution import steps
from streamcnn.execution.build_step import backward_step, forward_step
from streamcnn.execution.eager import compute_eagerly
from streamcnn.execution.executor import Execution
from streamcnn.execution.step import Compute, MakeCompute, Step
from streamcnn.geometry.regions import Region
from streamcnn.plan.storage import Tier
from streamcnn.stores import MemoryStore, Store, StoreSpec

SHAPE = (2, 3, 9, 40)
TILE = 8
CPU = torch.device("cpu")


class Plain(nn.Module):
    """Statistics, in-place activations, and a map that is read at once and stored for later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        y = self.second(x)
        gate = torch.sigmoid(y.mean((2, 3), keepdim=True))
        return self.last(self.relu(y.sin() * gate + x)).square().mean((2, 3))


class Positional(nn.Module):
    """Operators and reductions that compute with positions, and windows that are not aligned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.norm, self.up = nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 4, 3, stride=2)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.drop(F.silu(self.norm(self.first(x))))
        peak = F.adaptive_max_pool2d(x, 1).flatten(1)
        x = F.interpolate(self.up(x), scale_factor=2, mode="bilinear")
        return peak, F.avg_pool2d(x, 3, 2).tanh().mean((2, 3))


class Stopped(nn.Module):
    """Gradients that end: what one result does not reach, what is detached, and a block without any."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm, self.other = nn.BatchNorm2d(4), nn.Conv2d(3, 2, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.first(x))
        with torch.no_grad():
            scale = 1 + self.second(y).abs().mean((2, 3), keepdim=True)
        z = self.second(y) / scale + y[:, :, 1:-1, 1:-1].detach()
        return z.square().mean((2, 3)), self.other(x).amax((2, 3))


NETS = [Plain, Positional, Stopped]


@dataclass
class Reader:
    """Regions of an image, told of each read."""

    image: Tensor
    touched: Callable[[], None]
    device: torch.device = CPU

    def read(self, region: Region) -> Tensor:
        self.touched()
        return self.image[:, :, region.rows.start : region.rows.stop, region.cols.start : region.cols.stop]

    def settle(self) -> None:
        """Nothing: the image is as it is."""


class ToldStore(MemoryStore):
    """A store that tells of every read and write."""

    def __init__(self, spec: StoreSpec, touched: Callable[[], None]) -> None:
        super().__init__(spec, CPU)
        self._touched = touched

    def _check(self, region: Region, tile: Tensor | None = None) -> None:
        self._touched()
        super()._check(region, tile)


@dataclass
class Run:
    """What a pass gives, and the steps that it was made of."""

    results: dict[str, Tensor]
    steps: list[Step]
    num_tiles: int
    """In both directions."""


def run(
    make_net: Callable[[], nn.Module],
    make_compute: MakeCompute = compute_eagerly,
    touched: Callable[[], None] = lambda: None,
    unused: int = 0,
) -> Run:
    """Outputs and gradients of a net, without a gradient for its last ``unused`` outputs."""
    torch.manual_seed(0)
    net = make_net().double()
    program, plan = streaming_plan(net, SHAPE, TILE)
    known, steps = module_states(net), []
    states = {name: known[qualified].detach() for name, qualified in program.states.items()}
    reader = Reader(torch.randn(SHAPE, dtype=torch.float64), touched)

    def open_store(spec: StoreSpec, tier: Tier, tile: tuple[int, int]) -> Store:
        return ToldStore(spec, touched)

    def noted(step: Step) -> Compute:
        steps.append(step)
        return make_compute(step)

    execution = Execution(
        program,
        plan,
        {**states, **program.constants},
        {program.image: reader},
        open_store,
        make_compute=noted,
    )
    values = execution.forward()
    outputs = {name: values[name] for name in program.output_names}
    used = list(outputs)[: len(outputs) - unused]
    found = execution.backward({name: torch.randn_like(outputs[name]) for name in used})
    assert len(found) > 1
    gradients = {f"gradient of {name}": gradient for name, gradient in found.items()}
    return Run({**outputs, **gradients}, steps, sum(report.num_tiles for report in execution.reports))


def assert_equal(found: Run, expected: Run) -> None:
    assert found.results.keys() == expected.results.keys()
    for name, value in expected.results.items():
        assert torch.equal(found.results[name], value), name


def traced(step: Step) -> Compute:
    """The step as one graph of ATen operators, recorded from the first tile of its kind."""
    graphs: list[Callable[..., Any]] = []

    def compute(inputs: list[Tensor]) -> Any:
        if not graphs:

            def whole(*given: Tensor) -> list[Any]:
                return list(compute_eagerly(step)(list(given)))

            graphs.append(make_fx(whole)(*inputs))
        return graphs[0](*inputs)

    return compute


@pytest.mark.parametrize("net", NETS)
def test_a_recorded_graph_stands_in_for_every_kind_of_tile(net: Callable[[], nn.Module]) -> None:
    expected, found = run(net), run(net, traced)
    assert_equal(found, expected)
    kinds = {(step.direction, step.level, step.kind) for step in found.steps}
    assert {direction for direction, *_ in kinds} == {"forward", "backward"}
    # One for each kind of tile, not for each tile, unless positions make each a kind of its own.
    assert len(found.steps) == len(kinds)
    assert net is Positional or len(kinds) < found.num_tiles


@pytest.mark.parametrize("net", NETS)
def test_a_computation_touches_no_store_and_gives_the_same_again(net: Callable[[], nn.Module]) -> None:
    computing = False

    def touched() -> None:
        assert not computing, "a computation reads or writes a map"

    def twice(step: Step) -> Compute:
        eager = compute_eagerly(step)

        def compute(inputs: list[Tensor]) -> list[Any]:
            nonlocal computing
            before = [tensor.clone() for tensor in inputs]
            computing = True
            first, second = list(eager(list(inputs))), list(eager(list(inputs)))
            computing = False
            assert len(first) == len(step.outputs)
            # Inputs may be a store's memory.
            assert_same(before, inputs)
            assert_same(first, second)
            return first

        return compute

    assert_equal(run(net, twice, touched), run(net))


def assert_same(first: Any, second: Any) -> None:
    leaves, others = pytree.tree_leaves(first), pytree.tree_leaves(second)
    assert len(leaves) == len(others)
    for one, other in zip(leaves, others, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one is other


def test_a_computation_may_empty_what_it_is_given() -> None:
    left: list[int] = []

    def watched(step: Step) -> Compute:
        def compute(inputs: list[Tensor]) -> list[Any]:
            outputs = list(compute_eagerly(step)(inputs))
            left.append(len(inputs))
            return outputs

        return compute

    assert_equal(run(Plain, watched), run(Plain))
    assert set(left) == {0}


def test_what_is_differentiated_stands_in_the_step() -> None:
    everything, some = run(Stopped), run(Stopped, unused=1)
    first, second = (
        {s.level: s for s in each.steps if s.direction == "backward"} for each in (everything, some)
    )
    assert first.keys() == second.keys()
    arriving = [sum(len(step.owned) for step in steps.values()) for steps in (first, second)]
    assert arriving[0] > arriving[1] > 0
    # A parameter that only the unused result depends on has no gradient, rather than one of zeros.
    missing = everything.results.keys() - some.results.keys()
    assert len(missing) == 2, missing


def test_a_later_pass_finds_the_steps_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(make: Callable[..., Step]) -> Callable[..., Step]:
        def call(*args: Any) -> Step:
            made.append(make.__name__)
            return make(*args)

        return call

    for make in (forward_step, backward_step):
        monkeypatch.setattr(steps, make.__name__, counted(make))
    model = StreamingModel(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)), tile=TILE
    )
    image = torch.randn(SHAPE)
    model(image)[:, :1].sum().backward()
    assert {"forward_step", "backward_step"} == set(made)
    made.clear()
    model(image).square().sum().backward()
    assert not made


@pytest.mark.parametrize("kernel", [3, (5, 1)])
def test_bands_are_padded_along_rows_alone(kernel: int | tuple[int, int]) -> None:
    """Columns are the convolution's own affair: what is read of a band, and its gradient, has whole rows."""
    layers = [nn.Conv2d(3, 3, kernel, padding="same") for _ in range(2)]
    program, plan = streaming_plan(nn.Sequential(*layers), (1, 3, 50, 40), (16, 40))
    convolutions = [
        operator
        for phase in plan.phases
        for row in range(len(phase.row_kinds))
        for operator in forward_step(program, phase, (row, 0)).operators
    ]
    assert any(operator.keywords["padding"][0] == 0 for operator in convolutions)
    for operator in convolutions:
        (operand,) = operator.operands.values()
        assert operand.window.cols == operand.part.cols
        assert operator.keywords["padding"][1] == (1 if kernel == 3 else 0)
