"""What verify says of a model: what is streamed, what stops the rest, where, and what one does about it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamcnn
from streamcnn import capture
from streamcnn.capture.lines import line_of
from streamcnn.errors import UnsupportedModel
from streamcnn.graph import ops
from streamcnn.runtime.obstacles import REMEDIES, remedy_for, streamability

Run = Callable[..., tuple[int, str, str]]


class Stopped(nn.Module):
    """Two operators that are not streamed, the first of them twice, in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.flat = nn.Flatten()
        self.head = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        rows = x.renorm(2, 2, 9.0) + x.renorm(2, 2, 9.0)
        found: Tensor = self.head(self.flat(x)) + rows.mean((1, 2, 3))[:, None]
        return found


class Printing(nn.Module):
    """Does what no guard covers, so that calls are recorded without their lines."""

    def forward(self, x: Tensor) -> Tensor:
        np.random.rand()
        return x.renorm(2, 3, 9.0).mean((2, 3))


def test_obstacles_have_a_place_a_reason_a_remedy_and_bytes() -> None:
    net = Stopped()
    net(torch.zeros(1, 3, 40, 60))
    found = streamability(net, (2, 3, 40, 60))
    renorm, linear = found.obstacles
    nbytes = 2 * 4 * 20 * 30 * 4
    assert (renorm.operator, renorm.count) == ("aten.renorm", 2)
    assert renorm.reason == "it has no rule"
    assert renorm.remedy == remedy_for("it has no rule")
    assert renorm.nbytes == 3 * nbytes  # one map is read, and two are given
    assert renorm.module == "model (Stopped)"
    line = (
        Path(__file__)
        .read_text()
        .splitlines()
        .index("        rows = x.renorm(2, 2, 9.0) + x.renorm(2, 2, 9.0)")
        + 1
    )
    assert renorm.line == f"test_obstacles.py:{line}: rows = x.renorm(2, 2, 9.0) + x.renorm(2, 2, 9.0)"
    assert (linear.operator, linear.module, linear.count) == ("aten.linear", "head (Linear)", 1)
    assert linear.nbytes == nbytes + 2 * 2 * 4
    assert "AdaptiveAvgPool2d" in linear.remedy
    assert found.num_streamed == 2
    assert found.num_following > 0


def test_a_model_that_is_streamed_has_no_obstacles() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    found = streamability(net, (2, 3, 4000, 4000))
    assert (found.obstacles, found.num_following) == ((), 0)
    assert found.plain_bytes > 2 * 4 * 3998**2 * 4
    assert net[1].num_batches_tracked == 0


def test_where_lines_are_not_known_the_module_is_named() -> None:
    (found,) = streamability(Printing(), (1, 3, 20, 20)).obstacles
    assert (found.operator, found.line, found.module) == ("aten.renorm", "", "model (Printing)")


def test_the_innermost_line_of_the_user_is_told_from_those_around_it() -> None:
    frames = [
        (streamcnn.__file__, 1, "run", "return net(image)"),
        ("/home/me/net.py", 12, "forward", "x = self.block(x)"),
        ("/home/me/blocks.py", 7, "forward", "return x.cumsum(2)"),
        (torch.__file__, 5, "cumsum", "return torch.cumsum(x)"),
    ]
    trace = "".join(
        f'  File "{f}", line {n}, in {name}\n    {code}\n    ^^^^\n' for f, n, name, code in frames
    )
    assert line_of(trace) == "blocks.py:7: return x.cumsum(2)"
    assert line_of(None) == ""


def test_every_reason_of_a_rule_has_its_remedy() -> None:
    reasons = set()
    lowering = Path(capture.__path__[0]) / "lowering"
    translations = (*lowering.glob("fold*.py"), *lowering.glob("joined*.py"))
    for path in (*Path(ops.__path__[0]).glob("*.py"), *translations):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "NotStreamable":
                texts = [each for each in ast.walk(call.args[0]) if isinstance(each, ast.Constant)]
                reasons.add(next(str(each.value) for each in texts))
    assert len(reasons) > 20
    # Where nothing was tried, there is no reason.
    assert not {each for each in reasons - {""} if not any(map(each.startswith, REMEDIES))}
    assert remedy_for("its equation 'ij,jk' cannot be read").startswith("name every axis")
    assert "pooled features" in remedy_for("it is new")


FACTORY = """
from torch import nn

def net():
    class Rows(nn.Module):
        def forward(self, x):
            return x.renorm(2, 3, 9.0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Rows(), nn.AdaptiveAvgPool2d(1))

def steered():
    class Net(nn.Module):
        def forward(self, x):
            return x * 2 if x.mean() > 0 else x
    return Net()
"""


def test_a_factory_in_the_present_folder_is_found_and_explained(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    program = [
        sys.executable,
        "-c",
        "import sys; sys.path.remove(''); from streamcnn.cli import main; main()",
    ]

    def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*program, "verify", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = verify("mine:net", "--size=40x60", "--tile=20")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 images of 40x60 pixels: 2 operators are streamed, 1 cannot be" in done.stdout
    assert "it has no rule" in done.stdout
    assert "2 (Rows)" in done.stdout
    assert "gradients agree on 40x60 pixels" in done.stdout
    done = verify("mine:steered", "--size=40")
    assert done.returncode == 1
    assert "it reads a value of a tensor" in done.stderr
    assert "mine.py:13: return x * 2 if x.mean() > 0 else x" in done.stderr
    done = verify("yours:net")
    assert done.returncode == 2
    assert "no module 'yours'" in done.stderr
    assert "in the folder that holds it" in done.stderr


def test_gradients_are_compared_on_part_of_a_large_image(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large_net.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    status, out, _ = run("verify", "large_net:net", "--size=9000x60", "--batch=1", "--tile=64", "--json")
    found = json.loads(out)
    assert (status, found["agrees"]) == (0, True)
    assert found["streamability"]["shape"] == [1, 3, 9000, 60]
    (stopped,) = found["streamability"]["obstacles"]
    assert stopped["nbytes"] == 2 * 4 * 8998 * 58 * 4
    _, out, _ = run("verify", "large_net:net", "--size=9000x60", "--batch=1", "--tile=64")
    assert "an image of 9000x60 pixels" in out
    assert "gradients agree on 512x60 pixels" in out


def test_models_that_cannot_be_captured_are_refused() -> None:
    class Steered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.mean() > 0 else x

    with pytest.raises(UnsupportedModel, match="reads a value of a tensor"):
        streamability(Steered(), (1, 3, 20, 20))
