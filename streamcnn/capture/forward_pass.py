"""A call of the user's module whose captured operators are run by the caller.

If Dynamo can follow the Python code, the call is captured with guards (:mod:`streamcnn.capture.guarded`);
otherwise each call is captured anew (:mod:`streamcnn.capture.unguarded`). Capture happens outside of the
caller's hooks, modes and compilers. Side effects of the code happen as in plain PyTorch.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from streamcnn.capture.batch_norms import traceable_batch_norms
from streamcnn.capture.caller_modes import CallerModes, collector, function_modes_aside
from streamcnn.capture.capture import RawGraph, device_of, module_states
from streamcnn.capture.collectives import collectives_as_called, collectives_refused
from streamcnn.capture.guarded.dynamo_settings import silenced
from streamcnn.capture.guarded.guarded_image import CannotBeGuarded
from streamcnn.capture.guarded.guards import GuardedForward, Run
from streamcnn.capture.refusals import refusal
from streamcnn.capture.scripts import interpreted_scripts
from streamcnn.capture.subclasses import (
    refuse_own_functions,
    refuse_shards,
    refuse_without_shape,
    without_left_bases,
)
from streamcnn.capture.unguarded.capture_anew import Capture, capture_anew
from streamcnn.errors import PlanDoesNotFit, StreamError, UnsupportedModel
from streamcnn.graph.fakes import TRACING, bound_known_fakes

T = TypeVar("T")

_FOR_SUCH_CODE = "holds code that can only be captured without values"
"""What refusals say which would not be there if Dynamo could follow all of the code."""
_MOST_BYTES = 2**63 - 1
"""That PyTorch counts."""


class ForwardPass:
    """Captures the calls of one module, and keeps what later calls can use again."""

    def __init__(self) -> None:
        self._guarded = GuardedForward()
        self._unguardable: dict[tuple[bool, bool], str] = {}
        """Modes (training, gradients) in which Dynamo cannot follow the code, with its reason."""

    def __call__(
        self,
        net: nn.Module,
        image: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Run,
        caller_modes: CallerModes | None = None,
    ) -> Any:
        """What ``net(image, *args, **kwargs)`` returns, given that ``run`` carries out its operators.

        ``image`` is a stand-in of the image's shape, dtype and device; see :func:`stand_in`. ``run`` is
        called without the caller's hooks and modes.

        Raises
        ------
        UnsupportedModel
            If the call cannot be captured; the module is as it was.
        """
        with (caller_modes or CallerModes()).aside(), ExitStack() as capturing:
            capturing.enter_context(TRACING)
            bound_known_fakes()
            capturing.enter_context(interpreted_scripts())
            capturing.enter_context(traceable_batch_norms(net))
            capturing.enter_context(collectives_as_called())
            states = module_states(net)
            refuse_without_shape(states)
            refuse_own_functions(states)
            refuse_shards(states)
            capturing.enter_context(without_left_bases(states.values()))

            def run_beside_others(graph: RawGraph, states: Mapping[str, Tensor]) -> Sequence[Any]:
                capturing.close()
                return run(graph, states)

            mode = (net.training, torch.is_grad_enabled())
            # No guard covers attributes of the image.
            can_try = mode not in self._unguardable and not vars(image)
            said = self._unguardable.get(mode, "")
            if can_try:
                try:
                    return self._guarded(net, image, args, kwargs, run_beside_others)
                except CannotBeGuarded as error:
                    said = str(error)
            try:
                capture = _captured_anew(net, image, args, kwargs)
            except UnsupportedModel as error:
                raise _naming_code(error, said) from error.__cause__
            # Reached only if the second capture succeeds; if both fail, the image or an argument is at fault.
            if can_try:
                self._unguardable[mode] = said
                # Dynamo's remains refer to parameters, which could not be exchanged while they do.
                gc.collect()
            try:
                with function_modes_aside():
                    results = run_beside_others(capture.graph, capture.states)
            except BaseException:
                capture.undo()
                raise
            return capture.result(results)

    def until_captured(
        self,
        net: nn.Module,
        image: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        take: Callable[[RawGraph, Mapping[str, Tensor]], T],
    ) -> T:
        """Return ``take(graph, states)`` for a call, which ends there and has no effects.

        Raises
        ------
        UnsupportedModel
            If the call cannot be captured; the module is as it was.
        """
        found: list[T] = []

        def run(graph: RawGraph, states: Mapping[str, Tensor]) -> Sequence[Any]:
            found.append(take(graph, states))
            raise _Taken

        with suppress(_Taken):
            self(net, image, args, kwargs, run)
        return found[0]


class _Taken(Exception):
    """Ends a call of which only the graph is wanted."""


def stand_in(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, requires_grad: bool = False
) -> Tensor:
    """A stand-in for an image: a tensor of ``shape`` in the memory of one element.

    Raises
    ------
    PlanDoesNotFit
        If the shape has 2^63 bytes or more, which PyTorch cannot count.
    """
    if math.prod(shape) * dtype.itemsize > _MOST_BYTES:
        raise PlanDoesNotFit(
            f"an image of shape {tuple(shape)} has 2**63 bytes or more, which PyTorch cannot count: "
            "give a smaller one"
        )
    element = torch.zeros(1, dtype=dtype, device=device)
    # Not a view: from a view's fake tensor Dynamo makes a cycle that the collector does not see, so that
    # captures would stay, with weak references to the parameters.
    image = torch.empty(0, dtype=dtype, device=device)
    image.set_(element.untyped_storage(), 0, shape, (0,) * len(shape))
    return image.requires_grad_(requires_grad)


def capture(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> RawGraph:
    """Capture ``module`` for an image of ``shape`` (N, C, H, W) in its present mode, without running it.

    Raises
    ------
    UnsupportedModel
        If the module cannot be captured at this shape.
    """
    image = stand_in(shape, dtype, device_of(module))
    return ForwardPass().until_captured(module, image, (), {}, lambda graph, states: graph)


def _captured_anew(net: nn.Module, image: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    try:
        with _quiet(), collector.off(), collectives_refused():
            return capture_anew(net, image, args, kwargs)
    except StreamError:
        raise
    except Exception as error:
        raise refusal(net, image, error) from error


def _naming_code(error: UnsupportedModel, said: str) -> UnsupportedModel:
    """``error``, with Dynamo's reason added if code that Dynamo cannot follow is the cause."""
    if not said or _FOR_SUCH_CODE not in str(error):
        return error
    return UnsupportedModel(f"{str(error).rstrip('.')}. What Dynamo says of that code: {said}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch's own log of a failed trace off the terminal; its reason is in our error.

    Modules and functions that the user has compiled run as they are, without warnings about our hooks.
    """
    from torch._dynamo import config

    with (
        warnings.catch_warnings(),
        config.patch(error_on_nested_fx_trace=False),
        silenced("torch._subclasses.fake_tensor"),
        silenced("torch.fx.experimental.symbolic_shapes"),
    ):
        warnings.filterwarnings(
            "ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks"
        )
        yield
