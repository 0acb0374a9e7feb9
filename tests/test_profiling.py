"""The profiler: what it measures and what it writes."""

from __future__ import annotations

import dataclasses
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from profiles import FACTORY, PROFILES, SHAPE

from streamcnn import StreamingModel, cli
from streamcnn.data.sources import ZarrSource, write_zarr_image
from streamcnn.errors import BudgetExceeded
from streamcnn.profiling import ProfileFailed, TileProfile, child, profile_tiles, write_results
from streamcnn.profiling.figures import FIGURES, memory_figure, plan_figure, time_figure
from streamcnn.profiling.sketch import sketch_plan
from streamcnn.profiling.tile_profile import fastest
from streamcnn.support.models import load_model

COUNTERS = 2**20
"""Bytes by which two readings may differ: the kernel counts pages per core and adds them up later."""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a small model's factory."""
    (tmp_path / "profiled_net.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "profiled_net:make"


def assert_timeline_of(profile: TileProfile, levels: list[int]) -> None:
    """The phases in order, every sample within its span, and the peak that was measured."""
    timeline, measured = profile.timeline, profile.measured_bytes
    assert timeline is not None
    assert measured is not None
    phases = [(span.direction, span.level) for span in timeline.spans if span.part == "phase"]
    assert phases == [*(("forward", n) for n in levels), *(("backward", n) for n in reversed(levels))]
    assert all(one.start <= one.stop <= other.start for one, other in pairwise(timeline.spans))
    for index, seconds in zip(timeline.running, timeline.seconds, strict=True):
        assert timeline.spans[index].start <= seconds <= timeline.spans[index].stop
    assert set(timeline.running) == set(range(len(timeline.spans)))
    assert measured - COUNTERS <= timeline.nbytes[timeline.peak] <= measured + COUNTERS


def streamed(net: torch.nn.Module, budget: int, tile: int) -> StreamingModel:
    return StreamingModel(net, budget, tile=tile, preprocess=lambda pixels: pixels / 255 - 0.5)


def test_a_fresh_process_makes_the_model_with_its_arguments() -> None:
    options = {"in_channels": 2, "out_channels": 1, "kernel_size": 3, "padding_mode": "reflect"}
    (profile,) = profile_tiles("torch.nn:Conv2d", (1, 2, 40, 40), [20], None, repeats=0, options=options)
    assert profile.refusal is None


def test_one_process_measures_and_one_is_refused(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Plans depend on the number of threads, which is one in this process.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    net = load_model(factory).train()
    # As the profile's: plans count what reading the images takes.
    write_zarr_image(tmp_path / "image.zarr", torch.zeros(SHAPE[1:], dtype=torch.uint8))
    image = ZarrSource(tmp_path / "image.zarr")
    needed = [streamed(net, 1, tile).plan(image).projected_bytes for tile in (32, 160)]
    budget = sum(needed) // 2
    fits, does_not = (streamed(net, budget, tile).plan(image) for tile in (32, 160))
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
    assert small.recomputation == fits.recomputation > 1
    assert small.explanation == fits.explain()
    assert small.plan == sketch_plan(fits)
    assert_timeline_of(small, [phase.level for phase in fits.phases])
    assert large.refusal is not None
    assert "fits in" in large.refusal
    assert (large.measured_bytes, large.seconds, large.bytes_moved) == (None, None, None)
    assert (large.plan, large.timeline) == (sketch_plan(does_not), None)
    assert large.projected_bytes == does_not.projected_bytes
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted(["profile.jsonl", "report.html", *FIGURES])
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
    profile = child.measure(factory, tmp_path, 32, None, repeats=0)
    assert profile.refusal == "an allocation of 3 GiB was refused"
    assert (profile.measured_bytes, profile.reading) == (None, "not run")


@pytest.mark.parametrize("smaller", [0, 1])
def test_only_a_smaller_plan_counts_as_a_refusal(
    smaller: int, factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = StreamingModel.forward

    def begun_again(model: StreamingModel, *args: object) -> object:
        found = forward(model, *args)  # type: ignore[arg-type]
        assert model.last_report is not None
        model.last_report = dataclasses.replace(model.last_report, num_retries=1, num_smaller_plans=smaller)
        return found

    monkeypatch.setattr(child, "_mean_square", lambda output: 0 * output.sum())
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: None)
    monkeypatch.setattr(StreamingModel, "forward", begun_again)
    write_zarr_image(tmp_path / "image-0.zarr", torch.zeros(3, 40, 40, dtype=torch.uint8))
    refusal = child.measure(factory, tmp_path, 32, None, repeats=0).refusal
    assert (refusal is not None) == bool(smaller)


@pytest.mark.parametrize(("repeats", "updates"), [(0, 1), (2, 3)])
def test_the_time_is_the_median_of_the_updates_after_the_first(
    repeats: int, updates: int, factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter([(9.0, 50, 1), (2.0, 80, 2), (4.0, 70, 3)][:updates])
    run = child.make_update

    def update(streamed: StreamingModel, sources: list[ZarrSource]) -> str | None:
        # Each begins as the first did: gradients that are there already would not be new memory.
        assert all(parameter.grad is None for parameter in streamed.parameters())
        refusal = run(streamed, sources)
        seconds, nbytes, baseline = next(taken)
        report = streamed.last_report
        assert report is not None
        streamed.last_report = dataclasses.replace(
            report, seconds=seconds, measured_bytes=nbytes, baseline_bytes=baseline
        )
        assert all(parameter.grad is not None for parameter in streamed.parameters())
        return refusal

    write_zarr_image(tmp_path / "image-0.zarr", torch.zeros(3, 40, 40, dtype=torch.uint8))
    monkeypatch.setattr(child, "make_update", update)
    profile = child.measure(factory, tmp_path, 32, None, repeats)
    assert list(taken) == []
    assert (profile.seconds, profile.measured_bytes) == ((9.0, 50) if repeats == 0 else (3.0, 80))


def test_a_negative_number_of_updates_is_refused(factory: str) -> None:
    with pytest.raises(ValueError, match="repeats=-1: allowed are 0 and positive numbers"):
        profile_tiles(factory, SHAPE, [32], None, repeats=-1)


def test_figures_of_every_kind_are_written_when_nothing_ran(tmp_path: Path) -> None:
    write_results(PROFILES[2:], "resnet18", SHAPE, tmp_path)
    for name in FIGURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_written_above_a_plan_of_few_phases_fits_into_its_figure() -> None:
    figure = plan_figure(PROFILES, f"resnet18, {'4000x4000x3 image, ' * 6}budget 60.0 MiB")
    title = figure.axes[0].texts[0].get_window_extent()
    assert title.x0 >= 0
    assert title.x1 <= figure.bbox.x1


def test_the_figure_names_bytes_that_are_off_its_scale() -> None:
    far = [dataclasses.replace(PROFILES[2], budget=2**20, projected_bytes=29 * 2**20)]
    axes = memory_figure(far, "resnet18").axes[0]
    assert [text.get_text() for text in axes.texts] == ["29.0 MiB"]
    near = [dataclasses.replace(PROFILES[2], budget=2**20, projected_bytes=2**20 + 1)]
    assert not memory_figure(near, "resnet18").axes[0].texts


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


def test_the_command_fails_where_no_tile_size_ran(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = [profile for profile in PROFILES if profile.refusal is not None]
    monkeypatch.setattr("streamcnn.profiling.profile_tiles", lambda *_, **__: iter(refused))
    monkeypatch.setattr(
        "sys.argv", ["streamcnn", "profile", factory, "--tiles", "512", "--output", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert (tmp_path / "out" / "report.html").exists()
    assert (
        "no tile size ran within 100 MiB; tiles of 512 pixels take least, 700 MiB" in capsys.readouterr().err
    )


def test_plain_lines_without_a_terminal(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streamcnn.profiling.profile_tiles", lambda *_, **__: iter(PROFILES))
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


def test_points_of_time_are_below_the_frame() -> None:
    # Of times that are alike the margin of matplotlib is nothing.
    alike = [dataclasses.replace(profile, seconds=1 + 1e-3 * i) for i, profile in enumerate(PROFILES)]
    axes = time_figure(alike, "resnet18").axes[0]
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert 1.05 * max(profile.seconds or 0 for profile in alike) < top < 1.2
