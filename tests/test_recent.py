"""What is kept of values that are dear to make."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from streamcnn.support.recent import Recent


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns after a few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def made(recent: Recent[str, str], keys: str) -> str:
    """The keys whose values had to be made."""
    found = ""
    for key in keys:

        def make(key: str = key) -> str:
            nonlocal found
            found += key
            return key.upper()

        assert recent.get(key, make) == key.upper()
    return found


def test_the_least_recently_used_value_goes() -> None:
    recent = Recent[str, str](3)
    assert made(recent, "abcab") == "abc"
    assert made(recent, "d") == "d"
    assert made(recent, "abd") == ""
    assert made(recent, "c") == "c"


def test_sizes_are_added_up_but_some_values_are_always_kept() -> None:
    recent = Recent[int, int](10, size=abs, least=2)
    for value in (3, 4, 3, 9, 30):
        recent.get(value, lambda value=value: value)  # type: ignore[misc]
        assert len(recent) == {3: len(recent), 4: 2, 9: 2, 30: 2}[value]
    # 9 and 30 are more than 10, and two.
    assert recent.get(9, lambda: 0) == 9
    assert recent.get(30, lambda: 0) == 30


def test_a_value_that_cannot_be_made_leaves_nothing() -> None:
    recent = Recent[str, int](2)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert len(recent) == 0


def test_copies_begin_with_nothing() -> None:
    recent = Recent[str, str](7, size=len, least=2)
    recent.get("a", lambda: "value")
    for copied in (copy.deepcopy(recent), pickle.loads(pickle.dumps(recent))):
        assert len(copied) == 0
        assert (copied._most, copied._size, copied._least) == (7, len, 2)


@pytest.mark.usefixtures("hasty_threads")
def test_many_threads_may_ask() -> None:
    recent = Recent[int, list[int]](2)

    def ask(start: int) -> None:
        for turn in range(2000):
            key = (start + turn) % 5
            assert recent.get(key, lambda key=key: [key]) == [key]  # type: ignore[misc]
            assert len(recent) <= 3

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert len(recent) == 2


def test_all_threads_get_the_first_value() -> None:
    recent = Recent[str, object](1)
    inner: list[object] = []

    def slow() -> object:
        # Meanwhile somebody else makes it.
        inner.append(recent.get("a", object))
        return object()

    assert recent.get("a", slow) is inner[0]
