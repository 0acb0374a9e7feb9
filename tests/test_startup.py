"""What is imported when, and what ends a process while it imports."""

from __future__ import annotations

import ast
import inspect
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import streamcnn

# Of a terminal, whatever the process that runs the tests was given.
AS_IN_A_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
"""
COMMAND_LINE = "from streamcnn.cli import main; main()"
NET = "import torch\n\ndef make():\n    return torch.nn.Conv2d(1, 2, 3)\n"
PLAN = ("plan", "interrupted_net:make", "--size=64", "--channels=1")


def ran(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AS_IN_A_TERMINAL + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


class TestTheCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "status"),
        [
            (["--help"], 0),
            (["--version"], 0),
            (["train", "--help"], 0),
            (["ultramnist", "generate", "--help"], 0),
            ([], 2),
            (["bogus"], 2),
            (["plan"], 2),
            (["plan", "resnet18", "--budget", "much"], 2),
            (["train", "resnet18", "images", "--out", "run", "--budget", "much"], 2),
            (["train", "resnet18", "images", "--out", "run", "--schedule-option", "gamma"], 2),
            (["demo", "--size", "1"], 2),
            (["view", "nowhere"], 2),
        ],
        ids=str,
    )
    def test_it_answers_without_pytorch(self, arguments: list[str], status: int) -> None:
        told = "import atexit; atexit.register(lambda: print('torch' in sys.modules))\n"
        done = ran(told + COMMAND_LINE, *arguments)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (status, "False")


class TestThePackage:
    def test_its_names_are_those_that_type_checkers_see(self) -> None:
        tree = ast.parse(inspect.getsource(streamcnn))
        imports = [
            node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"
        ]
        found = {alias.name: node.module for node in imports for alias in node.names}
        assert sorted(found) == streamcnn.__all__
        assert streamcnn._HOMES.items() <= found.items()
        assert set(found.values()) - set(streamcnn._HOMES.values()) == {"streamcnn.errors"}

    def test_it_has_its_names(self) -> None:
        assert set(streamcnn.__all__) <= set(dir(streamcnn))
        for name in streamcnn.__all__:
            value = getattr(streamcnn, name)
            assert pickle.loads(pickle.dumps(value)) is value

    def test_it_has_no_others(self) -> None:
        with pytest.raises(
            AttributeError, match=r"^module 'streamcnn' has no attribute 'Streaming'$"
        ) as caught:
            _ = streamcnn.Streaming  # type: ignore[attr-defined]
        assert (caught.value.name, caught.value.obj) == ("Streaming", streamcnn)
        with pytest.raises(ImportError, match=r"^cannot import name 'Streaming' from 'streamcnn'"):
            from streamcnn import Streaming  # type: ignore[attr-defined]  # noqa: F401

    @pytest.mark.parametrize(
        "code",
        [
            "import streamcnn; assert 'torch' not in sys.modules; assert dir(streamcnn)",
            "from streamcnn import *; assert issubclass(ZarrSource, ImageSource); assert verify",
            "from streamcnn import StreamingModel as first; import streamcnn; "
            "assert streamcnn.StreamingModel is first",
            "import streamcnn.data; assert streamcnn.data.__name__ == 'streamcnn.data'",
            "import streamcnn; assert streamcnn.training.TrainSettings",
        ],
    )
    def test_it_is_imported(self, code: str) -> None:
        done = ran(code)
        assert (done.returncode, done.stderr) == (0, "")


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize(
        "module",
        ["streamcnn.cli.command_line", "rich.text", "torch", "torch._C", "zarr", "interrupted_part"],
    )
    def test_they_end_a_process_that_imports(
        self, tmp_path: Path, module: str, number: signal.Signals
    ) -> None:
        (tmp_path / "interrupted_net.py").write_text(f"import interrupted_part\n{NET}")
        (tmp_path / "interrupted_part.py").touch()
        struck = f"""
def strike(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        os.kill(os.getpid(), {number.value})
sys.addaudithook(strike)
sys.path.append({str(tmp_path)!r})
"""
        done = ran(struck + COMMAND_LINE, *PLAN)
        assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_they_end_a_process_that_is_done(self, number: signal.Signals) -> None:
        last = f"import atexit; atexit.register(os.kill, os.getpid(), {number.value})\n"
        done = ran(last + COMMAND_LINE, "--version")
        assert (done.returncode, done.stderr) == (-number, "")

    def test_they_are_ignored_if_they_were(self) -> None:
        ignoring = "signal.signal(signal.SIGINT, signal.SIG_IGN); os.kill(os.getpid(), signal.SIGINT)\n"
        last = "import atexit; atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        assert ran(ignoring + last + COMMAND_LINE, "--version").returncode == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_they_end_a_process_at_any_time(self, tmp_path: Path, number: signal.Signals) -> None:
        (tmp_path / "interrupted_net.py").write_text(NET)
        code = AS_IN_A_TERMINAL + f"sys.path.append({str(tmp_path)!r})\nprint(flush=True)\n"
        command = [sys.executable, "-c", code + COMMAND_LINE, *PLAN]
        for moment in range(25):
            with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(0.05 + 0.1 * moment)
                process.send_signal(number)
                _, err = process.communicate(timeout=60)
            assert (process.returncode, err) in [
                (-number, ""),
                (128 + number, f"streamcnn: ended by {number.name}\n"),
                (0, ""),
            ], moment
