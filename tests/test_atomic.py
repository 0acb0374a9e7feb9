"""Files that are written as a whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from streamcnn.support.atomic import replace_file


@pytest.mark.parametrize("flush", [False, True])
def test_a_file_is_written_and_written_again(tmp_path: Path, flush: bool) -> None:
    path = tmp_path / "notes.txt"
    for content in ("Größe", b"\xff\x00", ""):
        replace_file(path, content, flush=flush)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_write_it_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"

    def write(letter: str) -> None:
        for _ in range(100):
            replace_file(path, 1000 * letter, concurrent=True)
            assert len(set(path.read_text())) == 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    replace_file(path, "before")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("streamcnn.support.atomic.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, "after", flush=True)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
