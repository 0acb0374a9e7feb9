"""What a backward pass reads once more of the user's: it has to be as the forward pass found it."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

from torch import Tensor

from streamcnn.data.source_batch import SourceBatch
from streamcnn.runtime.streamed_pass import Pass


def tensors_read_again(run: Pass) -> list[Tensor]:
    """States without a gradient, and images, that the backward pass of ``run`` reads once more."""
    read = _read_again(run)
    states = [run.states[n] for n in run.program.states if n in read and n not in run.leaf_states]
    images = chain(*(batch.shared_tensors for batch in _batches_of(run, read)))
    # Tensors made in inference mode have no version that could be compared.
    return [*states, *(image for image in images if not image.is_inference())]


def arrays_read_again(run: Pass) -> list[tuple[str, bytes]]:
    """Names and some pixels of the caller's arrays that the backward pass of ``run`` reads once more."""
    return list(chain(*(batch.samples() for batch in _batches_of(run, _read_again(run)))))


def _read_again(run: Pass) -> set[str]:
    """What operators of the backward pass's recomputation read."""
    differentiated = (phase for phase in run.plan.phases if phase.differentiated)
    return {
        operand
        for phase in (*differentiated, *chain(*run.plan.rematerialised.values()))
        for name in phase.nodes
        for operand in run.program.nodes[name].operands
    }


def _batches_of(run: Pass, names: Collection[str]) -> list[SourceBatch]:
    """The images and maps among these."""
    batches: dict[str, SourceBatch] = {run.program.image: run.reader}
    batches |= {name: run.maps[key] for name, key in run.program.maps.items()}
    return [batch for name, batch in batches.items() if name in names]
