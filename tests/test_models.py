"""Models by name, and optional dependencies that are missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from streamcnn.errors import FactoryFailed, StreamError
from streamcnn.support.extras import MissingExtra, require
from streamcnn.support.models import load_model


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of the user's that is on the path."""
    (tmp_path / "some_users_models.py").write_text(
        "from torch import nn\n"
        "def small(width=4):\n    return nn.Conv2d(3, width, 1)\n"
        "def text():\n    return 'no module'\n"
        "def raising():\n    raise OSError('no weights\\nhere')\n"
        "def ending():\n    raise SystemExit(0)\n"
        "def hungry():\n    raise MemoryError\n"
        "constant = 3\n"
    )
    (tmp_path / "some_users_bug.py").write_text("import a_module_that_does_not_exist\n")
    (tmp_path / "some_users_slip.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "some_users_models"
    sys.modules.pop("some_users_models", None)


def test_calls_a_factory_with_its_arguments(user_module: str) -> None:
    model = load_model(f"{user_module}:small", width=5)
    assert isinstance(model, nn.Conv2d)
    assert model.out_channels == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some_users_models:absent", "some_users_models has no callable 'absent': allowed is"),
        ("some_users_models:constant", "some_users_models has no callable 'constant': allowed is"),
        ("some_users_models:text", "returned a str: allowed is a torch.nn.Module"),
        ("no_such_package.models:f", "no module 'no_such_package' for model .*: allowed is .* PYTHONPATH"),
        ("some_users_models.inner:f", "no module 'some_users_models.inner' for model"),
        (
            "some_users_models:",
            "cannot read 'some_users_models:' as a model: allowed is package.module:factory",
        ),
        (":small", "cannot read ':small' as a model: allowed is package.module:factory, or a timm name"),
    ],
)
def test_names_what_is_wrong_with_a_factory(user_module: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_says_what_a_factory_does_not_take(user_module: str) -> None:
    with pytest.raises(ValueError, match=r"small cannot be called with depth=3: got an unexpected keyword"):
        load_model(f"{user_module}:small", depth=3)
    with pytest.raises(ValueError, match="Conv2d cannot be called with no arguments: missing a required"):
        load_model("torch.nn:Conv2d")


@pytest.mark.parametrize(
    ("name", "message", "cause"),
    [
        (
            "some_users_models:raising",
            r"OSError: no weights\nhere \(.*some_users_models\.py, line 7\)",
            OSError,
        ),
        ("some_users_models:ending", r"SystemExit: 0 \(.*some_users_models\.py, line 9\)", SystemExit),
        (
            "some_users_bug:f",
            r"ModuleNotFoundError: .*a_module_that_.*some_users_bug\.py, line 1",
            ImportError,
        ),
        ("some_users_slip:f", r"SyntaxError: .*some_users_slip\.py, line 1", SyntaxError),
    ],
)
def test_a_bug_of_the_user_is_named_with_its_place(
    user_module: str, name: str, message: str, cause: type[BaseException]
) -> None:
    with pytest.raises(FactoryFailed, match=f"^{name} fails with {message}.*: mend it, or") as caught:
        load_model(name)
    assert isinstance(caught.value.__cause__, cause)


def test_memory_that_a_factory_is_refused_is_told_by_its_type(user_module: str) -> None:
    with pytest.raises(MemoryError):
        load_model(f"{user_module}:hungry")


def test_creates_timm_models() -> None:
    model = load_model("resnet18", num_classes=7)
    assert model.get_submodule("fc").out_features == 7


def test_suggests_timm_names() -> None:
    with pytest.raises(ValueError, match=r"no timm model 'resnet181' \(similar: resnet18, .*\): allowed is"):
        load_model("resnet181")
    with pytest.raises(ValueError, match="no timm model 'qqqq': allowed is a timm name"):
        load_model("qqqq")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        MissingExtra, match=r"timm cannot be imported .* pip install 'streamcnn\[zoo\]'"
    ) as caught:
        load_model("resnet18")
    assert isinstance(caught.value, StreamError)
    assert isinstance(caught.value, ImportError)


def test_require_gives_the_module() -> None:
    assert require("json", extra="none") is sys.modules["json"]
