"""What other limits leave: control groups from made-up files, a process's own limits in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tile_operators import RefusedOnce, around_operators
from torch import nn

from streamcnn import BudgetExceeded, PlanDoesNotFit, StreamingModel
from streamcnn.ceiling import rooms
from streamcnn.ceiling.rooms import Room, buffered_file_bytes, host_memory_bytes, host_room
from streamcnn.runtime import smaller_plans

MIB = 2**20
SHAPE = (1, 3, 700, 600)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1)
    )


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def second_version(root: Path, limit: str, used: int, path: str = "/pod/box") -> Path:
    """A tree of control groups of the second version; the file that says where the process is."""
    write(root, cgroup__controllers="memory")
    write(root / path.lstrip("/"), memory__max=limit + "\n", memory__current=f"{used}\n")
    (root / "membership").write_text(f"0::{path}\n")
    return root / "membership"


@contextmanager
def groups_in(root: Path, membership: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "CGROUPS", root)
        patch.setattr(rooms, "MEMBERSHIP", membership)
        yield


def room_of(root: Path, membership: Path) -> Room | None:
    with groups_in(root, membership):
        return host_room()


def test_host_memory_is_the_ram_or_less_where_a_group_is_limited(tmp_path: Path) -> None:
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, expected in (("max", ram), (str(1000 * MIB), 1000 * MIB), (str(2**61), ram)):
        membership = second_version(tmp_path, limit, 700 * MIB)
        with groups_in(tmp_path, membership):
            assert host_memory_bytes() == expected


@pytest.mark.parametrize(
    ("fixed", "percent", "expected"),
    [("0", "10", 75 * MIB), (str(30 * MIB), "0", 30 * MIB), (str(4000 * MIB), "0", 750 * MIB), ("0", "0", 0)],
)
def test_as_many_bytes_of_files_are_buffered_as_the_kernel_holds_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fixed: str, percent: str, expected: int
) -> None:
    settings = tmp_path / "vm"
    monkeypatch.setattr(rooms, "VIRTUAL_MEMORY", settings)
    with groups_in(tmp_path, second_version(tmp_path, str(1000 * MIB), 700 * MIB)):
        assert buffered_file_bytes() == 0
        write(settings, dirty_background_bytes=fixed + "\n", dirty_background_ratio=percent + "\n")
        assert buffered_file_bytes() == expected


def test_a_group_of_the_second_version_leaves_its_limit_less_what_it_must_keep(
    tmp_path: Path,
) -> None:
    membership = second_version(tmp_path, str(1000 * MIB), 700 * MIB)
    stat = f"anon {500 * MIB}\ninactive_file {64 * MIB}\nactive_file {36 * MIB}\nshmem 5\n"
    write(tmp_path / "pod" / "box", memory__stat=stat)
    found = room_of(tmp_path, membership)
    assert found is not None
    assert (found.limit, found.used) == (1000 * MIB, 600 * MIB)
    # A sixty-fourth is left for the kernel.
    assert found.nbytes == 400 * MIB - 400 * MIB // 64
    assert str(found) == (
        f"the memory limit of the control group ({tmp_path}/pod/box/memory.max) is 1000 MiB, of which "
        "600 MiB are in use, so that 394 MiB can be had: raise it (docker run --memory, "
        "resources.limits.memory of Kubernetes, MemoryMax= of systemd, --mem of Slurm) "
        "or end other processes in the group"
    )


def test_the_least_of_all_groups_around_counts(tmp_path: Path) -> None:
    membership = second_version(tmp_path, "max", 10 * MIB)
    assert room_of(tmp_path, membership) is None
    write(tmp_path / "pod", memory__max=str(640 * MIB), memory__current=str(320 * MIB))
    found = room_of(tmp_path, membership)
    assert found is not None
    assert found.nbytes == 315 * MIB


@pytest.mark.parametrize("path", ["/docker/abc", "/"])
def test_a_group_of_the_first_version(tmp_path: Path, path: str) -> None:
    # In a container the host's path is not there, and the root is the container's own group.
    write(tmp_path / "memory", memory__limit_in_bytes=str(640 * MIB), memory__usage_in_bytes=str(420 * MIB))
    write(tmp_path / "memory", memory__stat=f"total_inactive_file {90 * MIB}\ntotal_active_file {10 * MIB}\n")
    (tmp_path / "membership").write_text(f"5:cpu:{path}\n4:memory,hugetlb:{path}\n0::{path}\n")
    found = room_of(tmp_path, tmp_path / "membership")
    assert found is not None
    assert found.nbytes == 315 * MIB
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712")
    assert room_of(tmp_path, tmp_path / "membership") is None


def test_no_groups_are_no_limit(tmp_path: Path) -> None:
    assert room_of(tmp_path, tmp_path / "missing") is None


def limited(monkeypatch: pytest.MonkeyPatch, root: Path, room: int) -> None:
    monkeypatch.setattr(rooms, "CGROUPS", root)
    monkeypatch.setattr(rooms, "MEMBERSHIP", second_version(root, str(room), 0))


def test_what_a_group_leaves_is_planned_for_where_it_is_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = StreamingModel(make_net(), "2GiB")
    wanted = model.plan(SHAPE)
    limited(monkeypatch, tmp_path, wanted.projected_bytes * 2 // 3)
    found = model.plan(SHAPE)
    assert found.projected_bytes <= wanted.projected_bytes * 2 // 3
    assert "memory.max" in found.limited_by
    assert "instead of a larger budget, since the memory limit of the control group" in found.explain()
    model(torch.randn(SHAPE)).sum().backward()
    assert model.last_report is not None
    assert model.last_report.budget == found.budget
    limited(monkeypatch, tmp_path, 2 * wanted.projected_bytes)
    assert model.plan(SHAPE) == wanted
    # Without a budget too.
    model.budget = None
    limited(monkeypatch, tmp_path, wanted.projected_bytes * 2 // 3)
    assert model.plan(SHAPE).projected_bytes <= wanted.projected_bytes * 2 // 3


@pytest.mark.parametrize("budget", ["2GiB", None])
def test_a_group_that_leaves_too_little_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, budget: str | None
) -> None:
    limited(monkeypatch, tmp_path, 8 * MIB)
    message = (
        r"fits in 7\.88 MiB: .* A larger budget= does not help: the memory limit of the control group "
        r"\(.*/pod/box/memory\.max\) is 8\.00 MiB, of which 0 bytes are in use, .* raise it \(docker run"
    )
    with pytest.raises(PlanDoesNotFit, match=message):
        StreamingModel(make_net(), budget)(torch.randn(SHAPE))


def test_a_refused_pass_names_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = StreamingModel(make_net(), "2GiB", tile=64)
    monkeypatch.setattr(smaller_plans, "SMALLEST_TILE", 64)
    limited(monkeypatch, tmp_path, 1500 * MIB)

    around_operators(monkeypatch, RefusedOnce(1, always=True))
    with pytest.raises(BudgetExceeded, match="a larger budget= does not help, since the memory limit of"):
        model(torch.randn(SHAPE))


OWN = """
import resource, sys, torch
from torch import nn
from streamcnn import PlanDoesNotFit, StreamingModel
from streamcnn.ceiling.process import status_bytes
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1))
image = torch.randn(1, 3, 700, 600)
model = StreamingModel(net, "2GiB")
with torch.no_grad():
    model(image[..., :40, :40])
used = status_bytes({counter!r})
resource.setrlimit(resource.{limit}, (used + {room}, -1))
try:
    model(image).sum().backward()
    print(model.last_report.projected_bytes, model.last_report.budget)
except PlanDoesNotFit as error:
    print(error)
"""


@pytest.mark.parametrize(("limit", "counter"), [("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize")])
def test_a_limit_of_the_processs_own_is_planned_for_or_named(limit: str, counter: str) -> None:
    def output(room: int) -> str:
        script = OWN.format(limit=limit, counter=counter, room=room)
        run = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    projected, budget = map(int, output(150 * MIB).split())
    assert projected <= budget <= 150 * MIB
    refused = output(20 * MIB)
    assert "A larger budget= does not help: the process's own limit on its" in refused
    assert f"{limit} (ulimit -{'d' if limit == 'RLIMIT_DATA' else 'v'}), is " in refused
    assert "raise it (ulimit" in refused
