"""A streamed model is the user's module: keys, hooks, modes, moves, copies and processes."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_cases import (
    TOLERANCE,
    assert_identical,
    assert_same_gradients,
    assert_same_states,
    error_of,
    loss_of,
    make_image,
    make_net,
    streamed_and_plain,
)
from torch import Tensor, nn

from streamcnn import StreamingModel, UnsupportedModel


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
    assert {p.device.type for p in StreamingModel(make_net(), device="meta").parameters()} == {"meta"}


class WithMask(nn.Module):
    """Code that is followed under guards, and code that is not."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.body, self.code = make_net(), code

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.body(x) * mask
        if self.code == "reads a value" and self.body[0].weight.sum().item() > 1e9:
            y = y + 1
        if self.code == "opens a file":
            with open(os.devnull):
                pass
        return y


@pytest.mark.parametrize("code", ["plain", "reads a value", "opens a file"])
def test_parameters_can_be_exchanged_after_a_pass(code: str) -> None:
    """What was captured holds no reference of its own to them, nor anything that only the collector frees."""
    model = StreamingModel(WithMask(code), tile=16)
    plain = copy.deepcopy(model.net)
    image = make_image()
    # A view, as a slice of a batch is.
    mask = torch.rand(2, *plain.body(image).shape, dtype=torch.float64)[0]
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for module in (model, plain):
            loss_of(module(image, mask)).backward()
            module.float().double()
            module.zero_grad()
            loss_of(module(image, mask)).backward()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same_gradients(model, plain)


class Named(Tensor):
    """A tensor of another class, and nothing else."""


class Doubling(Tensor):
    """Convolutions with it give twice what is expected."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func is torch.conv2d else result


@pytest.mark.parametrize("code", ["plain", "opens a file"])
def test_parameters_of_a_subclass_of_tensor_can_be_converted(code: str) -> None:
    """To autograd such a one is a view, and still one after ``.double()``, of a base in float32."""

    def with_name() -> WithMask:
        net = WithMask(code).float()
        net.body[0].weight = nn.Parameter(net.body[0].weight.detach().as_subclass(Named))
        return net.double()

    model, plain = StreamingModel(with_name(), tile=16), with_name()
    assert plain.body[0].weight._is_view()
    image, mask = make_image(), torch.ones((), dtype=torch.float64)
    for module in (model, plain):
        loss_of(module(image, mask)).backward()
    assert_same_gradients(model, plain)


def test_parameters_and_buffers_that_change_operators_are_refused() -> None:
    """In plain PyTorch results are of their class, too, and change the operators that follow."""
    for place, name in ((0, "weight"), (1, "running_mean")):
        net = make_net()
        value = getattr(net[place], name).detach().as_subclass(Doubling)
        setattr(net[place], name, nn.Parameter(value) if name == "weight" else value)
        with pytest.raises(UnsupportedModel, match=rf"'{place}.{name}' is of class Doubling, whose __torch"):
            StreamingModel(net)(make_image())


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


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnext_atto", "levit_128s"])
def test_a_plain_state_dict_comes_back_as_it_was(name: str) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model(name, num_classes=3).state_dict()
    model = StreamingModel(timm.create_model(name, num_classes=3))
    model.load_state_dict(state)
    assert list(model.state_dict()) == list(state)
    assert saved(model.state_dict()) == saved(state)


def saved(state: Mapping[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
