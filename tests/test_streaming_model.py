"""StreamingModel in a user's hands: training loops, inference, saving, sources and stores."""

from __future__ import annotations

import copy
import gc
import io
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamcnn import StreamingModel, TensorSource, ZarrSource
from streamcnn.ceiling.device import HostCeiling
from streamcnn.data.sources import ImageSource, write_zarr_image
from streamcnn.geometry.regions import Region
from streamcnn.plan.plan import Phase
from streamcnn.plan.storage import Tier
from streamcnn.runtime.streamed_pass import Pass

SHAPE = (2, 3, 37, 45)
TILE = 16
TOLERANCE = 1e-9


class Gate(nn.Module):
    """Squeeze-excite: a reduction in the middle of the network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


def make_net(seed: int = 0) -> nn.Sequential:
    """A train-mode float64 classifier with every kind of phase and a bias that has a gradient."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3),
        Gate(5),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    return net.double()


def make_image(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streamed_and_plain(**options: Any) -> tuple[StreamingModel, nn.Module]:
    """A streamed net and its twin. Nothing is left to the resident tail: all of it is cut into tiles."""
    net = make_net()
    plain = copy.deepcopy(net)
    model = StreamingModel(net, tile=TILE, **options)
    model._resident_tail = False
    return model, plain


def loss_of(output: Tensor, seed: int = 0) -> Tensor:
    return (output * make_image(seed, tuple(output.shape))).sum()


def error_of(value: Tensor | None, reference: Tensor | None, largest: float = 0.0) -> float:
    """Relative distance; a gradient of less than 1e-6 of the largest counts as noise."""
    assert value is not None
    assert reference is not None
    assert value.shape == reference.shape
    reference = reference.detach().double()
    floor = max(float(reference.norm()), 1e-6 * largest, 1e-300)
    return float((value.detach().double() - reference).norm()) / floor


def assert_same_gradients(streamed: nn.Module, plain: nn.Module, tolerance: float = TOLERANCE) -> None:
    expected = {name: p.grad for name, p in plain.named_parameters()}
    found = {name: p.grad for name, p in streamed.named_parameters()}
    assert found.keys() == expected.keys()
    assert any(grad is not None for grad in expected.values())
    largest = max(float(grad.norm()) for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None, name
        else:
            assert error_of(found[name], grad, largest) <= tolerance, name


def assert_same_states(streamed: nn.Module, plain: nn.Module, tolerance: float = TOLERANCE) -> None:
    found, expected = streamed.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert error_of(found[name], value) <= tolerance, name


def assert_identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def everything(model: nn.Module, image: Any) -> dict[str, Tensor]:
    """The output and all gradients of one pass."""
    model.zero_grad()
    output = model(image)
    loss_of(output).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return {"output": output.detach(), **gradients}


# --- the training loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
        # Adam divides by the square root of gradients: those of the bias before batch norm are noise.
        lambda parameters: torch.optim.Adam(parameters, lr=0.05, eps=1e-3),
    ],
    ids=["sgd", "adam"],
)
def test_several_updates_give_the_parameters_of_plain_training(make_optimizer: Callable[..., Any]) -> None:
    model, plain = streamed_and_plain()
    before = copy.deepcopy(plain.state_dict())
    for module in (model, plain):
        optimizer = make_optimizer(module.parameters())
        for update in range(4):
            optimizer.zero_grad()
            labels = torch.tensor([update % 3, 2])
            F.cross_entropy(module(make_image(update)), labels).backward()
            optimizer.step()
    assert_same_states(model, plain)
    assert error_of(plain.state_dict()["0.weight"], before["0.weight"]) > 1e-3


def test_parameters_are_the_users_own_tensors() -> None:
    net = make_net()
    model = StreamingModel(net)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in net.named_parameters()]
    assert all(a is b for a, b in zip(model.parameters(), net.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), net.buffers(), strict=True))


def test_gradients_accumulate_over_passes_and_clip() -> None:
    model, plain = streamed_and_plain()
    norms = []
    for module in (model, plain):
        for seed in range(3):
            loss_of(module(make_image(seed)), seed).backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.5))
    assert_same_gradients(model, plain)
    assert error_of(norms[0], norms[1]) <= TOLERANCE
    assert norms[1] > 0.5


@pytest.mark.parametrize("first", [0, 1])
def test_two_forward_passes_before_two_backward_passes(first: int) -> None:
    model, plain = streamed_and_plain()
    for module in (model, plain):
        losses = [loss_of(module(make_image(seed)), seed) for seed in range(2)]
        losses[first].backward()
        losses[1 - first].backward()
    assert_same_gradients(model, plain)
    assert_same_states(model, plain)


def test_one_backward_pass_through_two_forward_passes() -> None:
    model, plain = streamed_and_plain()
    for module in (model, plain):
        (loss_of(module(make_image(0))) * loss_of(module(make_image(1)))).backward()
    assert_same_gradients(model, plain)


def test_layers_around_the_model_take_part_in_autograd() -> None:
    model, plain = streamed_and_plain()
    scale = [torch.tensor([0.7], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for module, factor in zip((model, plain), scale, strict=True):
        loss_of(F.relu(module(make_image() * factor))).backward()
    assert_same_gradients(model, plain)
    assert error_of(scale[0].grad, scale[1].grad) <= TOLERANCE


def test_the_image_gets_its_gradient() -> None:
    model, plain = streamed_and_plain()
    images = [make_image().requires_grad_() for _ in range(2)]
    for module, image in zip((model, plain), images, strict=True):
        loss_of(module(image)).backward()
    assert error_of(images[0].grad, images[1].grad) <= TOLERANCE
    found = torch.autograd.grad(loss_of(model(images[0])), [images[0], *model.parameters()])
    assert error_of(found[0], images[1].grad) <= TOLERANCE


def test_the_image_gets_its_gradient_when_all_parameters_are_frozen() -> None:
    model, plain = streamed_and_plain()
    images = [make_image().requires_grad_() for _ in range(2)]
    for module, image in zip((model.requires_grad_(False), plain.requires_grad_(False)), images, strict=True):
        loss_of(module(image)).backward()
    assert error_of(images[0].grad, images[1].grad) <= TOLERANCE
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_backbone_has_no_backward_phases() -> None:
    model, plain = streamed_and_plain()
    for module in (model, plain):
        for parameter in list(module.parameters())[:4]:
            parameter.requires_grad_(False)
        loss_of(module(make_image())).backward()
    assert_same_gradients(model, plain)
    plan = model.plan(SHAPE)
    differentiated = {phase.level for phase in plan.phases if phase.differentiated}
    assert 0 < len(differentiated) < len(plan.phases)
    assert model.last_report is not None
    visited = {phase.level for phase in model.last_report.phases if phase.direction == "backward"}
    assert visited == differentiated
    assert min(visited) > 1


def test_unfreezing_is_noticed() -> None:
    model, plain = streamed_and_plain()
    for module in (model, plain):
        module[0].requires_grad_(False) if module is plain else model.net[0].requires_grad_(False)
        loss_of(module(make_image())).backward()
        module.requires_grad_(True).zero_grad()
        loss_of(module(make_image())).backward()
    assert_same_gradients(model, plain)


def test_an_output_that_the_loss_leaves_out_gets_no_gradient() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            x = torch.tanh(self.body(x))
            return {"map": self.left(x), "pair": (self.right(x.mean((2, 3))), x.shape[1])}

    torch.manual_seed(0)
    plain = TwoHeads().double()
    model = StreamingModel(copy.deepcopy(plain), tile=TILE)
    for module in (model, plain):
        found = module(make_image())
        assert list(found) == ["map", "pair"]
        assert found["pair"][1] == 4
        loss_of(found["map"]).backward()
    assert plain.right.weight.grad is None
    assert_same_gradients(model, plain)


def test_tied_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x))).mean((2, 3))

    torch.manual_seed(0)
    plain = Tied().double()
    model = StreamingModel(copy.deepcopy(plain), tile=TILE)
    for module in (model, plain):
        loss_of(module(make_image())).backward()
    assert_same_gradients(model, plain)
    assert len(list(model.parameters())) == 3


def test_a_setting_or_layer_changed_later_is_noticed() -> None:
    model, plain = streamed_and_plain()
    for module, net in ((model, model.net), (plain, plain)):
        module(make_image())
        net[1].momentum = 0.6
        module(make_image(1))
        torch.manual_seed(5)
        net[4] = nn.Conv2d(4, 5, 3, stride=2).double()
        loss_of(module(make_image(2))).backward()
    assert_same_states(model, plain)
    assert_same_gradients(model, plain)


def test_forward_hooks_of_the_model_work() -> None:
    model, plain = streamed_and_plain()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model.register_full_backward_hook(lambda module, into, out: seen.append(into[0].shape))
    for module in (model, plain):
        loss_of(module(make_image().requires_grad_())).backward()
    assert seen == [(2, 3), SHAPE]
    assert_same_gradients(model, plain)


# --- inference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_equals_plain_and_keeps_nothing(training: bool, context: Any, runs: list[Any]) -> None:
    model, plain = streamed_and_plain()
    for module in (model.train(training), plain.train(training)):
        module(make_image(3))
    with context():
        output = model(make_image())
        assert error_of(output, plain(make_image())) <= TOLERANCE
    assert not output.requires_grad
    assert_same_states(model, plain)
    assert runs[-1]() is None
    # What was captured without gradients does not get in the way of training.
    for module in (model, plain):
        loss_of(module(make_image())).backward()
    assert_same_gradients(model, plain)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to the passes that are made."""
    made: list[Any] = []
    original = Pass.__init__

    def init(self: Pass, *args: Any) -> None:
        original(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Pass, "__init__", init)
    return made


def test_nothing_is_kept_after_backward_or_when_the_output_is_dropped(runs: list[Any]) -> None:
    model, _ = streamed_and_plain()
    gc.collect()
    gc.disable()
    try:
        output = model(make_image())
        loss_of(output).backward()
        assert runs[-1]() is None
        output = model(make_image())
        assert runs[-1]() is not None
        del output
        assert runs[-1]() is None
    finally:
        gc.enable()


# --- precision and layout --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_as_close_to_exact_as_plain_autocast(dtype: torch.dtype) -> None:
    exact = make_net()
    reference = everything(exact, make_image())
    plain = make_net().float()
    model = StreamingModel(make_net().float(), tile=TILE)
    model._resident_tail = False
    image = make_image().to(dtype)
    results = []
    for module in (model, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = module(image)
        loss_of(output.double()).backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        assert all(grad is not None and grad.dtype == torch.float32 for grad in gradients.values())
        results.append({"output": output, **gradients})
    assert results[0]["output"].dtype == results[1]["output"].dtype == torch.bfloat16
    largest = max(float(value.norm()) for value in reference.values())
    for name, value in reference.items():
        streamed, known = (error_of(result[name], value, largest * 1e4) for result in results)
        assert streamed <= 2 * known + 0.01, name
    buffers = dict(model.named_buffers())
    for name, buffer in plain.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        # The convolution rounds to bfloat16 in both; statistics are taken in float32.
        assert error_of(buffers[name], buffer) <= 1e-3, name


@pytest.mark.parametrize("enabled", [True, False])
def test_backward_casts_as_its_forward_pass_did(enabled: bool) -> None:
    results = []
    for inside in (True, False):
        model, _ = streamed_and_plain()
        model.float()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = model(make_image().float())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            output.backward(make_image(0, (2, 3)).to(output.dtype))
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert_identical(results[0], results[1])


def test_channels_last() -> None:
    model, plain = streamed_and_plain()
    model.to(memory_format=torch.channels_last)
    image = make_image().to(memory_format=torch.channels_last)
    for module in (model, plain):
        loss_of(module(image)).backward()
    assert_same_gradients(model, plain)
    assert_same_states(model, plain)


def test_an_image_that_is_a_view() -> None:
    model, plain = streamed_and_plain()
    wide = make_image(0, (2, 45, 80, 3))
    view = wide.permute(0, 3, 2, 1)[:, :, 5:42]
    assert view.shape == SHAPE
    kept = wide.clone()
    for module in (model, plain):
        loss_of(module(view)).backward()
    assert_same_gradients(model, plain)
    assert torch.equal(wide, kept)


# --- being a module --------------------------------------------------------------------------------------


def test_state_dict_has_the_modules_own_keys_both_ways() -> None:
    net, other = make_net(1), make_net(2)
    model = StreamingModel(net)
    assert list(model.state_dict()) == list(net.state_dict())
    model.load_state_dict(other.state_dict())
    assert_identical(net.state_dict(), other.state_dict())
    make_net(3).load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.bias"'):
        model.load_state_dict({k: v for k, v in other.state_dict().items() if k != "0.bias"})


def test_state_dict_hooks_of_the_module_are_kept() -> None:
    net = make_net()

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state[f"{prefix}renamed"] = state.pop(f"{prefix}0.bias")

    net.register_state_dict_post_hook(rename)
    assert list(StreamingModel(net).state_dict()) == list(net.state_dict())
    assert "renamed" in StreamingModel(net).state_dict()


def test_inside_another_module() -> None:
    class Parent(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body, self.head = body, nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    torch.manual_seed(0)
    model, twin = streamed_and_plain()
    plain = Parent(twin)
    parent = Parent(model)
    assert list(parent.state_dict()) == list(plain.state_dict())
    parent.load_state_dict(plain.state_dict())
    plain.load_state_dict(parent.state_dict())
    for module in (parent, plain):
        loss_of(module(make_image())).backward()
    assert_same_gradients(parent, plain)
    assert [name for name, _ in parent.named_parameters()] == [name for name, _ in plain.named_parameters()]
    parent.eval()
    assert not model.training
    assert not any(module.training for module in model.net.modules())


def test_train_and_eval_reach_the_net() -> None:
    model, plain = streamed_and_plain()
    assert model.training
    for training in (False, True):
        assert model.train(training) is model
        assert all(module.training is training for module in (model, *model.net.modules()))
    model.eval()
    plain.eval()
    assert error_of(model(make_image()), plain(make_image())) <= TOLERANCE
    model.net[1].train()
    plain[1].train()
    assert error_of(model(make_image()), plain(make_image())) <= TOLERANCE
    assert_same_states(model, plain)


def test_it_takes_over_the_mode_of_the_net() -> None:
    assert not StreamingModel(make_net().eval()).training
    assert StreamingModel(make_net()).training


def test_to_moves_the_net_between_passes() -> None:
    model, plain = streamed_and_plain()
    model.float()
    assert next(model.net.parameters()).dtype == torch.float32
    model(make_image().float())
    model.load_state_dict(plain.state_dict())
    model.to(torch.float64)
    model.load_state_dict(plain.state_dict())
    for module in (model, plain):
        loss_of(module(make_image())).backward()
    assert_same_gradients(model, plain)
    assert StreamingModel(make_net(), device="cpu")._device() == torch.device("cpu")


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_a_copy_has_its_own_parameters_and_works(how: str) -> None:
    model, plain = streamed_and_plain()
    model(make_image(4))
    plain(make_image(4))
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.tile == model.tile
    for module in (twin, plain):
        loss_of(module(make_image())).backward()
    assert_same_gradients(twin, plain)
    assert_same_states(twin, plain)
    assert all(p.grad is None for p in model.parameters())
    assert all(a is b for a, b in zip(twin.parameters(), twin.net.parameters(), strict=True))


def test_repr_names_the_options() -> None:
    assert "budget=2.00 GiB, tile=(16, 8)" in repr(StreamingModel(make_net(), "2GiB", tile=(16, 8)))


def test_distributed_data_parallel(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed package here")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model, plain = streamed_and_plain()
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            for module in (parallel, plain):
                loss_of(module(make_image())).backward()
        assert_same_gradients(parallel.module, plain)
        assert_same_states(parallel.module, plain)
    finally:
        torch.distributed.destroy_process_group()


def train_in_group(rank: int, num_ranks: int, folder: str) -> None:
    """One of several processes with an image each; leaves its gradients in ``folder``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=num_ranks
    )
    model, _ = streamed_and_plain()
    parallel = nn.parallel.DistributedDataParallel(model)
    loss_of(parallel(make_image(rank))).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/gradients-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel_averages_gradients_over_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_in_group, (2, str(tmp_path)), nprocs=2)
    plain = make_net()
    gradients = []
    for rank in range(2):
        twin = copy.deepcopy(plain)
        (loss_of(twin(make_image(rank))) / 2).backward()
        gradients.append([p.grad for p in twin.parameters()])
    for parameter, first, second in zip(plain.parameters(), *gradients, strict=True):
        parameter.grad = first + second
    for rank in range(2):
        model = make_net()
        found = torch.load(tmp_path / f"gradients-{rank}.pt")
        for name, parameter in model.named_parameters():
            parameter.grad = found[name]
        assert_same_gradients(model, plain)


# --- determinism -----------------------------------------------------------------------------------------


def test_the_same_pass_twice_is_the_same_bit_for_bit() -> None:
    image = make_image().float()
    model, other = (streamed_and_plain()[0].float() for _ in range(2))
    first = everything(model, image)
    assert_identical(everything(other, image), first)
    # In train mode the running statistics differ by now; they are not read.
    assert_identical(everything(model, image), first)


def test_tiles_do_not_change_the_result() -> None:
    reference = everything(make_net(), make_image())
    for tile in (11, (16, 9), 200):
        model = StreamingModel(make_net(), tile=tile)
        largest = max(float(value.norm()) for value in reference.values())
        for name, value in everything(model, make_image()).items():
            assert error_of(value, reference[name], largest) <= TOLERANCE, (tile, name)


# --- sources ---------------------------------------------------------------------------------------------


class Counted(ImageSource):
    """Notes the regions that are asked for."""

    def __init__(self, tensor: Tensor) -> None:
        channels, height, width = tensor.shape
        super().__init__((channels, height, width), tensor.dtype)
        self.tensor = tensor
        self.regions: list[Region] = []

    def _read(self, region: Region) -> Tensor:
        self.regions.append(region)
        rows, cols = region
        return self.tensor[:, rows.start : rows.stop, cols.start : cols.stop]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, SHAPE, generator=generator, dtype=torch.uint8)


def normalized(tile: Tensor) -> Tensor:
    return tile.double() / 255 - 0.5


def test_sources_of_all_kinds_give_what_the_tensor_gives(pixels: Tensor, tmp_path: Path) -> None:
    for index, image in enumerate(pixels):
        write_zarr_image(tmp_path / f"{index}.zarr", image, chunk=16)
    tensors = [TensorSource(image) for image in pixels]
    zarrs = [ZarrSource(tmp_path / f"{index}.zarr") for index in range(2)]
    reference = everything(streamed_and_plain()[0], normalized(pixels))
    model, _ = streamed_and_plain(preprocess=normalized)
    for image in (pixels, tensors, zarrs, [tensors[0], zarrs[1]]):
        assert_identical(everything(model, image), reference)
    single = everything(model, pixels[1:])
    for source in (tensors[1], zarrs[1]):
        assert_identical(everything(model, source), single)


def test_a_float_source_needs_no_preprocess() -> None:
    sources = [TensorSource(image) for image in make_image()]
    assert_identical(
        everything(streamed_and_plain()[0], sources), everything(streamed_and_plain()[0], make_image())
    )


def test_preprocess_may_change_the_number_of_channels() -> None:
    model = StreamingModel(make_net(), tile=TILE, preprocess=lambda tile: tile.expand(-1, 3, -1, -1) / 2)
    grey = make_image(0, (2, 1, 37, 45))
    reference = everything(make_net(), grey.expand(-1, 3, -1, -1) / 2)
    for name, value in everything(model, grey).items():
        assert error_of(value, reference[name], 1e3) <= TOLERANCE, name


def test_a_source_is_never_read_as_a_whole() -> None:
    height, width = 120, 131
    source = Counted(make_image(0, (3, height, width)).float())
    model = StreamingModel(make_net().float(), tile=TILE)
    everything(model, source)
    halo = max(max(phase.halo) for phase in model.plan((1, 3, height, width), torch.float32).phases)
    assert halo <= 8
    assert max(region.rows.size for region in source.regions) <= TILE + halo
    assert max(region.cols.size for region in source.regions) <= TILE + halo
    # Once forward, once backward, with a halo of one pixel around each tile.
    whole = 3 * height * width * 4
    assert 2 * whole <= source.bytes_read <= 2 * whole * 1.4


# --- stores ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_disk")
def test_maps_on_disk_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, twin = streamed_and_plain(spill=tmp_path)
    stores = model.plan(SHAPE).stores.values()
    assert {store.tier for store in stores} == {store.gradient_tier for store in stores} == {Tier.DISK}
    found = everything(model, make_image())
    monkeypatch.undo()
    in_memory = StreamingModel(twin, tile=TILE)
    in_memory._resident_tail = False
    assert {store.tier for store in in_memory.plan(SHAPE).stores.values()} == {Tier.MEMORY}
    expected = everything(in_memory, make_image())
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        # Not bit for bit: tiles read from disk are contiguous, those in memory are views.
        assert error_of(found[name], value, largest * 1e3) <= 1e-12, name


@pytest.mark.usefixtures("on_disk")
def test_the_folder_lasts_from_forward_to_backward_and_no_longer(tmp_path: Path) -> None:
    model, _ = streamed_and_plain(spill=tmp_path)
    output = model(make_image())
    (folder,) = tmp_path.iterdir()
    assert list(folder.rglob("c.*"))
    loss_of(output).backward()
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("on_disk")
def test_the_folder_goes_when_the_output_is_dropped(tmp_path: Path) -> None:
    model, _ = streamed_and_plain(spill=tmp_path)
    outputs = [model(make_image(seed)) for seed in range(2)]
    assert len(list(tmp_path.iterdir())) == 2
    outputs.pop()
    assert len(list(tmp_path.iterdir())) == 1
    outputs.pop()
    assert not list(tmp_path.iterdir())
    assert tmp_path.is_dir()


@pytest.mark.usefixtures("on_disk")
def test_inference_leaves_no_folder(tmp_path: Path) -> None:
    model, plain = streamed_and_plain(spill=tmp_path)
    with torch.no_grad():
        assert error_of(model(make_image()), plain(make_image())) <= TOLERANCE
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("on_disk")
def test_without_a_spill_folder_the_systems_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", os.fspath(tmp_path))
    model, _ = streamed_and_plain()
    output = model(make_image())
    assert len(list(tmp_path.iterdir())) == 1
    loss_of(output).backward()
    assert not list(tmp_path.iterdir())


# --- the report ------------------------------------------------------------------------------------------


def test_code_is_looked_for_after_the_first_step_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bool] = []
    monkeypatch.setattr(HostCeiling, "check", lambda _, *, compiled: looks.append(compiled))
    sizes: dict[Any, set[Any]] = {}
    shape_of = Phase.shape

    def noted(phase: Phase, direction: str, row: int, col: int) -> Any:
        shape = shape_of(phase, direction, row, col)
        needed = tuple(phase.needed(row, col, name).size for name in (*phase.nodes, *phase.inputs))
        sizes.setdefault(shape, set()).add(needed)
        return shape

    monkeypatch.setattr(Phase, "shape", noted)
    model = StreamingModel(make_net(), tile=9)
    model(make_image()).sum().backward()
    # Tiles of a shape need as many positions of every map, and others do not.
    assert all(len(found) == 1 for found in sizes.values())
    assert len({(*shape[:3], *found) for shape, found in sizes.items()}) == len(sizes)
    assert model.last_report is not None
    num_tiles = sum(phase.num_tiles for phase in model.last_report.phases)
    num_segments = len(looks) - num_tiles
    assert num_segments > 0
    assert sum(looks) == len(sizes) + num_segments < len(looks) / 2
    looks.clear()
    model(make_image()).sum().backward()
    assert looks == [False] * (num_tiles + num_segments)


def test_the_report_grows_from_forward_to_backward() -> None:
    model, _ = streamed_and_plain(budget="1GB")
    assert model.last_report is None
    output = model(make_image())
    forward = model.last_report
    assert forward is not None
    plan = model.plan(SHAPE)
    assert forward.budget == plan.budget == 10**9
    assert forward.projected_bytes == plan.projected_bytes
    assert [phase.direction for phase in forward.phases] == ["forward"] * len(plan.phases)
    assert [phase.num_tiles for phase in forward.phases] == [phase.num_tiles for phase in plan.phases]
    written = sum(store.nbytes for store in plan.stores.values())
    assert sum(phase.bytes_written for phase in forward.phases) == written
    loss_of(output).backward()
    report = model.last_report
    assert report is not None
    assert report.phases[: len(plan.phases)] == forward.phases
    backward = report.phases[len(plan.phases) :]
    assert [phase.level for phase in backward] == [phase.level for phase in reversed(plan.phases)]
    assert {phase.direction for phase in backward} == {"backward"}
    assert report.seconds > forward.seconds > 0
    assert report.bytes_moved > forward.bytes_moved >= written
    if report.measured_bytes is not None:
        assert report.reading in ("VmHWM", "VmRSS, sampled")
        assert report.measured_bytes <= report.budget
    text = report.explain()
    assert "budget 954 MiB" in text
    assert f"({report.reading})" in text
    assert text.count("tiles") == len(report.phases)
    assert text.count("backward") == len(plan.phases)
