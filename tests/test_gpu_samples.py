"""On a CUDA device: every family's own samples of operators, streamed and plain."""

from __future__ import annotations

import emulated_card
import pytest
from gpu_cases import GPU
from stores_away import away

from streamcnn import verify
from streamcnn.graph.ops import samples
from streamcnn.graph.ops.rules import Sample
from streamcnn.plan.storage import Tier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("gpu_left_clean"),
    # Plain PyTorch says that it copies its input; streaming does not.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


@pytest.fixture(params=["on the device", "away"])
def place(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Where maps are stored: as planned, or in host memory with copies while others are computed."""
    if request.param == "away":
        away(monkeypatch, lambda name: Tier.HOST)
    return str(request.param)


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.name)
def test_sample(place: str, sample: Sample) -> None:
    if emulated_card.is_wanted() and sample.name == "recurrent layers":
        pytest.skip("PyTorch computes them by operators that only a GPU has")
    net = sample.build().train(sample.train).to(GPU)
    found = verify(net, sample.shape, tile=(16, 13))
    assert found.max_error < 1e-7, found.explain()
