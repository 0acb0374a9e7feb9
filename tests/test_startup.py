"""What is imported when."""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys

import pytest

import streamcnn

COMMAND_LINE = "from streamcnn.cli import main; main()"


def ran(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys\n" + code, *arguments]
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
        ],
    )
    def test_it_is_imported(self, code: str) -> None:
        done = ran(code)
        assert (done.returncode, done.stderr) == (0, "")
