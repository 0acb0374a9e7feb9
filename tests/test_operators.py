"""Every family's own samples of operators, streamed and plain."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_streamed_equals_plain, streaming_plan
from operator_cases import SHAPE, TILE, after_convolution

from streamcnn.graph.ops import samples
from streamcnn.graph.ops.rules import Sample

# --- every family's own samples ----------------------------------------------------------------------


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.name)
# Plain PyTorch says that it copies its input; streaming does not.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_sample(sample: Sample) -> None:
    net = sample.build().train(sample.train)
    assert_streamed_equals_plain(net, sample.shape, tile=(16, 13), resident=sample.resident)


# --- chance -------------------------------------------------------------------------------------------


def test_operators_without_a_rule_say_so() -> None:
    net = after_convolution(torch.tril)
    (resident,) = streaming_plan(net, SHAPE, TILE)[1].residents
    assert resident.startswith("aten.tril: it has no rule")
