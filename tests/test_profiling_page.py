"""The profile's page: what it says, its charts, and how it behaves in a browser."""

from __future__ import annotations

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
