"""A streamed model is the user's module: keys, hooks, modes, moves, copies and processes."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Iterator, Mapping
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


def test_hooks_of_state_dicts_are_called_wherever_they_are_set() -> None:
    def called(in_streamed: bool) -> list[tuple[str, type]]:
        net, found = make_net(), list[tuple[str, type]]()
        module = StreamingModel(net) if in_streamed else net
        module.register_state_dict_pre_hook(lambda net, *_: found.append(("saves", type(net))))
        module.register_state_dict_post_hook(lambda net, *_: found.append(("saved", type(net))))
        module.register_load_state_dict_pre_hook(lambda net, *_: found.append(("loads", type(net))))
        module.register_load_state_dict_post_hook(lambda net, _: found.append(("loaded", type(net))))
        module.load_state_dict(module.state_dict())
        del module
        net.load_state_dict(net.state_dict())
        return found

    assert called(in_streamed=True) == called(in_streamed=False)


def test_apply_reaches_the_net_itself() -> None:
    seen = list[nn.Module]()
    net = make_net()
    parent = nn.ModuleList([StreamingModel(net)])
    model = parent[0]
    assert model.apply(seen.append) is model
    assert seen[-1] is net
    assert set(seen) == set(net.modules())
    parent.apply(seen.append)
    assert seen[-2:] == [net, parent]


def test_the_net_may_be_another_one() -> None:
    """As after ``model.net = convert_sync_batchnorm(model.net)``."""
    model, image, tile = StreamingModel(make_net(1)), make_image(), 16
    target = torch.zeros(len(image), dtype=torch.long)

    def loss_of_model() -> Tensor:
        return model.streamed_loss(image, target, nn.functional.cross_entropy)

    loss_of_model()
    other = make_net(2).append(nn.Linear(3, 4).double())
    model.tile, model.net = tile, other
    plain = copy.deepcopy(other)
    assert dict(model.named_modules()) == {**dict(other.named_modules()), "": model}
    assert len(model._modules) == len(other)
    loss = loss_of_model()
    assert error_of(loss, nn.functional.cross_entropy(plain(image), target)) <= TOLERANCE
    for module in (model, plain):
        loss_of(module(image)).backward()
    assert_same_gradients(model, plain)
    assert_same_states(model, plain)
    model.net = other.eval()
    assert not model.training
    with pytest.raises(ValueError, match=r"allowed is a torch\.nn\.Module"):
        model.net = None


def test_backward_in_inference_mode() -> None:
    model, plain = streamed_and_plain()
    for module in (model, plain):
        loss = loss_of(module(make_image()))
        with torch.inference_mode():
            loss.backward()
    assert_same_gradients(model, plain)


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
    if code != "plain" and not hasattr(torch._dynamo.config, "invalidate_compile_context_weakrefs"):
        pytest.skip("Dynamo keeps references where it cannot follow code, until PyTorch 2.13")
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


def test_lazy_modules_say_that_a_plain_pass_makes_their_tensors() -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU()).double()
    with pytest.raises(
        UnsupportedModel, match=r"'0.weight' belongs to a lazy module .* call the plain module once"
    ):
        StreamingModel(net)(make_image())
    net(make_image())
    assert StreamingModel(net, tile=16)(make_image()).shape[1] == 4


def test_a_model_on_the_meta_device_is_planned_as_on_the_cpu() -> None:
    net, shape = make_net(), (1, 3, 500, 500)
    expected = StreamingModel(net, budget="64MiB").plan(shape).explain()
    assert StreamingModel(net.to("meta"), budget="64MiB").plan(shape).explain() == expected


class ByName(nn.Conv2d):
    """An image that is taken by name alone."""

    def forward(self, *, pixels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pixels)


class Forwarding(nn.Conv2d):
    """A wrapper's signature, which says nothing of what is wrapped."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(*args, **kwargs)


def test_an_image_that_cannot_be_found_by_its_name() -> None:
    image = make_image()
    with pytest.raises(
        TypeError, match=r"ByName takes 'pixels' by name alone: .* forward\(self, pixels, \.\.\.\)"
    ):
        StreamingModel(ByName(3, 4, 3).double())(pixels=image)
    model = StreamingModel(Forwarding(3, 4, 3).double())
    with pytest.raises(TypeError, match=r"forward\(\) of Forwarding has no name for it; pass it first"):
        model(input=image)
    torch.testing.assert_close(model(image), model.net(input=image))


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


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """This process as a group of its own."""
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed package here")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_distributed_data_parallel() -> None:
    model, plain = streamed_and_plain()
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        for module in (parallel, plain):
            loss_of(module(make_image())).backward()
    assert_same_gradients(parallel.module, plain)
    assert_same_states(parallel.module, plain)


@pytest.mark.usefixtures("group_of_one")
def test_parameters_are_divided_around_the_streamed_model_and_not_within() -> None:
    # It is not there where torch has no distributed package.
    from torch.distributed.fsdp import fully_shard

    model, plain = streamed_and_plain()
    divided = fully_shard(model)
    for module in (divided, plain):
        loss_of(module(make_image())).backward()
    gradients = [parameter.grad.full_tensor() for parameter in divided.parameters()]
    torch.testing.assert_close(gradients, [p.grad for p in plain.parameters()], rtol=1e-9, atol=1e-12)
    with pytest.raises(UnsupportedModel, match=r"' is a DTensor.*fully_shard\(StreamingModel\(net\)\)"):
        StreamingModel(fully_shard(make_net()), tile=(16, 8))(make_image())


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


class OfItsOwn(nn.Module):
    """Has attributes with the names of the model's, and methods in place of a module's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.spill = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(2, 2)
        self.tile, self.budget, self._call = 3, nn.Parameter(torch.ones(2)), 0.5
        self.grid = torch.ones(2)
        self.double()

    def preprocess(self, x: Tensor) -> Tensor:
        return x - 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(self.preprocess(x)).mean((2, 3)))
        return self.spill(y * self.budget * self.grid) * self.tile * self._call

    def _apply(self, fn: Any) -> OfItsOwn:  # type: ignore[override]
        super()._apply(fn)
        self.grid = fn(self.grid)
        return self

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.head.parameters(recurse)

    def requires_grad_(self, requires_grad: bool = True) -> OfItsOwn:
        self.body.requires_grad_(requires_grad)
        return self

    def eval(self) -> OfItsOwn:
        super().eval()
        self.body.train()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"own.{key}": value for key, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:  # type: ignore[override]
        return super().load_state_dict({key.removeprefix("own."): v for key, v in state.items()}, strict)


def test_a_net_may_have_attributes_that_are_called_as_the_models_are() -> None:
    net = OfItsOwn()
    before = dict(vars(net))
    model, plain = StreamingModel(net, tile=16), copy.deepcopy(net)
    assert vars(net) == before
    assert model.tile == (16, 16)
    for module in (model, plain):
        loss_of(module(make_image())).backward()
    assert_same_gradients(model.net, plain)


def test_no_attribute_of_the_models_is_one_of_the_nets() -> None:
    net = make_net()
    names = set(vars(StreamingModel(make_net()))) - set(vars(net)) - {"net"}
    for name in names:
        setattr(net, name, name)
    model = StreamingModel(net, budget="1GiB", tile=16)
    model(make_image())
    assert {getattr(net, name) for name in names} == names


def test_methods_that_a_net_has_of_its_own_are_the_models() -> None:
    net = OfItsOwn()
    model = StreamingModel(net)
    assert list(map(id, model.parameters())) == list(map(id, net.parameters()))
    assert list(model.state_dict()) == list(net.state_dict())
    model.load_state_dict(OfItsOwn().state_dict())
    assert model.to(torch.float32) is model
    assert net.grid.dtype == torch.float32
    assert model.double() is model
    assert net.grid.dtype == torch.float64
    assert model.requires_grad_(False) is model
    assert net.head.weight.requires_grad
    assert not net.body.weight.requires_grad
    assert model.eval() is model
    assert net.body.training
    assert not net.training


def test_a_preprocessing_module_is_no_part_of_the_net_and_moves_with_it() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.full((3, 1, 1), 0.25, dtype=torch.float64))

        def forward(self, tile: Tensor) -> Tensor:
            return tile - self.mean

    net, centred = make_net(), Centred()
    keys, names = list(net.state_dict()), [name for name, _ in net.named_modules()]
    model = StreamingModel(net, tile=16, preprocess=centred)
    model.preprocess = centred
    assert list(net.state_dict()) == keys
    assert [name for name, _ in net.named_modules()] == names
    twin = copy.deepcopy(net)
    assert error_of(model(make_image()), twin(make_image() - 0.25)) <= TOLERANCE
    for moved in (model.to(torch.float32), model.double().float()):
        assert next(moved.preprocess.buffers()).dtype == torch.float32


def test_the_mode_is_that_of_the_net_whoever_sets_it() -> None:
    model = StreamingModel(make_net())
    model.net.eval()
    assert not model.training
    model.train(model.training)
    assert not any(module.training for module in model.net.modules())
    for module in model.modules():
        module.training = True
    assert all(module.training for module in model.net.modules())


def test_an_attribute_that_is_set_anew_is_the_nets() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + getattr(self, "shift", 0)

    model = StreamingModel(Shifted(), tile=16)
    image = make_image()
    assert torch.equal(model(image), image)
    model.shift = 2.0
    assert torch.equal(model(image), image + 2)
    del model.shift
    assert torch.equal(model(image), image)
    with pytest.raises(AttributeError, match="shift"):
        del model.shift


@pytest.mark.parametrize("name", ["_device", "_dtype", "_model", "_module", "_image", "_forward"])
def test_a_frameworks_own_names_are_free(name: str) -> None:
    # Lightning Fabric's wrapper passes what it sets on to the module that it wraps, if that has it already.
    model = StreamingModel(make_net(), tile=16)
    assert not hasattr(model, name)
    setattr(model, name, torch.device("cpu"))
    model(make_image())
