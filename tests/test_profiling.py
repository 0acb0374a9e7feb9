"""The profiler: what it measures, what it writes, and its page in a browser."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from streamcnn import StreamingModel, cli
from streamcnn.data.sources import write_zarr_image
from streamcnn.errors import BudgetExceeded
from streamcnn.models import load_model
from streamcnn.profiling import ProfileFailed, TileProfile, child, profile_tiles, render_page, write_results
from streamcnn.profiling.chart import Scale, draw_chart, round_step, upper_edge
from streamcnn.profiling.measure import fastest

MIB = 2**20
SHAPE = (1, 3, 160, 130)
FACTORY = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )

def wrong():
    raise RuntimeError("the factory's own fault")
"""


def made(tile: int, **fields: object) -> TileProfile:
    """A profile that ran, but for ``fields``."""
    ran = TileProfile(
        tile=tile,
        projected_bytes=90 * MIB,
        measured_bytes=80 * MIB,
        reading="VmHWM",
        seconds=2.0,
        recomputation=1.25,
        bytes_moved=300 * MIB,
        budget=100 * MIB,
        plain_bytes=120 * MIB,
        refusal=None,
        explanation="plan <of this tile>",
    )
    return dataclasses.replace(ran, **fields)


REFUSED = {
    "projected_bytes": 700 * MIB,
    "measured_bytes": None,
    "reading": "not run",
    "seconds": None,
    "bytes_moved": None,
    "refusal": "no plan fits </script><b>",
}
PROFILES = [
    made(128, projected_bytes=50 * MIB, measured_bytes=41 * MIB, seconds=5.0),
    made(256),
    made(512, **REFUSED),
]


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a small model's factory."""
    (tmp_path / "profiled_net.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "profiled_net:make"


def test_one_process_measures_and_one_is_refused(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = load_model(factory).train()
    needed = [StreamingModel(net, tile=tile).plan(SHAPE).projected_bytes for tile in (32, 160)]
    budget = sum(needed) // 2
    fits, does_not = (StreamingModel(net, budget, tile=tile).plan(SHAPE) for tile in (32, 160))
    assert (fits.fits, does_not.fits) == (True, False)
    options = ["--size", "160x130", "--tiles", "160,32", "--budget", str(budget), "--json"]
    monkeypatch.setattr(
        "sys.argv", ["streamcnn", "profile", factory, *options, "--output", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as caught:
        cli.main()
    lines = capsys.readouterr().out
    assert caught.value.code == 0
    small, large = map(TileProfile.from_json, lines.splitlines())
    assert (small.tile, large.tile) == (32, 160)
    assert small.refusal is None
    assert small.measured_bytes is not None
    assert 0 < small.measured_bytes <= small.projected_bytes == fits.projected_bytes
    assert small.seconds is not None
    assert small.seconds > 0
    assert small.recomputation == child.halo_overhead(fits) > 1
    assert small.explanation == fits.explain()
    assert large.refusal is not None
    assert "fits in" in large.refusal
    assert (large.measured_bytes, large.seconds, large.bytes_moved) == (None, None, None)
    assert large.projected_bytes == does_not.projected_bytes
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["memory.png", "profile.jsonl", "report.html", "time.png"]
    assert (tmp_path / "out" / "profile.jsonl").read_text() == lines


def test_a_model_that_fails_for_another_reason_ends_the_profile(factory: str) -> None:
    broken = factory.replace("make", "wrong")
    with pytest.raises(ProfileFailed, match=r"(?s)measuring tile 32 failed.*the factory's own fault"):
        list(profile_tiles(broken, SHAPE, [32], None))


def test_a_process_that_the_kernel_ends_is_named(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -9, "", "")

    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(ProfileFailed, match=r"tile 32 was ended by signal 9.*set --budget"):
        list(profile_tiles(factory, SHAPE, [32], None))


def test_an_allocation_that_is_refused_is_a_refusal(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BudgetExceeded("an allocation of 3 GiB was refused")

    write_zarr_image(tmp_path / "image-0.zarr", torch.zeros(3, 40, 40, dtype=torch.uint8))
    monkeypatch.setattr(StreamingModel, "forward", refuse)
    profile = child.measure(factory, tmp_path, 32, None)
    assert profile.refusal == "an allocation of 3 GiB was refused"
    assert (profile.measured_bytes, profile.reading) == (None, "not run")


def test_halos_are_counted_position_by_position(factory: str) -> None:
    plan = StreamingModel(load_model(factory).train(), tile=40).plan(SHAPE)
    computed = whole = 0
    for phase in plan.phases:
        for name in phase.nodes:
            positions: list[tuple[int, int]] = []
            for row in range(len(phase.rows)):
                for col in range(len(phase.cols)):
                    rows, cols = phase.needed(row, col, name)
                    positions += [
                        (y, x) for y in range(rows.start, rows.stop) for x in range(cols.start, cols.stop)
                    ]
            computed, whole = computed + len(positions), whole + len(set(positions))
    assert child.halo_overhead(plan) == computed / whole > 1


@pytest.mark.parametrize("tiles", [[], [0], [64, -1]])
def test_tile_sizes_are_positive(tiles: list[int]) -> None:
    with pytest.raises(ValueError, match=r"tiles=\[.*allowed are one or more positive numbers"):
        profile_tiles("resnet18", SHAPE, tiles, None)


@pytest.mark.parametrize("text", ["", "256,", "0", "a", "256;512", "-1"])
def test_the_command_refuses_other_tile_sizes(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["streamcnn", "profile", "resnet18", f"--tiles={text}"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "--tiles: cannot read" in capsys.readouterr().err


def test_plain_lines_without_a_terminal(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streamcnn.profiling.profile_tiles", lambda *_: iter(PROFILES))
    monkeypatch.setattr("sys.argv", ["streamcnn", "profile", factory, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        cli.main()
    out = capsys.readouterr().out.splitlines()
    assert out[1] == (
        "tile 256: fits, measured 80.0 MiB, projected 90.0 MiB, 2.00 s, recomputation 1.25x, moved 300 MiB"
    )
    assert out[2].startswith("tile 512: does not fit, measured -, projected 700 MiB, not run")
    assert out[3] == f"page: {tmp_path / 'out' / 'report.html'}"


def test_a_profile_survives_json() -> None:
    assert [TileProfile.from_json(profile.to_json()) for profile in PROFILES] == PROFILES


def test_the_fastest_is_one_that_ran() -> None:
    assert fastest(PROFILES) == PROFILES[1]
    assert fastest(PROFILES[2:]) is None


def test_the_page_says_what_it_is_and_asks_for_nothing() -> None:
    page = render_page(PROFILES, "resnet18", (1, 3, 4000, 3000))
    assert "<title>Memory profile: resnet18, 4000x3000x3 image, budget 100 MiB</title>" in page
    assert "Fastest within memory: tiles of 256 pixels, 2.00 s per update, 80.0 MiB at peak." in page
    assert len(re.findall(r"<tr[^>]* data-tile=", page)) == len(re.findall(r"<g [^>]*data-tile=", page)) == 3
    assert page.count("plan &lt;of this tile&gt;") == 3
    assert page.count("</script>") == 2  # the refusal's text ends none
    assert not re.search(r"https?:|src=|url\(|@import|<link", page)


def test_the_page_says_so_when_nothing_fits() -> None:
    page = render_page(PROFILES[2:], "resnet18", SHAPE)
    assert "No tile size fits the budget. Plain PyTorch is projected to need 120 MiB." in page


def test_no_profiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one or more tile sizes"):
        write_results([], "resnet18", SHAPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_written_leave_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr("streamcnn.profiling.results.write_figures", fail)
    with pytest.raises(OSError, match="no space left"):
        write_results(PROFILES, "resnet18", SHAPE, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_values_far_above_the_budget_are_clipped_and_written_out() -> None:
    near, far = draw_chart(PROFILES), draw_chart([made(256, plain_bytes=900 * MIB)])
    assert upper_edge(PROFILES) == int(1.12 * 120 * MIB)
    assert "plain PyTorch 120 MiB</text>" in near
    assert "plain PyTorch ↑ 900 MiB, off the scale</text>" in far
    assert near.count("<path") == 1  # the refused tile's projection
    assert ">700 MiB</text>" in near


def test_the_axis_of_one_tile_size_has_it_in_the_middle() -> None:
    scale = Scale((256,), 100)
    assert scale.y(0) > scale.y(50) > scale.y(100) == scale.y(1000)
    assert Scale((128, 512), 100).x(256) == scale.x(256)


@pytest.mark.parametrize("top", [1, 2, 3, 100, 60 * MIB, 95 * MIB, 3 * 2**30, 5 * 2**40])
def test_the_axis_has_few_ticks(top: int) -> None:
    assert 1 <= top // round_step(top) <= 6


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("", ("256", "80.0 MiB", "80% of the budget at peak, read from VmHWM.")),
        ("#tile=128", ("128", "41.0 MiB", "41% of the budget")),
        ("#tile=512", ("512", "700 MiB", "no plan fits &lt;/script&gt;&lt;b&gt;")),
        ("#tile=999", ("256", "80.0 MiB", "80% of the budget")),
    ],
)
def test_a_browser_shows_the_selected_tile(
    fragment: str, expected: tuple[str, str, str], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_page(PROFILES, "resnet18", SHAPE), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command = ["chromium", *options, "--dump-dom", f"{page.as_uri()}{fragment}"]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    tile, nbytes, note = expected
    assert '<body data-points="3">' in dom
    detail = re.search(r'<aside id="detail".*?</aside>', dom, re.DOTALL)
    assert detail is not None
    assert f"Tile {tile} pixels" in detail[0]
    assert f"<dd>{nbytes}</dd>" in detail[0]
    assert note in detail[0]
    marked = [tag for tag in re.findall(r"<(?:g|tr) [^>]*data-tile[^>]*>", dom) if "active" in tag]
    assert len(marked) == 2
    assert all(f'data-tile="{tile}"' in tag for tag in marked)
