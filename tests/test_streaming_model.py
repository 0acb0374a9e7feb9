"""A model in a training loop, in inference and in other precisions, as plain PyTorch."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from streaming_cases import (
    SHAPE,
    TILE,
    TOLERANCE,
    assert_identical,
    assert_same_gradients,
    assert_same_states,
    error_of,
    everything,
    loss_of,
    make_image,
    make_net,
    streamed_and_plain,
)
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.runtime.streamed_pass import Pass

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
    model.resident_tail = False
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
