"""Check a model: compare all that training reads, streamed and in plain PyTorch, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from streamcnn.capture.capture import device_of
from streamcnn.capture.results import taken_apart
from streamcnn.graph.ops.whole_norms import NormsDifferentiatedRight
from streamcnn.graph.program import has_gradient
from streamcnn.runtime.streaming_model import StreamingModel
from streamcnn.support.units import plural

FLOOR = 1e-6
"""Share of the largest norm of a kind below which a value counts as noise: a bias before batch norm has a
true gradient of zero."""

_MISREAD = (
    "PyTorch's own gradients are wrong here, and were corrected: on a CPU, norms of one image misread "
    "gradients in another layout; in plain PyTorch, train on a GPU or with two images"
)


@dataclass(frozen=True, slots=True)
class Verification:
    """Errors of a streamed pass against the plain one, each ``|a - b| / max(|b|, FLOOR * largest)``.

    ``largest`` is the largest norm among the plain pass's outputs, gradients or buffers, each kind by itself.
    """

    errors: Mapping[str, float]
    """By name: ``output <i>``, ``image gradient``, ``gradient of <parameter>``, ``gradient of input <i>``,
    ``gradient of <named input>``, ``buffer <name>``."""
    num_tiles: int
    """Number of tiles of the phase that has most."""
    num_phases: int
    sizes: Mapping[str, float]
    """``|a| / max(|b|, FLOOR * largest)`` by the same names. Where the true value is known to be zero, this
    is the error of the streamed pass alone, whatever the plain pass's."""
    notes: tuple[str, ...] = ()
    residents: tuple[str, ...] = ()
    """Operators that ran on whole maps for want of a rule, with the reason, as in ``Plan.residents``."""

    @property
    def max_error(self) -> float:
        """The largest error."""
        return max(self.errors.values(), default=0.0)

    def explain(self) -> str:
        """The verdict and the worst few entries as text."""
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:5]
        phases, tiles = plural(self.num_phases, "phase"), plural(self.num_tiles, "tile")
        lines = [
            f"streamed in {phases} of up to {tiles} against plain PyTorch: "
            f"largest error {self.max_error:.2e} over {len(self.errors)} comparisons",
            *(f"  {error:.2e}  {name}" for name, error in worst),
            *self.notes,
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of both passes."""

    image: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def fresh(self) -> _Call:
        """The same values in new tensors, which require a gradient if they can have one."""
        return _Call(*pytree.tree_map(_fresh, (self.image, self.args, self.kwargs)))


def verify(
    net: nn.Module,
    shape: tuple[int, int, int, int],
    *,
    tile: int | tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    inputs: Sequence[Any] = (),
    named_inputs: Mapping[str, Any] | None = None,
) -> Verification:
    """Compare a streamed pass of a copy of ``net`` with the plain one on a random image.

    Every local operator is streamed, the last ones too. Dropout layers are switched off, since plain and
    streamed passes draw different masks from the same seed.

    Parameters
    ----------
    net
        Any module, in the mode to check; it is not changed.
    shape
        Shape (N, C, H, W) of the image.
    tile
        As for ``StreamingModel``.
    dtype
        Real type to compare in; float64 shows errors of the method, float32 those of rounding as well.
        Complex parameters, buffers and inputs get the complex type of that precision.
    seed
        Seed of the image and of the gradients that arrive at the outputs.
    inputs, named_inputs
        The module's further arguments after the image, in order and by name. Each pass takes copies of the
        tensors, on the model's device. Those with a floating-point or complex type are cast, and their
        gradients compared.

    Raises
    ------
    UnsupportedModel
        If the module cannot be captured at this shape.
    """
    plain, num_dropped = _without_dropout(net, dtype)
    streamed = StreamingModel(copy.deepcopy(plain), tile=tile)
    streamed.resident_tail = False
    device = device_of(plain)
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda given: _cast(given.to(device), dtype), (tuple(inputs), dict(named_inputs or {}))
    )
    call = _Call(_images(shape, seed, dtype).to(device), args, kwargs)
    differentiating = NormsDifferentiatedRight()
    with _comparing(device):
        expected = _everything(plain, call.fresh(), seed, differentiating)
        found = _everything(streamed, call.fresh(), seed)
        # The plan of the pass, whose image requires a gradient: another one would have to be captured first.
        again = call.fresh()
        planned = streamed.planned(shape, dtype, image_gradient=True, inputs=again.args, named=again.kwargs)
    errors, sizes = relative_errors(expected, found)
    return Verification(
        errors=errors,
        sizes=sizes,
        num_tiles=max((phase.num_tiles for phase in planned.plan.phases), default=0),
        num_phases=len(planned.plan.phases),
        notes=(
            *([f"{num_dropped} dropout layers were switched off"] if num_dropped else []),
            *([_MISREAD] if differentiating.was_wrong else []),
        ),
        residents=planned.plan.residents,
    )


def rounding(
    net: nn.Module, shape: tuple[int, int, int, int], *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Mapping[str, float]:
    """Errors of the plain pass of `verify` against itself, with the image changed in its last digit.

    Where these are large, the net magnifies rounding, as batch norm over two values does, and an error of a
    streamed pass that is no larger shows nothing. The names are those of ``Verification.errors``.

    Parameters
    ----------
    net, shape, dtype, seed
        As for `verify`.
    """
    plain, _ = _without_dropout(net, dtype)
    image = _images(shape, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(-1, 2, shape, generator=generator, device="cpu").to(dtype)
    moved = image * (1 + digits * torch.finfo(dtype).eps)
    device = device_of(plain)
    with _comparing(device):
        expected, found = (
            _everything(copy.deepcopy(plain), _Call(each.to(device), (), {}).fresh(), seed)
            for each in (image, moved)
        )
    return relative_errors(expected, found)[0]


@contextmanager
def _comparing(device: torch.device) -> Iterator[None]:
    """Enable gradients, and restore the random generators of the host and of ``device`` afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        yield


def _without_dropout(net: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, int]:
    """A copy of ``net`` in ``dtype`` whose dropout layers drop nothing, and how many of these would have."""
    plain: nn.Module = copy.deepcopy(net)
    plain._apply(lambda state: _cast(state, dtype))  # type: ignore[no-untyped-call]
    dropped = [m for m in plain.modules() if isinstance(m, _DropoutNd) and m.training and m.p > 0]
    for module in dropped:
        module.p = 0.0
    return plain, len(dropped)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in the real or complex type of that precision; integers and booleans as they are."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _fresh(leaf: Any) -> Any:
    """A copy of a tensor, which requires a gradient if it can have one; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(has_gradient(leaf.dtype))


def _images(shape: tuple[int, int, int, int], seed: int, dtype: torch.dtype) -> Tensor:
    """Random images that differ in brightness and contrast.

    Otherwise their pooled vectors would be nearly the same, and a batch norm of these would magnify rounding
    instead of showing errors of the method.
    """
    # On the host, whatever device is the user's default.
    image = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype, device="cpu")
    step = torch.linspace(-1, 1, shape[0] + 2, dtype=dtype, device="cpu")[1:-1].view(-1, 1, 1, 1)
    return image * (1 + step / 2) + step


def _everything(
    model: nn.Module, call: _Call, seed: int, backward_block: AbstractContextManager[Any] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Outputs, gradients and buffers after one forward and backward pass."""
    torch.manual_seed(seed)
    outputs = _outputs(model(call.image, *call.args, **call.kwargs))
    generator = torch.Generator().manual_seed(seed + 1)
    trained = [out for out in outputs.values() if out.requires_grad]
    arriving = [
        torch.randn(out.shape, generator=generator, dtype=out.dtype, device="cpu").to(out.device)
        for out in trained
    ]
    with backward_block or nullcontext():
        torch.autograd.backward(trained, arriving)
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in _leaves(model, call).items()}
    gradients["image gradient"] = call.image.grad
    return {
        "output": {name: out.detach() for name, out in outputs.items()},
        "gradient": {name: grad for name, grad in gradients.items() if grad is not None},
        "buffer": {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()},
    }


def _outputs(result: Any) -> dict[str, Tensor]:
    """All tensors and numbers of a result by name."""
    found: list[Tensor] = []
    for leaf in taken_apart(result)[0]:
        if isinstance(leaf, (int, float, complex)):
            found.append(torch.tensor(leaf, dtype=torch.complex128))
        elif isinstance(leaf, Tensor):
            found.append(leaf)
    return {f"output {index}": value for index, value in enumerate(found)}


def _leaves(model: nn.Module, call: _Call) -> dict[str, Tensor]:
    """Parameters and further inputs by name; an input with a parameter's name is called ``input <name>``."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    given = {f"input {index}": value for index, value in enumerate(call.args)} | call.kwargs
    for outer, value in given.items():
        for path, leaf in pytree.tree_leaves_with_path(value):
            name = f"{outer}{pytree.keystr(path)}"
            if isinstance(leaf, Tensor):
                found[f"input {name}" if name in found else name] = leaf
    return found


def relative_errors(
    expected: Mapping[str, Mapping[str, Tensor]], found: Mapping[str, Mapping[str, Tensor]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors and sizes by name, as in `Verification`."""
    errors: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for kind, references in expected.items():
        norms = {name: _norm(value) for name, value in references.items()}
        floor = max(FLOOR * max(norms.values(), default=0.0), torch.finfo(torch.float64).tiny)
        for name, reference in references.items():
            error = _distance(found[kind].get(name), reference) / max(norms[name], floor)
            # A maximum would pass over NaN.
            errors[name] = math.inf if math.isnan(error) else error
        for name in found[kind].keys() - references.keys():
            errors[name] = 0.0 if _norm(found[kind][name]) == 0 else math.inf
        for name, value in found[kind].items():
            sizes[name] = _norm(value) / max(norms.get(name, 0.0), floor)
    return errors, sizes


def _distance(value: Tensor | None, reference: Tensor) -> float:
    """``|value - reference|``; ``|reference|`` if there is no value, infinite for another shape."""
    if value is None:
        return _norm(reference)
    if value.shape != reference.shape:
        return math.inf
    return _norm(_cast_up(value) - _cast_up(reference))


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(_cast_up(value)))


def _cast_up(value: Tensor) -> Tensor:
    return value.to(torch.complex128) if value.is_complex() else value.double()
