"""The page on adding an operator runs as it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from streamcnn import verify
from streamcnn.graph.ops import rule
from streamcnn.graph.ops.rules import rule_for
from tests.pages import run_page

REPLACED = torch.ops.aten.pixel_unshuffle.default


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """What the page's code blocks define, run one after the other."""
    builtin = rule_for(REPLACED)
    assert builtin is not None
    yield run_page("docs/adding_an_operator.md")
    rule(REPLACED, replace=True)(builtin)


def test_the_page_runs(page: dict[str, Any]) -> None:
    assert rule_for(REPLACED) is page["pixel_unshuffle"]
    assert page["report"].max_error < 1e-12


class Talking(nn.Module):
    """Cannot be guarded, so it is captured for each pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("a pass")
        result: torch.Tensor = self.net(x)
        return result


def test_its_operator_streams_where_the_model_cannot_be_guarded(
    page: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report = verify(Talking(page["Sharpening"]()), (2, 3, 45, 39), tile=16)
    assert report.max_error < 1e-12
    assert "a pass" in capsys.readouterr().out
