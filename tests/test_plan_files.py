"""Plans that another process has made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.graph import registry
from streamcnn.graph.ops import Call, NotStreamable, Tracer, rule
from streamcnn.plan.plan import Plan
from streamcnn.runtime import plan_cache, plan_files

SHAPE = (2, 3, 96, 80)


class Made(Exception):
    """A plan was made."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where plans are kept, however quickly they were made."""
    monkeypatch.setenv(plan_files.VARIABLE, str(tmp_path / "plans"))
    monkeypatch.setattr(plan_cache, "_WORTH_KEEPING", -1.0)
    # Other tests' rules are none of the package's own.
    monkeypatch.setattr(registry, "_from_outside", 0)
    return tmp_path / "plans"


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.InstanceNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def plan_of(shape: tuple[int, int, int, int] = SHAPE, net: nn.Module | None = None, **options: Any) -> Plan:
    """A plan of a model that was never planned before, as in another process."""
    return StreamingModel(make_net() if net is None else net, **{"budget": "40MiB", **options}).plan(shape)


def forbid(patch: pytest.MonkeyPatch) -> None:
    """From now on, making a plan is an error."""

    def refuse(*args: Any) -> Any:
        raise Made

    patch.setattr(plan_cache, "make_plan", refuse)


@pytest.mark.parametrize("options", [{}, {"tile": (32, 24)}, {"budget": None}, {"budget": "1GiB"}])
@pytest.mark.parametrize("train", [True, False])
def test_what_is_found_is_what_was_made(
    options: dict[str, Any], train: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_of(net=make_net().train(train), **options)
    assert len(list(folder.iterdir())) == 1
    forbid(monkeypatch)
    found = plan_of(net=make_net().train(train), **options)
    assert found == made
    assert found.digest == made.digest
    assert found.explain() == made.explain()


def test_a_pass_is_carried_out_by_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(SHAPE)
    nets = [make_net().eval(), make_net().eval()]
    results = []
    for net in nets:
        results.append(StreamingModel(net, budget="40MiB")(image))
        results[-1].sum().backward()
        forbid(monkeypatch)
    assert torch.equal(*results)
    for first, second in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(first.grad, second.grad)


@pytest.mark.parametrize(
    "options",
    [{"budget": "41MiB"}, {"tile": (32, 32)}, {"shape": (2, 3, 96, 81)}, {"net": make_net().double()}],
    ids=["budget", "tile", "shape", "type"],
)
def test_another_pass_is_another_plan(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of()
    forbid(monkeypatch)
    plan_of()
    with pytest.raises(Made):
        plan_of(**options)


def test_other_code_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of()
    forbid(monkeypatch)
    monkeypatch.setattr(plan_files, "_code", lambda: "of another version")
    with pytest.raises(Made):
        plan_of()


def test_with_rules_of_the_users_nothing_is_kept_or_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_of()

    def target() -> None:
        """Stands for an operator of the user's."""

    @rule(target)
    def refuse(tracer: Tracer, call: Call) -> NotStreamable:
        return NotStreamable("")

    assert not registry.all_are_built_in()
    plan_of((2, 3, 64, 64))
    assert len(list(folder.iterdir())) == 1
    forbid(monkeypatch)
    with pytest.raises(Made):
        plan_of()


class EveryOther(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.streamcnn_test.every_other(x)
        return y.relu()


def test_what_was_made_for_another_program_is_made_anew() -> None:
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), EveryOther(), nn.Conv2d(4, 4, 3)) for _ in range(2)]
    image = torch.rand(2, 3, 96, 80)
    for step, net in zip((4, 2), nets, strict=True):
        # An operator of the user's, of which another version of their code makes something else.
        with torch.library._scoped_library("streamcnn_test", "DEF") as library:
            library.define("every_other(Tensor x) -> Tensor")
            library.impl(
                "every_other",
                lambda x, step=step: x[..., ::step, ::step].clone(),
                "CompositeExplicitAutograd",
            )
            model = StreamingModel(net, tile=(32, 32))
            model.resident_tail = False
            with torch.no_grad():
                torch.testing.assert_close(model(image), net(image))


def test_what_is_for_another_net_is_made_anew(folder: Path) -> None:
    made = plan_of()
    (path,) = folder.iterdir()
    net = make_net()[:4]
    other = plan_of(net=net)
    (other_path,) = set(folder.iterdir()) - {path}
    path.write_bytes(other_path.read_bytes())
    assert plan_of() == made
    other_path.write_bytes(path.read_bytes())
    assert plan_of(net=net) == other


@pytest.mark.parametrize("content", [b"", b"half a file", "cut off", "a folder"])
def test_what_is_no_plan_is_made_anew(
    content: bytes | str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_of()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.unlink()
        path.mkdir()
        with pytest.warns(UserWarning, match="cannot keep plans in"):
            plan_of()
        return
    plan_of()
    assert path.read_bytes() == whole


def test_where_plans_cannot_be_kept_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(plan_files.VARIABLE, str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="name another folder in the environment variable STREAMCNN_PLANS"):
        plan_of()


def test_none_are_kept_where_it_is_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan_files.VARIABLE, "off")
    plan_of()
    assert not folder.exists()


def test_a_plan_that_takes_no_time_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cache, "_WORTH_KEEPING", 60.0)
    plan_of()
    assert not folder.exists()


def test_the_most_recently_used_files_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_files, "_MOST_FILES", 2)
    shapes = [(1, 3, 64, 64), (1, 3, 64, 72), (1, 3, 64, 80)]
    folder.mkdir()
    (folder / "holiday.plan").touch()
    plan_of(shapes[0])
    plan_of(shapes[1])
    plan_of(shapes[0])
    plan_of(shapes[2])
    assert len(list(folder.iterdir())) == 2 + 1
    forbid(monkeypatch)
    plan_of(shapes[0])
    plan_of(shapes[2])
    with pytest.raises(Made):
        plan_of(shapes[1])


def test_parts_that_killed_writers_left_are_removed(folder: Path) -> None:
    folder.mkdir()
    left, present = (folder / f".{digit * 64}.plan.0a1b2c3d.partial" for digit in "ab")
    for path in (left, present):
        path.touch()
    os.utime(left, (0, 0))
    plan_of()
    assert not left.exists()
    assert present.exists()


def test_words_are_the_same_whatever_the_order_of_a_set() -> None:
    names = [f"n{index}" for index in range(50)]
    assert plan_files._text(frozenset(names)) == plan_files._text(frozenset(reversed(names)))
    assert plan_files._text({"a": 1}) != plan_files._text({"a": 2})
    assert plan_files._text(("a", "b")) != plan_files._text(("a,b",))
