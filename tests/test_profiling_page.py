"""The profile's page: what it says, its charts, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from profiles import MIB, PROFILES, REFUSED, SHAPE, made

from streamcnn.profiling import render_page
from streamcnn.profiling.chart import Scale, draw_memory_chart, draw_time_chart
from streamcnn.profiling.scales import bytes_step, seconds_ticks, upper_edge, with_room


def test_the_page_says_what_it_is_and_asks_for_nothing() -> None:
    page = render_page(PROFILES, "resnet18", (1, 3, 4000, 3000))
    assert "<title>Memory profile: resnet18, 4000x3000x3 image, budget 100 MiB</title>" in page
    assert "Fastest within memory: tiles of 256 pixels, 2.00 s per update, 80.0 MiB at peak." in page
    assert len(re.findall(r"<tr[^>]* data-tile=", page)) == 3
    assert len(re.findall(r"<g [^>]*data-tile=", page)) == 2 * 3
    assert page.count('class="panel timeline"') == page.count('class="panel plan"') == 3
    assert page.count('<svg class="timeline"') == 2  # one tile size did not run
    assert page.count("plan &lt;of this tile&gt;") == 3
    assert page.count("</script>") == 2  # the refusal's text ends none
    assert not re.search(r"https?:|src=|url\(|@import|<link", page)


def test_the_page_says_so_when_nothing_fits() -> None:
    page = render_page(PROFILES[2:], "resnet18", SHAPE)
    assert "No tile size fits the budget. Plain PyTorch is projected to need 120 MiB." in page


def test_values_far_above_the_budget_are_clipped_and_written_out() -> None:
    near, far = draw_memory_chart(PROFILES), draw_memory_chart([made(256, plain_bytes=900 * MIB)])
    assert upper_edge(PROFILES) == int(1.12 * 120 * MIB)
    assert "plain PyTorch, projected 120 MiB</text>" in near
    assert "plain PyTorch, projected 900 MiB ↑ off the scale</text>" in far
    assert near.count("<path") == 1  # the refused tile's projection
    assert ">700 MiB</text>" in near


def test_the_axis_of_one_tile_size_has_it_in_the_middle() -> None:
    scale = Scale((256,), 100)
    assert scale.y(0) > scale.y(50) > scale.y(100) == scale.y(1000)
    assert Scale((128, 512), 100).x(256) == scale.x(256)


@pytest.mark.parametrize("top", [1, 2, 3, 100, 60 * MIB, 95 * MIB, 3 * 2**30, 5 * 2**40])
def test_the_axis_has_few_ticks(top: int) -> None:
    assert 1 <= top // bytes_step(top) <= 6


def test_a_limit_not_far_above_what_matters_has_room() -> None:
    assert with_room(100, [150, 260]) == 168
    assert with_room(100, [150, 260], reach=3.0) == 291


@pytest.mark.parametrize("top", [0.003, 0.9, 1.0, 4.4, 60.0, 86400.0])
def test_the_axis_of_seconds_has_few_round_ticks(top: float) -> None:
    ticks = seconds_ticks(top)
    step = ticks[1]
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= 7
    assert top - step < ticks[-1] <= top
    assert f"{step:.0e}"[0] in "125"


def test_the_time_chart_says_what_did_not_run() -> None:
    drawn = draw_time_chart(PROFILES)
    assert re.findall(r'class="value"[^>]*>([^<]*)<', drawn) == ["5.00 s", "2.00 s", "not run"]
    assert drawn.count("<circle") == 2
    assert draw_time_chart([made(64, **REFUSED)]).count("<circle") == 0


in_a_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")

VISIT = """
<script>
"use strict";
const log = {};
const $ = (selector) => document.querySelector(selector);
function send(target, name, place) { target.dispatchEvent(new MouseEvent(name, place)); }
function seen() {
  const panels = [...document.querySelectorAll("[data-of]")].filter((panel) => panel.offsetHeight > 0);
  return {
    title: $("#detail h2").textContent,
    values: [...document.querySelectorAll("#detail dd")].map((value) => value.textContent),
    panels: panels.map((panel) => panel.className + " " + panel.dataset.of),
    info: panels.map((panel) => panel.querySelector(".info")?.textContent ?? ""),
  };
}
function sizes() {
  const shown = [...document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect());
  return shown.filter((frame) => frame.width).map((frame) => [frame.width, frame.height]);
}
log.first = seen();
log.sizes = sizes();
log.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const point = $('.point[data-tile="128"]');
send(point, "mouseenter");
log.hovered = seen();
send(point, "mouseleave");
log.left = seen();
send($('tr[data-tile="512"]'), "mouseenter");
send($('tr[data-tile="512"]'), "click");
send($('tr[data-tile="512"]'), "mouseleave");
log.kept = seen();
send($('tr[data-tile="256"]'), "click");
const svg = $('[data-of="256"] svg.timeline'), frame = svg.getBoundingClientRect();
const scale = JSON.parse(svg.dataset.scale);
const across = (scale.left + 3.1 / scale.seconds * (scale.right - scale.left)) / 1200;
send(svg, "mousemove", { clientX: frame.left + across * frame.width, clientY: frame.top + 20 });
log.moment = seen();
log.cursor = getComputedStyle(svg.querySelector("circle.cursor")).visibility;
log.dot = Number(svg.querySelector("circle.cursor").getAttribute("cy"));
log.scale = scale;
send(svg, "mouseleave");
// Not by focus(): a page that is still being loaded may be without a focus.
const column = $('[data-of="256"] .column:nth-of-type(4)');
log.focusable = column.tabIndex;
column.dispatchEvent(new FocusEvent("focus"));
log.column = seen();
document.body.dataset.log = JSON.stringify(log);
</script>
"""


def browse(page: Path, *options: str, fragment: str = "") -> tuple[str, str]:
    """The document after its scripts have run, and what the browser's console said."""
    profile = page.parent / "browser"
    known = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command = [
        "chromium",
        *known,
        f"--user-data-dir={profile}",
        *options,
        "--dump-dom",
        page.as_uri() + fragment,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def visit(folder: Path, width: int) -> dict[str, Any]:
    """What a visitor sees who points at this and that, in a window so many pixels wide."""
    page = folder / "report.html"
    html = render_page(PROFILES, "resnet18", SHAPE).replace("</body>", f"{VISIT}</body>")
    page.write_text(html, encoding="utf-8")
    dom, console = browse(page, f"--window-size={width},900")
    assert console == ""
    log = re.search(r'data-log="([^"]*)"', dom)
    assert log is not None
    found: dict[str, Any] = json.loads(
        log[1].replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&")
    )
    return found


@in_a_browser
def test_a_fault_of_a_page_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("<script>nothing.of_that_name();</script>", encoding="utf-8")
    assert "nothing is not defined" in browse(page)[1]


@in_a_browser
@pytest.mark.parametrize("width", [1280, 800, 500])  # narrower windows it does not make
def test_the_page_fits_its_window_with_all_figures(width: int, tmp_path: Path) -> None:
    log = visit(tmp_path, width)
    assert log["overflow"] == 0
    memory, seconds, timeline, plan = log["sizes"]  # only those of the selected tile size
    assert memory[0] >= seconds[0] > 250
    assert memory[1] > 150
    # In a narrow window it is scrolled, or its text could not be read.
    assert (width - 60 < timeline[0] < width) if width > 640 else timeline[0] == 800
    assert timeline[1] > 150
    assert plan[0] > 4 * 72


@in_a_browser
def test_pointing_shows_and_clicking_keeps(tmp_path: Path) -> None:
    log = visit(tmp_path, 1280)
    assert log["first"]["title"] == log["left"]["title"] == "Tile 256 pixels"
    assert log["first"]["panels"] == ["panel timeline 256", "panel plan 256"]
    assert log["first"]["values"][:3] == ["90.0 MiB", "80.0 MiB", "2.00 s"]
    assert log["hovered"]["title"] == "Tile 128 pixels"
    assert log["hovered"]["panels"] == ["panel timeline 128", "panel plan 128"]
    assert log["hovered"]["values"][:3] == ["50.0 MiB", "40.0 MiB", "5.00 s"]
    assert log["left"] == log["first"]
    assert log["kept"]["title"] == "Tile 512 pixels"
    assert log["kept"]["panels"] == ["panel timeline 512", "panel plan 512"]


@in_a_browser
def test_moments_and_phases_say_what_they_are(tmp_path: Path) -> None:
    log = visit(tmp_path, 1280)
    assert log["first"]["info"][0].startswith("Point at a moment")
    assert log["moment"]["info"][0] == "3.250 s: 80.0 MiB in phase 2, backward"
    assert log["cursor"] == "visible"
    scale = log["scale"]
    height = 80 * MIB / scale["nbytes"] * (scale["bottom"] - scale["top"])
    assert log["dot"] == pytest.approx(scale["bottom"] - height)
    assert log["column"]["info"][0].startswith("Point at a moment")
    assert log["focusable"] == 0
    assert log["column"]["info"][1].startswith("Phase 1: conv2d; reads x; 8 tiles (4x2)")


@in_a_browser
@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("", ("256", "80.0 MiB", "80% of the budget at peak, read from VmHWM.")),
        ("#tile=128", ("128", "40.0 MiB", "40% of the budget")),
        ("#tile=512", ("512", "700 MiB", "no plan fits &lt;/script&gt;&lt;b&gt;")),
        ("#tile=999", ("256", "80.0 MiB", "80% of the budget")),
    ],
)
def test_the_address_selects_a_tile(fragment: str, expected: tuple[str, str, str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_page(PROFILES, "resnet18", SHAPE), encoding="utf-8")
    dom, console = browse(page, fragment=fragment)
    assert console == ""
    tile, nbytes, note = expected
    assert '<body data-points="6">' in dom
    detail = re.search(r'<aside id="detail".*?</aside>', dom, re.DOTALL)
    assert detail is not None
    assert f"Tile {tile} pixels" in detail[0]
    assert f"<dd>{nbytes}</dd>" in detail[0]
    assert note in detail[0]
    marked = [tag for tag in re.findall(r"<(?:g|tr) [^>]*data-tile[^>]*>", dom) if "active" in tag]
    assert len(marked) == 3
    assert all(f'data-tile="{tile}"' in tag for tag in marked)
