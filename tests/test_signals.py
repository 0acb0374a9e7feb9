"""Signals that come while zarr or pydantic works, or an import does, are raised when it is done."""

from __future__ import annotations

import asyncio
import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import AfterValidator, TypeAdapter
from zarr.core.sync import sync

from streamcnn.support.signals import SIGNALS, Stopped, StoppedAtOnce, heeding, raising


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """SIGINT raises, although whoever runs the tests may ignore it; each test leaves it so."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for number, handler in before.items():
        signal.signal(number, handler)


async def interrupted_work(done: list[str]) -> str:
    """What zarr's thread does, which a signal to the main thread comes into."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    await asyncio.sleep(0.05)
    done.append("work")
    return "result"


def as_statement(done: list[str]) -> None:
    sync(interrupted_work(done))
    done.append("caller")


def as_result(done: list[str]) -> str:
    return sync(interrupted_work(done))


def with_error(done: list[str]) -> None:
    async def failing() -> None:
        await interrupted_work(done)
        raise LookupError("zarr's own")

    try:
        sync(failing())
    except LookupError:
        done.append("caller")


def in_pydantic(done: list[str]) -> None:
    def validate(value: str) -> str:
        signal.raise_signal(signal.SIGINT)
        done.append(value)
        return value

    TypeAdapter(Annotated[str, AfterValidator(validate)]).validate_python("work")
    done.append("caller")


CALLS = [as_statement, as_result, with_error, in_pydantic]


@pytest.mark.parametrize("call", CALLS)
def test_a_first_signal_waits_for_libraries(call: Callable[[list[str]], object]) -> None:
    done: list[str] = []
    found: list[int] = []
    with pytest.raises(Stopped) as stopped, raising(found):
        call(done)
    assert (done, found, stopped.value.signal) == (["work"], [signal.SIGINT], signal.SIGINT)


@pytest.mark.parametrize("call", CALLS)
def test_a_second_signal_waits_for_libraries(call: Callable[[list[str]], object]) -> None:
    done: list[str] = []
    heard: list[signal.Signals] = []

    def run() -> None:
        with heeding(heard.append):
            signal.raise_signal(signal.SIGINT)
            call(done)

    with pytest.raises(StoppedAtOnce):
        run()
    assert (heard, done) == ([signal.SIGINT], ["work"])


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module that can be imported; its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def written(text: str) -> str:
        name = "interrupted_script"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return written


def test_a_signal_waits_for_imports(script: Callable[[str], str]) -> None:
    name = script("import signal\nsignal.raise_signal(signal.SIGINT)\nis_whole = True\n")
    with pytest.raises(Stopped), raising([]):
        importlib.import_module(name)
    assert sys.modules[name].is_whole


def test_a_signal_waits_for_no_import_that_runs_the_block(script: Callable[[str], str]) -> None:
    name = script(
        "import signal\nfrom streamcnn.support.signals import raising\n"
        "with raising([]):\n    signal.raise_signal(signal.SIGINT)\n    raise AssertionError\n"
    )
    with pytest.raises(Stopped):
        importlib.import_module(name)


def test_a_signal_elsewhere_is_raised_where_it_comes() -> None:
    done: list[str] = []

    def run() -> None:
        with raising([]):
            signal.raise_signal(signal.SIGINT)
            done.append("went on")

    with pytest.raises(Stopped):
        run()
    assert not done
