"""Errors stay readable whatever they name."""

from __future__ import annotations

import pickle

import pytest

from streamcnn import errors
from streamcnn.errors import StreamError

ALL = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, StreamError)]


@pytest.mark.parametrize("kind", ALL)
def test_what_is_named_is_shown_without_its_middle_where_it_is_long(kind: type[StreamError]) -> None:
    text = str(kind(f"no model '{'a' * 5000}z': give another one"))
    assert text.startswith("no model 'aaa")
    assert text.endswith("aaz': give another one")
    assert len(text) < 1100
    assert str(kind("ab " * 5000)).count("ab") < 1400
    assert len(str(kind("x y " * 5000))) == 4000


@pytest.mark.parametrize("kind", ALL)
def test_short_texts_are_shown_whole_in_any_process(kind: type[StreamError]) -> None:
    text = f"{'/folder' * 60}: give another one"
    error = kind(text)
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == text
    assert isinstance(error, kind)
