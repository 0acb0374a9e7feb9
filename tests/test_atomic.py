"""Files that are written as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamcnn.atomic import replace_file


@pytest.mark.parametrize("flush", [False, True])
def test_a_file_is_written_and_written_again(tmp_path: Path, flush: bool) -> None:
    path = tmp_path / "notes.txt"
    for content in ("Größe", b"\xff\x00", ""):
        replace_file(path, content, flush=flush)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    replace_file(path, "before")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("streamcnn.atomic.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, "after", flush=True)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
