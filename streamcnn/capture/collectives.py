"""Collectives of ``torch.distributed`` within a forward pass.

A plan may run independent calls in any order. All processes must run their collectives in the same order,
whatever their plans are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed as dist
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from streamcnn.capture.capture import RawNode
from streamcnn.capture.replacing import replaced_here
from streamcnn.errors import UnsupportedModel
from streamcnn.graph.ops.shared_statistics import AFTER, SYNCHRONISED
from streamcnn.graph.program import Ref
from streamcnn.graph.schemas import with_argument
from streamcnn.support.processes import all_processes

_IN_PLACE = (
    "all_reduce_inplace",
    "all_gather_tensor_inplace",
    "all_gather_inplace",
    "reduce_scatter_tensor_inplace",
    "all_to_all_inplace",
)
"""What Dynamo takes for ``torch.distributed.all_reduce`` and others like it."""


@contextmanager
def collectives_as_called() -> Iterator[None]:
    """Let this thread's collectives have the same gradients as outside of a trace, for the block.

    Autograd does not see collectives that overwrite tensors: gradients pass as if nothing had been written.
    Dynamo's replacements for them would reduce the gradient over all processes.
    """
    with ExitStack() as replaced:
        if all_processes() is not None:
            from torch.distributed import _functional_collectives as functional

            by_name = {name: vars(functional)[name] for name in _IN_PLACE}
            for name, collective in by_name.items():
                unseen = _out_of_sight(collective)
                replaced.enter_context(replaced_here(functional, name, unseen, lasting=True))
            # PyTorch 2.11's Dynamo has the functions themselves in its table, later versions their callers.
            known = functional.traceable_collective_remaps
            present = {
                called: vars(functional)[stand_in.__name__]
                for called, stand_in in known.items()
                if stand_in in by_name.values()
            }
            replaced.enter_context(patch.dict(known, present))
        yield


_NOT_FOLLOWED = (
    *("broadcast", "all_reduce", "reduce", "barrier", "send", "recv", "isend", "irecv", "scatter", "gather"),
    *("all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"),
    *("all_to_all", "all_to_all_single", "broadcast_object_list", "all_gather_object", "gather_object"),
)


@contextmanager
def collectives_refused() -> Iterator[None]:
    """Make this thread's collectives errors for the block, except in functions that are recorded whole.

    Traced call by call, a collective would run at once, without values and without the other processes.
    """
    with ExitStack() as replaced:
        if all_processes() is not None:
            for name in _NOT_FOLLOWED:
                replaced.enter_context(replaced_here(dist, name, _refused(name, vars(dist)[name])))
        yield


def _refused(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if get_proxy_mode() is None:
            return collective(*args, **kwargs)
        raise UnsupportedModel(
            f"the forward pass calls torch.distributed.{name}, which cannot be followed there: allowed are "
            "all_reduce, all_gather, all_gather_into_tensor and reduce_scatter_tensor, not async_op=True, in "
            "a model without TorchScript; call it outside of the model"
        )

    return run


@cache
def _out_of_sight(collective: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return collective(*args, **kwargs)

    return run


def in_their_order(nodes: Iterable[RawNode]) -> Iterator[RawNode]:
    """The calls of a graph, each collective made to depend on the previous one, which fixes their order."""
    before: RawNode | None = None
    for node in nodes:
        if node.target is not SYNCHRONISED:
            yield node
            continue
        if before is not None:
            name = f"{before.name}_after"
            yield replace(
                before, name=name, target=operator.getitem, args=(Ref(before.name), AFTER), kwargs={}
            )
            args, kwargs = with_argument(node.target, node.args, node.kwargs, "after", Ref(name))
            node = replace(node, args=args, kwargs=dict(kwargs))
        yield node
        before = node
