"""What people do around a model: wrap, copy, save, hook, compile, and differentiate it twice."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compatibility.case import (
    SAME_OR_REFUSED,
    WIDTH,
    Cases,
    Record,
    Small,
    Steps,
    backpropagate,
    between,
    passes,
    seed_everything,
)

CASES = Cases("Around the model")


class TwoHeads(Small):
    """Returns logits and the features that they are made of."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = F.relu(self.maps(x)).mean((2, 3))
        return self.head(v), v


class WithMap(Small):
    """Returns logits and the map that they are made of."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.maps(x))
        return self.head(x.mean((2, 3))), x


# --- wrapped ------------------------------------------------------------------------------------------


def wrapped(make: Any, number: int = 2) -> Steps:
    """Passes of what ``make`` makes of the model."""

    def steps(model: Any, net: nn.Module, record: Record) -> None:
        outer = make(model)
        for _ in range(number):
            record.run(outer)

    return steps


class Wrapper(nn.Module):
    """Preprocesses, calls the model, and adds a head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.model(x / 2)).sum(1)


def _under_checkpoint(use_reentrant: bool) -> Any:
    return lambda model: lambda x: checkpoint(model, x, use_reentrant=use_reentrant)


class Normless(Small):
    """Without batch norm, whose statistics a second forward pass moves again."""

    def maps(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


CASES.add(
    "torch.compile(model, backend='eager')",
    Small,
    wrapped(lambda m: torch.compile(m, backend="eager")),
    slow=True,
)


def _compiled_in_place(model: Any, net: nn.Module, record: Record) -> None:
    model.compile(backend="eager")
    record.run(model)
    record.run(model)
    model._compiled_call_impl = None
    torch._dynamo.reset()


CASES.add("model.compile(backend='eager')", Small, _compiled_in_place, slow=True)
CASES.add("checkpoint(model, x, use_reentrant=False)", Normless, wrapped(_under_checkpoint(False)))
CASES.add("checkpoint(model, x, use_reentrant=True)", Normless, wrapped(_under_checkpoint(True)))
CASES.add("checkpoint(model, x) with batch norm", Small, wrapped(_under_checkpoint(False)))
CASES.add("model inside nn.Sequential", Small, wrapped(lambda m: nn.Sequential(m, nn.Tanh())))
CASES.add("model inside another module", Small, wrapped(Wrapper))
CASES.add("model in a ModuleDict", Small, wrapped(lambda m: nn.ModuleDict({"a": m})["a"]))
CASES.add("DataParallel without devices", Small, wrapped(nn.DataParallel))


def _nested(model: Any, net: nn.Module, record: Record) -> None:
    outer = record.stream(model)
    for _ in range(2):
        record.run(outer)


def _part_streamed(model: Any, net: Any, record: Record) -> None:
    """Only the convolutional part is streamed; the net calls it."""
    net.stem = record.stream(net.stem)
    for _ in range(2):
        record.run(net)
    net.stem = net.stem.net if record.streamed else net.stem


class Parted(nn.Module):
    """A stem and a head as two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


CASES.add("StreamingModel of a StreamingModel", Small, _nested, expected=SAME_OR_REFUSED)
CASES.add("a streamed stem inside a plain net", Parted, _part_streamed)


def _both_streamed(model: Any, net: Any, record: Record) -> None:
    net.stem = record.stream(net.stem)
    record.mark()
    try:
        record.run(model)
    finally:
        net.stem = net.stem.net if record.streamed else net.stem
        record.mark()


CASES.add(
    "a streamed stem inside a streamed net",
    Parted,
    _both_streamed,
    expected=SAME_OR_REFUSED,
)


def _shared(model: Any, net: nn.Module, record: Record) -> None:
    other = record.stream(net)
    for each in (model, other, model):
        record.run(each)
    images = [record.image(seed) for seed in (1, 2)]
    backpropagate([model(images[0]), other(images[1])])
    record.gradients("gradient through both", *images)


CASES.add("a net shared by two StreamingModels", Small, _shared)


def _hooked(model: Any, net: nn.Module, record: Record) -> None:
    seen: list[Any] = []
    handles = [
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
        model.register_forward_hook(
            lambda module, inputs, output: (seen.append(output.shape), output * 3)[1]
        ),
    ]
    for _ in range(2):
        record.run(model)
    record("seen", seen)
    for handle in handles:
        handle.remove()
    record.run(model)


def _backward_hooked(model: Any, net: nn.Module, record: Record) -> None:
    handle = model.register_full_backward_hook(lambda module, to_input, to_output: (3 * to_input[0],))
    record.run(model)
    handle.remove()
    # What stays of a hook stays in the module that had it, which is not the net.
    model._is_full_backward_hook = None
    record.run(model)


CASES.add("forward hooks on the model", Small, _hooked)
CASES.add("a full backward hook on the model", Small, _backward_hooked)


# --- modes --------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Runs every operator as it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def under(make: Any) -> Steps:
    """Two passes inside a context that ``make`` makes."""

    def steps(model: Any, net: nn.Module, record: Record) -> None:
        with make():
            for _ in range(2):
                record.run(model)

    return steps


def _packed() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy)


def _flops(model: Any, net: nn.Module, record: Record) -> None:
    with FlopCounterMode(display=False) as counter:
        record.run(model)
    record("counted anything", counter.get_total_flops() > 0)


def _default_device(model: Any, net: nn.Module, record: Record) -> None:
    torch.set_default_device("cpu")
    try:
        record.run(model)
    finally:
        torch.set_default_device(None)
    record.run(model)


CASES.add("saved_tensors_hooks around", Small, under(_packed))
CASES.add("save_on_cpu around", Small, under(torch.autograd.graph.save_on_cpu))
CASES.add("FlopCounterMode around", Small, _flops)
CASES.add("a TorchDispatchMode around", Small, under(Counting))
CASES.add("set_default_device", Small, _default_device)
CASES.add("with torch.device('cpu')", Small, under(lambda: torch.device("cpu")))
CASES.add("detect_anomaly around", Small, under(lambda: torch.autograd.detect_anomaly(check_nan=False)))


def _deterministic(model: Any, net: nn.Module, record: Record) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        record.run(model)
    finally:
        torch.use_deterministic_algorithms(False)


CASES.add("deterministic algorithms", Small, _deterministic)
CASES.add(
    "autocast around, bfloat16",
    Small,
    under(lambda: torch.autocast("cpu", torch.bfloat16)),
    dtype=torch.float32,
    tolerance=3e-2,
)


class Normed(Small):
    """Another normalisation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm


# Tolerances of a few roundings: plain PyTorch itself rounds after every operator.
for dtype, tolerance in ((torch.bfloat16, 1e-1), (torch.float16, 2e-2)):
    short = str(dtype).removeprefix("torch.")
    for name, norm in {
        "batch": lambda: nn.BatchNorm2d(WIDTH),
        "group": lambda: nn.GroupNorm(2, WIDTH),
        "instance": lambda: nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True),
    }.items():
        CASES.add(
            f"a {short} model with {name} norm",
            lambda norm=norm: Normed(norm()),
            passes(2),
            dtype=dtype,
            tolerance=tolerance,
        )


# --- gradients taken by hand --------------------------------------------------------------------------


def _two_backwards(model: Any, net: nn.Module, record: Record) -> None:
    image = record.image()
    seed_everything(0)
    out = model(image)
    backpropagate(out, 1, retain_graph=True)
    record.gradients("first", image)
    backpropagate(out, 2)
    record.gradients("second", image)


def _several_losses(model: Any, net: nn.Module, record: Record) -> None:
    """PCGrad: a gradient of every loss, from one forward pass."""
    image = record.image()
    logits, features = model(image)
    parameters = list(net.parameters())
    losses = [logits[:, 0].sum(), logits[:, 1].square().sum(), features.pow(3).sum()]
    for index, loss in enumerate(losses):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        record(f"gradient of loss {index}", list(found))
    sum(losses).backward()
    record.gradients("gradient", image)


def _several_forwards(model: Any, net: nn.Module, record: Record) -> None:
    images = [record.image(seed) for seed in range(3)]
    outputs = [model(image) for image in images]
    record("outputs", outputs)
    backpropagate(outputs)
    record.gradients("gradient", *images)


def _backwards_in_reverse(model: Any, net: nn.Module, record: Record) -> None:
    images = [record.image(seed) for seed in range(2)]
    outputs = [model(image) for image in images]
    for index in (1, 0):
        backpropagate(outputs[index], index)
        record.gradients(f"gradient {index}", *images)


def _grad_cam(model: Any, net: nn.Module, record: Record) -> None:
    logits, features = model(record.image())
    (found,) = torch.autograd.grad(logits[0, 1], features)
    record("gradient of a logit by features", found)


def _double_backward(model: Any, net: nn.Module, record: Record) -> None:
    image = record.image()
    (slope,) = torch.autograd.grad(model(image).sum(), image, create_graph=True)
    slope.square().sum().backward()
    record.gradients("gradient of the penalty", image)


def _some_inputs(model: Any, net: Any, record: Record) -> None:
    image = record.image()
    found = torch.autograd.grad(model(image).square().sum(), [net.head.weight, image])
    record("gradients", list(found))
    model(image).square().sum().backward(inputs=[net.conv.weight])
    record.gradients("gradient of one", image)


def _one_output(model: Any, net: nn.Module, record: Record) -> None:
    for index in (0, 1):
        image = record.image()
        model(image)[index].square().sum().backward()
        record.gradients(f"gradient of output {index}", image)


def _never_backward(model: Any, net: nn.Module, record: Record) -> None:
    record("dropped", model(record.image()))
    record.run(model)


def _changed_before_backward(model: Any, net: Any, record: Record) -> None:
    """Plain PyTorch does not need the bias again; a streamed pass does, and PyTorch says that it changed."""
    image = record.image()
    out = model(image)
    with torch.no_grad():
        net.head.bias.add_(1)
    record.mark()
    backpropagate(out)
    record.gradients("gradient", image)


def _mode_before_backward(model: Any, net: nn.Module, record: Record) -> None:
    image = record.image()
    out = model(image)
    model.eval()
    backpropagate(out)
    record.gradients("gradient", image)


def _weight_before_backward(model: Any, net: Any, record: Record) -> None:
    out = model(record.image())
    with torch.no_grad():
        net.head.weight.mul_(2)
    try:
        backpropagate(out)
    except RuntimeError as error:
        record("refused", "modified by an inplace operation" in str(error))


CASES.add("two backwards from one forward", Small, _two_backwards)
CASES.add("autograd.grad of several losses (PCGrad)", TwoHeads, _several_losses)
CASES.add("several forwards before one backward", Small, _several_forwards)
CASES.add("backwards in reverse order", Normless, _backwards_in_reverse)
CASES.add("Grad-CAM by hand from (logits, features)", TwoHeads, _grad_cam, expected=SAME_OR_REFUSED)
CASES.add("Grad-CAM by hand from (logits, map)", WithMap, _grad_cam, expected=SAME_OR_REFUSED)
CASES.add("double backward (gradient penalty)", Normless, _double_backward, expected="differentiated once")
CASES.add("gradients of some inputs alone", Small, _some_inputs)
CASES.add("backward of one output of two", WithMap, _one_output)
CASES.add("a forward whose backward never comes", Small, _never_backward)
CASES.add(
    "a bias changes before backward", Small, _changed_before_backward, expected="modified by an inplace"
)
CASES.add("eval() before backward", Small, _mode_before_backward)
CASES.add("a weight that backward needs changes before it", Small, _weight_before_backward)


def _clipped(model: Any, net: nn.Module, record: Record) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for index in range(3):
        optimizer.zero_grad()
        (model(record.image(index)).square().sum() * 1024).backward()
        record(f"norm {index}", torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
    record.run(model)


@CASES("three updates with AdamW and clip_grad_norm_", _clipped)
class Clipped(Small):
    pass


# --- copies -------------------------------------------------------------------------------------------


def _deep_copied(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model)
    other = copy.deepcopy(model)
    record("the copy", other(record.image()))
    record.run(model)


def _pickled(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model)
    record("the copy", pickle.loads(pickle.dumps(model))(record.image()))
    record.run(model)


def _saved(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    record("the copy", torch.load(file, weights_only=False)(record.image()))
    state = {name: 2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    record.run(model)


def _assigned(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model)
    state = {name: (2 * value).detach() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    record.run(model)


def _averaged(model: Any, net: nn.Module, record: Record) -> None:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index in range(2):
        optimizer.zero_grad()
        model(record.image(index)).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
    optimizer.zero_grad()
    average.eval()
    record("the average", average(record.image(5)))


def _functional(model: Any, net: nn.Module, record: Record) -> None:
    image = record.image()
    weights = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, weights, (image,))
    record("output", out)
    backpropagate(out)
    record("gradients of the given weights", {name: w.grad for name, w in weights.items()})
    record.gradients("gradients of the net's", image)
    record.run(model)


CASES.add("deepcopy between passes", Small, _deep_copied)
CASES.add("pickle between passes", Small, _pickled)
CASES.add("torch.save, and load_state_dict, between passes", Small, _saved)
CASES.add("load_state_dict(assign=True)", Small, _assigned)
CASES.add("an EMA copy by AveragedModel", Small, _averaged)
CASES.add("functional_call(model, weights, image)", Small, _functional, expected=SAME_OR_REFUSED)
CASES.add("to(float32) and back", Small, between(lambda net: net.float().double()))
CASES.add("share_memory()", Small, between(lambda net: net.share_memory()))
CASES.add(
    "apply(fn) and requires_grad_(False) of all",
    Small,
    between(
        lambda net: net.apply(lambda m: None),
        lambda net: net.requires_grad_(False),
        lambda net: net.requires_grad_(),
    ),
)


def _through_model(model: Any, net: Any, record: Record) -> None:
    record.run(model)
    model.register_buffer("extra", torch.ones(1, dtype=torch.float64))
    model.add_module("more", nn.Identity())
    record("keys", sorted(model.state_dict()))
    record.run(model)
    del model.extra, model.more
    model.zero_grad()
    record("names", [name for name, _ in model.named_modules()])


CASES.add("registering and deleting on the model", Small, _through_model)


# --- images of all kinds ------------------------------------------------------------------------------


def imaged(make: Any) -> Steps:
    """Two passes of images that ``make`` makes of a random one."""

    def steps(model: Any, net: nn.Module, record: Record) -> None:
        for seed in range(2):
            record.run(model, image=make(record.image(seed, grad=False)))

    return steps


class Named(Tensor):
    """A subclass of Tensor, as libraries of images have them."""


def _upstream(model: Any, net: nn.Module, record: Record) -> None:
    """A learned preprocessing in front: gradients flow on through the image."""
    torch.manual_seed(3)
    before = nn.Conv2d(3, 3, 1, dtype=torch.float64)
    for seed in range(2):
        record.run(model, image=before(record.image(seed, grad=False)))
        record(f"gradients upstream {seed}", {name: p.grad for name, p in before.named_parameters()})
        before.zero_grad()


def _attacked(model: Any, net: nn.Module, record: Record) -> None:
    """An image that an optimiser changes."""
    image = nn.Parameter(record.image(grad=False))
    optimizer = torch.optim.SGD([image], lr=10.0)
    for step in range(3):
        optimizer.zero_grad()
        model(image).square().sum().backward()
        optimizer.step()
        record(f"image after step {step}", image)
    record.gradients("gradients")


CASES.add(
    "an image in channels_last", Small, imaged(lambda x: x.contiguous(memory_format=torch.channels_last))
)
CASES.add("an image that is a strided view", Small, imaged(lambda x: x.transpose(2, 3)[:, :, ::2]))
CASES.add("an image that is expanded", Small, imaged(lambda x: x[:, :1].expand(-1, 3, -1, -1)))
CASES.add(
    "an image of a subclass of Tensor",
    Small,
    imaged(lambda x: x.as_subclass(Named)),
    expected=SAME_OR_REFUSED,
)
CASES.add("an image that another module makes", Small, _upstream)
CASES.add("an image that an optimiser changes", Small, _attacked)


# --- hooks and modes of PyTorch's own -----------------------------------------------------------------


def _global_hook(model: Any, net: nn.Module, record: Record) -> None:
    seen: list[str] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        # The model itself is one module more when it is streamed.
        if any(module is each for each in net.children()):
            seen.append(type(module).__name__)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        record.run(model)
        record.run(model)
    finally:
        handle.remove()
    record("seen", seen)


def _hook_with_keywords(model: Any, net: Any, record: Record) -> None:
    handles = [
        net.norm.register_forward_hook(lambda m, args, kwargs, out: 2 * out, with_kwargs=True),
        net.head.register_forward_pre_hook(
            lambda m, args, kwargs: ((args[0] * 3,), kwargs), with_kwargs=True
        ),
        net.conv.register_forward_hook(lambda m, args, out: out + 1, always_call=True),
    ]
    record.run(model)
    for handle in handles:
        handle.remove()
    record.run(model)


class Tripling(torch.overrides.TorchFunctionMode):
    """Changes what a function of PyTorch does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 3 * out if func is F.relu else out


def _function_mode(model: Any, net: nn.Module, record: Record) -> None:
    record.run(model)
    with Tripling():
        record.run(model)
    record.run(model)


def _in_threads(model: Any, net: nn.Module, record: Record) -> None:
    """Passes of two threads, one after the other."""
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            pool.submit(record.run, model).result()
    record.run(model)


@CASES("torch.manual_seed in forward", passes(2), expected=SAME_OR_REFUSED)
class Seeds(Small):
    def late(self, v: Tensor) -> Tensor:
        torch.manual_seed(7)
        return v + torch.rand(WIDTH, dtype=v.dtype)


@CASES("net.training is set directly", between(lambda net: setattr(net, "training", False)))
class Trained(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x * 3 if self.training else x


CASES.add("a forward hook of all modules", Small, _global_hook)
CASES.add("hooks with keywords, and always called", Small, _hook_with_keywords)
CASES.add("a TorchFunctionMode that changes a function", Small, _function_mode, expected=SAME_OR_REFUSED)
CASES.add("passes in another thread", Small, _in_threads)
