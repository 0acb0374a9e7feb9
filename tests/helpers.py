"""The reference harness: compare a module streamed and plain, in float64, in all that training reads."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.zoo.states import calibrated as calibrated
from benchmarks.zoo.states import randomized as randomized
from streamcnn import StreamingModel
from streamcnn.capture.capture import module_states
from streamcnn.capture.forward_pass import capture
from streamcnn.capture.lowering.tracing import Trace
from streamcnn.geometry.axis_maps import AxisMap
from streamcnn.geometry.regions import Interval
from streamcnn.graph.program import Program, differentiated
from streamcnn.plan.plan import Plan
from streamcnn.verification import FLOOR, Verification, verify

TOLERANCE = 1e-9
"""Largest error allowed; rounding in float64 stays three digits below it."""

Shape = tuple[int, int, int, int]


def assert_streamed_equals_plain(
    module: nn.Module,
    shape: Shape,
    *,
    tile: int | tuple[int, int],
    tolerance: float = TOLERANCE,
    resident: bool | None = False,
    one_tile: bool = False,
    zero_gradients: bool = False,
    zeros: frozenset[str] = frozenset(),
) -> Verification:
    """Raise unless outputs, gradients and buffers of the streamed ``module`` are those of the plain one.

    An error is ``|a - b| / max(|b|, 1e-6 * largest)`` of norms, see :func:`streamcnn.verify`.

    Parameters
    ----------
    module
        In the mode to be checked; it is not changed.
    shape
        (N, C, H, W) of the image.
    resident
        Whether some operator must run on a whole map: yes, no, or ``None`` for either.
    one_tile
        Whether no phase needs to have more than one tile.
    zero_gradients
        Whether most gradients may vanish.
    zeros
        Parameters whose true gradient is zero, as that of a bias in front of batch norm. The plain gradient
        is rounding alone there, so the streamed one is compared with zero itself.
    """
    if not zero_gradients:
        assert_gradients_exist(module, shape)
    found = verify(module, shape, tile=tile)
    errors = {
        name: found.sizes[name] if name.removeprefix("gradient of ") in zeros else error
        for name, error in found.errors.items()
    }
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"{len(wrong)} of {len(errors)} errors exceed {tolerance}: {wrong}\n{found.explain()}"
    assert one_tile or found.num_tiles > 1, f"nothing was cut:\n{found.explain()}"
    if resident is not None:
        assert bool(found.residents) is resident, f"resident operators: {found.residents}"
    return found


def all_in_tiles(net: nn.Module) -> StreamingModel:
    """A streamed net without a resident tail."""
    model = StreamingModel(net, tile=16)
    model.resident_tail = False
    return model


def assert_gradients_exist(module: nn.Module, shape: Shape) -> None:
    """Raise if most parameters' gradients, or the image's, are zero, since comparing these shows nothing.

    Some may be zero, as that of a bias before batch norm is.
    """
    plain = copy.deepcopy(module).double()
    image = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs = [out for out in pytree.tree_leaves(plain(image)) if isinstance(out, torch.Tensor)]
    roots = [(out * torch.randn_like(out)).sum() for out in outputs if out.requires_grad]
    assert roots, "no output depends on the image or a parameter"
    sum(roots[1:], roots[0]).backward()
    leaves = [image, *(parameter for parameter in plain.parameters() if parameter.requires_grad)]
    norms = [0.0 if leaf.grad is None else float(leaf.grad.norm()) for leaf in leaves]
    known = sum(norm > FLOOR * max(norms) for norm in norms)
    assert norms[0] > 0, "the image has no gradient"
    assert 2 * known > len(norms), f"only {known} of {len(norms)} gradients are not zero"


def traced(module: nn.Module, shape: Shape, *, tail: str | None = None) -> tuple[Program, frozenset[str]]:
    """The program of ``module`` for float32 images, and the nodes that parameters' gradients pass through."""
    trace = Trace(
        capture(module, shape, torch.float32), module_states(module), torch.float32, torch.device("cpu")
    )
    program, parameters = trace.program(tail), dict(module.named_parameters())
    leaves = {name for name, qualified in program.states.items() if qualified in parameters}
    return program, differentiated(program, leaves)


def required(axis_map: AxisMap, out: Interval, size: int) -> Interval:
    """Positions that ``out`` reads inside an input of ``size`` positions, or the nearest one."""
    window = axis_map.window(out)
    start = min(max(window.start, 0), size - 1)
    return Interval(start, max(min(window.stop, size), start + 1))


def streaming_plan(module: nn.Module, shape: Shape, tile: int | tuple[int, int]) -> tuple[Program, Plan]:
    """The program and plan by which :func:`streamcnn.verify` runs ``module``: no resident tail."""
    model = StreamingModel(copy.deepcopy(module).double(), tile=tile)
    model.resident_tail = False
    planned = model.planned(shape, torch.float64, image_gradient=True)
    return planned.program, planned.plan


def no_home() -> Path:
    """A stand-in for ``Path.home`` where there is no home folder."""
    raise RuntimeError("Could not determine home directory.")
