"""The whole image at full resolution, through ``StreamingModel``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from benchmarks.harness.attempts import Refused
from benchmarks.harness.batch_search import PlannedBatch
from benchmarks.harness.classifiers import make_net
from benchmarks.harness.method import TrainedMethod
from benchmarks.harness.task import Task
from streamcnn import StreamingModel
from streamcnn.data.normalisation import Normalise

CODE_BYTES = 2**24
"""Bytes of a streamed row's budget on the CPU that are left to library code which runs for the first time: it
is resident and no data, so the kernel's limit does not see it, and the peak does."""
HOST_SLACK = 3 * 2**23
"""Bytes of a streamed row's budget that are left to the interpreter between passes."""
ADAM_COPIES = 3
"""Weights, and the two averages that Adam keeps of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream(TrainedMethod):
    """Streamed in one process."""

    kind = "stream"
    label = "streamed"
    marker = "*"
    stands_out = True
    batch_search = PlannedBatch()
    streaming_model: ClassVar[type[StreamingModel]] = StreamingModel

    def make_model(self, task: Task, size: int) -> StreamingModel:
        """The network, streamed within what weights and Adam leave of the budget."""
        assert self.model is not None
        net = make_net(self.model, task.scale.recipe.num_classes, size, pretrained=task.pretrained)
        return self.streaming_model(net, _left(task, net), preprocess=Normalise(), device=task.device)


def _left(task: Task, net: nn.Module) -> int:
    """Bytes of the budget that a pass may take.

    On the CPU a pass counts from what there is when it begins; on a GPU it counts everything itself.
    """
    if task.device != "cpu":
        return task.budget
    taken = ADAM_COPIES * sum(p.nbytes for p in net.parameters()) + HOST_SLACK + CODE_BYTES
    if taken >= task.budget:
        raise Refused(f"weights and Adam's averages alone take {taken} bytes")
    return task.budget - taken
