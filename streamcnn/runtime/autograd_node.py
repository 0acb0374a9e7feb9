"""A streamed pass as one node of the user's autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamcnn.capture.caller_modes import saved_tensors_hooks_aside
from streamcnn.runtime.read_again import arrays_read_again, tensors_read_again
from streamcnn.runtime.streamed_pass import Pass
from streamcnn.runtime.transforms import refuse_many_gradients


class Streamed(torch.autograd.Function):
    """A streamed pass as one node of the user's autograd graph."""

    @staticmethod
    def forward(ctx: Any, run: Pass, *anchors: Tensor) -> tuple[Tensor, ...]:
        # The caller's hooks are for the tensors that this node saves, not for the graphs inside it.
        with saved_tensors_hooks_aside():
            values = run.forward()
        names = run.output_names
        # Saved only so that autograd notices a state or an image being changed before backward.
        ctx.save_for_backward(*anchors, *tensors_read_again(run))
        ctx.run, ctx.arrays = run, arrays_read_again(run)
        ctx.places = [anchor.data_ptr() for anchor in run.anchors]
        # Aliases: the run keeps its values, and autograd makes an output keep the run.
        outputs = {name: values[name].detach() for name in names}
        # Changes that the user makes to a result must not change values computed from it later.
        program, plan, present = run.current.program, run.current.plan, run.present_names
        read = {operand for node in program.nodes.values() for operand in node.operands}
        outputs |= {n: outputs[n].clone() for n in names if present[n] in read}
        constant = (n for n in names if present[n] not in plan.differentiated)
        ctx.mark_non_differentiable(*(outputs[n] for n in constant))
        ctx.set_materialize_grads(False)
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run = _run_of(ctx)
        refuse_many_gradients(grads)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.run = None
        anchors = ctx.saved_tensors[: len(ctx.needs_input_grad) - 1]
        _refuse_changes(ctx, run)
        # Tiles are computed again, which autograd has to follow.
        with saved_tensors_hooks_aside(), torch.inference_mode(False):
            arriving = {
                name: gradient.clone() if gradient.is_inference() else gradient
                for name, gradient in zip(run.output_names, grads, strict=True)
                if gradient is not None
            }
            found = run.backward(arriving)
        program, differentiated = run.current.program, run.current.plan.differentiated
        leaves = (*run.current.leaf_states, *{program.image}.intersection(differentiated))
        by_anchor = dict(zip(leaves, anchors, strict=True))
        found |= {name: torch.zeros_like(by_anchor[name]) for name in program.zeroed & by_anchor.keys()}
        # The image may be on the host while its gradient was summed where the model is.
        gradients = ((found.get(name), anchor.device) for name, anchor in by_anchor.items())
        return None, *(None if gradient is None else gradient.to(place) for gradient, place in gradients)


def _run_of(ctx: Any) -> Pass:
    """The pass to differentiate.

    Raises
    ------
    RuntimeError
        If its stores are freed, or it is to be differentiated twice.
    """
    run: Pass | None = ctx.run
    if run is None:
        raise RuntimeError(
            "this streamed output has been differentiated already and its stores are freed: "
            "pass retain_graph=True to the first backward(), or run the forward pass again"
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a streamed pass can only be differentiated once: call backward() or grad() without "
            "create_graph=True"
        )
    return run


def _refuse_changes(ctx: Any, run: Pass) -> None:
    """Check what the pass reads again and autograd does not watch.

    Raises
    ------
    RuntimeError
        If it was changed since the forward pass.
    """
    if ctx.places != [anchor.data_ptr() for anchor in run.anchors]:
        raise RuntimeError(
            "the .data of a parameter was replaced between forward and backward: run the forward pass again"
        )
    if ctx.arrays and ctx.arrays != (present := arrays_read_again(run)):
        raise RuntimeError(
            f"{_changed(ctx.arrays, present)} was changed between forward and backward, which "
            "reads it once more: leave it as it is until then, or give each pass a copy"
        )


def _changed(before: list[tuple[str, bytes]], present: list[tuple[str, bytes]]) -> str:
    """The name of the first array whose pixels have changed."""
    return next(name for (name, was), (_, now) in zip(before, present, strict=True) if was != now)
