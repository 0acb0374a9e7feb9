"""One process that opens inputs, within limits, until it dies or is told to end."""

from __future__ import annotations

import importlib
import logging
import os
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from .mutations import mutate
from .targets import TARGETS, Attempts

MEMORY_BYTES = 2**28
"""The most bytes that an input may take above those held after opening a valid one."""
MOST_TEXT = 3000
"""The most characters of an error's text."""
SECRET = "what nobody may read 7d1f"

_WATCHED = {
    *(
        "open",
        "os.listdir",
        "os.scandir",
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
    ),
    "ctypes.dlopen",
    *("os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree", "shutil.copyfile", "shutil.move"),
}
_READS = {"os.listdir", "os.scandir", "ctypes.dlopen"}
_FORBIDDEN = {
    *(
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "subprocess.Popen",
        "socket.connect",
        "socket.getaddrinfo",
    ),
    "urllib.Request",
}


@dataclass(frozen=True)
class Case:
    """An input: the same numbers make the same files."""

    target: str
    seed: int
    index: int

    @property
    def random(self) -> Random:
        """The generator by which the changes are drawn."""
        return Random(f"{self.target} {self.seed} {self.index}")


@dataclass(frozen=True)
class Outcome:
    """The outcome of an input: ``accepted``, ``refused``, or a fault."""

    kind: str
    text: str = ""
    seconds: float = 0.0


def make_case(case: Case, seeds: Path, folder: Path) -> str:
    """Write the input into the empty ``folder``, and describe the changes in words."""
    random = case.random
    variants = sorted((seeds / case.target).iterdir())
    variant = random.choice(variants)
    shutil.copytree(variant, folder, dirs_exist_ok=True)
    target = TARGETS[case.target]
    done = mutate(random, folder, target.files(folder))
    if random.random() < 0.85:
        target.mend(folder, random)
    return f"{variant.name}: {done}"


class Watch:
    """Notes accesses to files outside of a folder while it is set: opening, listing and changing."""

    def __init__(self) -> None:
        self.inside: str | None = None
        self.reads_elsewhere = False
        self.found: list[str] = []
        roots = (
            sys.prefix,
            sys.base_prefix,
            os.fspath(Path(__file__).parents[2]),
            "/usr",
            "/lib",
            "/proc",
            "/sys",
        )
        self._known = tuple(os.path.realpath(root) for root in roots)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in _FORBIDDEN:
            self.found.append(f"{event} {args!r:.200}")
        elif event in _WATCHED:
            paths = (
                args
                if event in ("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile")
                else args[:1]
            )
            # Libraries are loaded when they are first needed.
            is_read = event in ("os.listdir", "os.scandir", "ctypes.dlopen") or (
                event == "open" and not _writes(args)
            )
            for path in paths:
                if isinstance(path, str | bytes | os.PathLike) and not self._may(os.fsdecode(path), is_read):
                    self.found.append(f"{event} {os.fsdecode(path)!r:.200}")

    def _may(self, path: str, is_read: bool) -> bool:
        real = os.path.realpath(path)
        if real == "/dev/null" or _lies_in(real, self.inside or ""):
            return True
        return is_read and (self.reads_elsewhere or any(_lies_in(real, root) for root in self._known))


def _writes(args: tuple[Any, ...]) -> bool:
    _, mode, flags = args
    if mode is None:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return any(letter in mode for letter in "wax+")


def _lies_in(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def serve(connection: Connection, target: str, seeds: Path, root: Path) -> None:
    """Open inputs that come as `Case`, and answer each with an `Outcome`."""
    warnings.simplefilter("ignore")
    logging.disable()
    sys.path.append(str(seeds / target / "run"))  # of the factory that runs name
    sys.stdin = open(os.devnull)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch()
    tempfile.tempdir = str(root / "case")
    os.environ.update(XDG_CACHE_HOME=str(root / "case"), MPLCONFIGDIR=str(root / "mpl"))
    (root / "mpl").mkdir(exist_ok=True)
    importlib.import_module("matplotlib.font_manager")  # it writes down what fonts there are
    for variant in sorted((seeds / target).iterdir()):
        # Valid files are opened first: whatever is imported and started once is there then.
        folder = _fresh(root)
        shutil.copytree(variant, folder, dirs_exist_ok=True)
        attempts = Attempts()
        TARGETS[target].use(folder, attempts)
        refused = attempts.refusals if variant.name not in TARGETS[target].refused else []
        assert not refused, f"valid files are refused ({target}, {variant.name}): {refused}"
    held = _data_bytes()
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY_BYTES, held + MEMORY_BYTES))
    connection.send(Outcome("ready"))
    while True:
        case = connection.recv()
        if case is None:
            return
        folder = _fresh(root)
        make_case(case, seeds, folder)
        connection.send(_opened(case, folder, watch))


def _opened(case: Case, folder: Path, watch: Watch) -> Outcome:
    canary = folder.parent / "canary" / "secret"
    attempts = Attempts()
    watch.found, watch.reads_elsewhere = [], TARGETS[case.target].reads_elsewhere
    watch.inside = os.path.realpath(folder)
    try:
        TARGETS[case.target].use(folder, attempts)
    except BaseException as error:
        watch.inside = None
        frames = traceback.extract_tb(error.__traceback__)
        return Outcome("fault", f"{type(error).__name__}: {error!s:.300}\n  at {_where(frames)}")
    finally:
        watch.inside = None
    if watch.found:
        return Outcome("escape", watch.found[0])
    if canary.read_text() != SECRET or len(list(canary.parent.iterdir())) != 1:
        return Outcome("escape", "the file beside the folder was changed")
    if any(SECRET in text for text in attempts.refusals):
        return Outcome("escape", "a text shows the file beside the folder")
    wrong = [
        text for text in attempts.refusals if not text.partition(":")[2].strip() or len(text) > MOST_TEXT
    ]
    if wrong:
        return Outcome("fault", f"text of {len(wrong[0])} characters: {wrong[0]:.300}")
    return Outcome("refused" if attempts.refusals else "accepted", "\n".join(attempts.refusals))


def _where(frames: list[traceback.FrameSummary]) -> str:
    ours = [frame for frame in frames if "/streamcnn/" in frame.filename] or list(frames)
    return " < ".join(
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in (frames[-1], *reversed(ours[-3:]))
    )


def _fresh(root: Path) -> Path:
    """An empty folder for an input, beside a folder that nothing may read."""
    folder = root / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    canary = root / "canary"
    if not canary.exists():
        canary.mkdir()
        (canary / "secret").write_text(SECRET)
    return folder


def _data_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux says how much memory a process has")
