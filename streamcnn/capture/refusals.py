"""Why a call of the user's module could not be captured, in the user's words."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from streamcnn.capture.lines import is_users, shortened
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.autocast import autocast_state
from streamcnn.support.units import plural

_ALLOWED = (
    "Allowed are modules whose forward takes the image first and does not branch on its values; check that "
    "the plain model accepts this shape and arguments"
)
_CHOOSES = (
    "Weigh values by the mask instead of choosing them, as in (loss * mask).sum() / mask.sum(), or return "
    "what is chosen from, and choose outside of the model"
)
_SIZES = {
    "_pack_padded_sequence": (
        "Keep the sequences padded and weigh what comes out by a mask, or pack them outside of the model"
    ),
    "linalg_lstsq": "Multiply by torch.linalg.pinv(A), or solve the normal equations by torch.linalg.solve",
}
"""What to do instead of functions whose results have sizes that values decide, by the operator."""
_CONVERTS = "Return the tensor, and convert it outside of the model; convert an argument before the call"
_READS_VALUE = "it reads a value of a tensor (.item(), float(), bool(), an f-string, an if or a loop)"
_NO_RESULT = "argument of type:"
"""How ``torch.fx`` begins to say that it knows no results of some class."""
_NUMPY = ".numpy() is not supported for tensor subclasses"
_FORMAT = "unsupported format string passed to FakeTensor"
_UNALLOCATED = "The tensor has a non-zero number of elements, but its data is not allocated yet"
_NO_STORAGE = ("Not available for 'meta' device type", "argument of type: <class 'torch.storage.")
"""How PyTorch begins to say that a tensor without values has no memory."""
_MOVED = "_apply(): Couldn't swap "
"""How PyTorch says that tensors without values have no numbers, cannot be printed or be moved."""
_SUBCLASS = "Creating a new Tensor subclass "
"""How PyTorch begins to say that a tensor without values cannot be of another class."""
_FUNCTIONAL = "torch/_functorch/"
"""Where the transforms of ``torch.func`` are."""
_NESTED = "torch/nested/"
"""Where nested tensors are."""
_OBSERVER = "ObserverBase"
"""What observers' classes derive from, in ``torch.ao``, which PyTorch is to lose, and in torchao."""
_CHANNELS: dict[type[nn.Module], str] = {
    _ConvNd: "in_channels",
    _NormBase: "num_features",
    nn.GroupNorm: "num_channels",
}
"""What layers call the number of channels that they were made for."""


def refusal(net: nn.Module, image: Tensor, error: Exception) -> UnsupportedModel:
    """The error to raise after ``error`` has ended the capture of ``net(image)``."""
    reason = (
        of_channels(net, image, error)
        or _of_dtypes(net, image, error)
        or _of_observer(net, error)
        or f"{_reason(error)}{_line_of(error)}. {_advice(error)}"
    )
    return UnsupportedModel(
        f"the model cannot be captured for an image of shape {tuple(image.shape)}: {reason}."
    )


def of_channels(net: nn.Module, image: Tensor, error: Exception) -> str:
    """The fault and the remedy, if the image's channels do not match the first layer that has a number of
    them; else an empty text."""
    layers = ((name, layer, _channels_of(layer)) for name, layer in net.named_modules())
    name, first, allowed = next((found for found in layers if found[2]), ("", None, 0))
    found = image.shape[1]
    if first is None or found == allowed:
        return ""
    if not any(layer is first and given.shape[1:2] == (found,) for layer, given in _calls(error)):
        return ""
    named = f"the model's layer {name}" if name else "the model"
    kind = f"{type(first).__name__}({first.extra_repr()})"
    return (
        f"the image has {plural(found, 'channel')}, and {named}, {kind}, takes {allowed}. Give "
        f"an image with {plural(allowed, 'channel')}, have preprocess= choose or make them, or make the "
        f"model for {found} (in_chans={found} of a model from timm)"
    )


def _of_dtypes(net: nn.Module, image: Tensor, error: Exception) -> str:
    """The fault and the remedy, if a layer has another dtype than the image, which it was given or what was
    computed from it; else an empty text."""
    layer, given = next(reversed([*_calls(error)]), (net, image))
    own = {parameter.dtype for parameter in layer.parameters(recurse=False)}
    if len(own) != 1 or given.dtype != image.dtype or given.dtype in own or autocast_state(image.device):
        return ""
    (dtype,) = own
    name = next((name for name, module in net.named_modules() if module is layer), "")
    named = f"the model's layer {name}" if name else "the model"
    return (
        f"the image is of {image.dtype}, and {named}, {type(layer).__name__}, of {dtype}. Convert the image, "
        f"as image.to({dtype}) or by preprocess=, or the model, as model.to({image.dtype})"
    )


def _channels_of(layer: nn.Module) -> int:
    """The number of input channels of a layer; 0 if it has none."""
    names = (name for kind, name in _CHANNELS.items() if isinstance(layer, kind))
    return next((int(getattr(layer, name)) for name in names), 0)


def _of_observer(net: nn.Module, error: Exception) -> str:
    """The fault and the remedy, if a quantisation observer was being called; else an empty text."""
    called = [module for module, _ in _calls(error) if _OBSERVER in map(_name_of, type(module).__mro__)]
    if not called:
        return ""
    name = next((name for name, module in net.named_modules() if module is called[-1]), "")
    return (
        f"the observer '{name}' ({type(called[-1]).__name__}) decides by values of the map what it computes. "
        "Allowed are MinMaxObserver, MovingAverageMinMaxObserver, both of them per channel, and "
        "FusedMovingAvgObsFakeQuantize: choose those in the qconfig, or let the module itself see smaller "
        "images first and switch its observers off with model.apply(torch.ao.quantization.disable_observer)"
    )


def _name_of(kind: type) -> str:
    return kind.__name__


def _calls(error: Exception) -> Iterator[tuple[nn.Module, Tensor]]:
    """The modules that were running when an error was raised, each with its first argument, if a tensor."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        match _first_arguments(frame):
            case nn.Module() as module, Tensor() as given:
                yield module, given


def _first_arguments(frame: FrameType) -> tuple[object, ...]:
    code = frame.f_code
    return tuple(frame.f_locals.get(name) for name in code.co_varnames[: min(code.co_argcount, 2)])


def _reason(error: Exception) -> str:
    """The reason why tracing failed, as text."""
    if isinstance(error, DataDependentOutputException):
        return _READS_VALUE
    if isinstance(error, DynamicOutputShapeException):
        if _operator_of(error) in _SIZES:
            return f"it calls {_operator_of(error)}, and values decide the sizes of what that gives"
        return "a shape depends on values (a boolean mask as an index, nonzero, unique)"
    said = first_line(error).rstrip(".")
    if is_of_script(error):
        return _of_script(str(error))
    if isinstance(error, UnsupportedOperatorException):
        return f"it calls {said}, which does not say what it gives without computing it"
    if _NUMPY in said:
        return (
            "it gives a tensor's values to NumPy, and the image, maps beside it and what is computed from "
            "them have none yet"
        )
    if _FORMAT in said or said.startswith(_UNALLOCATED):
        return _READS_VALUE
    if said.startswith(_NO_STORAGE):
        return "it reads or writes the memory of a tensor (storage(), untyped_storage()), which has none yet"
    if said.startswith(_MOVED):
        return "it makes or moves layers with parameters (Module.to): do so outside of the forward pass"
    if said.startswith(_SUBCLASS):
        return (
            f"it makes a tensor of class {said.removeprefix(_SUBCLASS).split()[0]}, and holds code that can "
            "only be captured without values: use tensors of torch.Tensor within it"
        )
    if said.startswith(_NO_RESULT):
        return (
            f"it returns an object of {said.removeprefix(_NO_RESULT).strip()}, and holds code that can only "
            "be captured without values: return tensors in tuples, lists, dicts or dataclasses"
        )
    if _passes_through(error, _NESTED):
        return "it makes a nested tensor: pad what differs in length, and weigh it by a mask"
    if _passes_through(error, _FUNCTIONAL):
        return (
            "it uses a transform of torch.func (vmap, grad, jvp), and holds code that can only be captured "
            f"without values ({said})"
        )
    return said


def _advice(error: Exception) -> str:
    """The remedy, as text: what is allowed, or what to do instead."""
    if isinstance(error, DynamicOutputShapeException):
        return _SIZES.get(_operator_of(error), _CHOOSES)
    return _CONVERTS if _NUMPY in first_line(error) else _ALLOWED


def _passes_through(error: Exception, folder: str) -> bool:
    """Whether code in ``folder`` was running when an error was raised."""
    return any(folder in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _operator_of(error: DynamicOutputShapeException) -> str:
    """The name of the operator whose result has a size that values decide."""
    return str(error.func._schema.name).rpartition("::")[2]


def is_of_script(error: Exception) -> bool:
    """Whether TorchScript raised an error, which then has lost its original type."""
    return "TorchScript interpreter" in first_line(error)


def _of_script(text: str) -> str:
    """The reason why a script failed, and its line, from TorchScript's own text."""
    before, mark, _ = text.partition("<--- HERE")
    lines = [line.strip() for line in before.splitlines()]
    line = f" in '{lines[-2]}'" if mark and len(lines) > 1 else ""
    # Errors about missing values have lost their text.
    said = text.rpartition("Error:")[2].strip().partition("\n")[0].rstrip(".")
    return f"a script{line}: {said or _READS_VALUE}"


def _line_of(error: Exception) -> str:
    """The last line of code outside PyTorch and this package in an error's traceback, as text; empty if there
    is none, or only generated code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.line and is_users(frame.filename)]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno}: {shortened(own[-1].line)})" if own else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class's name if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
