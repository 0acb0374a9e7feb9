"""torchvision where its compiled operators do not load: imported by scripts that never import streamcnn."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from streamcnn.support import torchvision_import

ROOT = Path(__file__).parents[1]
HOOK = "streamcnn_torchvision_import"

USERS_SCRIPT = """
    import sys
    assert "torch" not in sys.modules, "imported when Python started"
    import timm, torch, torchvision
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor
    from torchvision.transforms import v2

    image = v2.Resize(64)(torch.rand(1, 3, 70, 70))
    assert timm.create_model("resnet18", pretrained=False)(image).shape == (1, 1000)
    assert create_feature_extractor(resnet18(), ["layer1"])(image)["layer1"].shape == (1, 64, 16, 16)
    try:
        import lightning
    except ModuleNotFoundError:
        pass
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [4, 4, 5, 5]])
    scores = torch.tensor([0.1, 0.9, 0.5])
    told = []
    # torchvision 0.26 has no qnms where its operators load.
    names = [name for name in ("nms", "qnms") if hasattr(torch.ops.torchvision, name)]
    for nms in (torchvision.ops.nms, *(getattr(torch.ops.torchvision, name) for name in names)):
        try:
            assert nms(boxes, scores, 0.5).tolist() == [1, 2]
        except RuntimeError as error:
            told.append(str(error))
    if torchvision.extension._has_ops():
        assert torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU")
    else:
        assert "Couldn't load custom C++ ops" in told[0]
        assert all("compiled operators could not be loaded" in text for text in told[1:]), told
    assert "streamcnn" not in sys.modules
    print("ran")
"""

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("timm", "torchvision")),
    reason="needs the extra zoo",
)


def run(script: str, folder: Path) -> str:
    """What ``script`` prints, run in ``folder``, where streamcnn can be imported only if it is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def is_hook_installed() -> bool:
    """Whether this environment's streamcnn has it; a folder of sources may tell of another one."""
    found = importlib.metadata.distributions(name="streamcnn")
    return any(file.name == f"{HOOK}.pth" for one in found for file in one.files or [])


@pytest.fixture(scope="module", params=["regular", "editable"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``site-packages`` that pip has installed streamcnn into, from a copy of its sources."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"
    for name in ("streamcnn", "packaging"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    where = [str(source)] if request.param == "regular" else ["--editable", str(source)]
    options = ["--no-deps", "--no-build-isolation", "--ignore-installed", "--no-warn-script-location"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--prefix", str(folder / "prefix"), *where],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    (site,) = (folder / "prefix").glob("**/site-packages")
    return site


def test_plain_scripts_import_torchvision_after_an_install(installed: Path, tmp_path: Path) -> None:
    start = f"import site; site.addsitedir({str(installed)!r})"
    assert run(f"{start}\n{textwrap.dedent(USERS_SCRIPT)}", tmp_path) == "ran\n"


def test_an_uninstall_removes_the_hook(installed: Path) -> None:
    (record,) = installed.glob("streamcnn-*.dist-info/RECORD")
    listed = {line.split(",")[0] for line in record.read_text().splitlines()}
    present = {path.name for path in installed.glob("*.p*") if path.is_file()}
    assert {f"{HOOK}.pth", f"{HOOK}.py"} <= present <= listed


def test_what_is_installed_is_this_module(installed: Path) -> None:
    assert (installed / f"{HOOK}.py").read_bytes() == Path(torchvision_import.__file__).read_bytes()


@pytest.mark.skipif(not is_hook_installed(), reason="streamcnn was not installed with its hook: run make")
def test_plain_scripts_import_torchvision_in_this_environment(tmp_path: Path) -> None:
    assert run(USERS_SCRIPT, tmp_path) == "ran\n"


FAKE_TORCHVISION = {
    "torchvision/__init__.py": "from . import extension, rules\n",
    "torchvision/extension.py": """
        import torch
        def _has_ops():
            return LOADS
        if LOADS:
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.impl("nms", lambda dets, scores, iou_threshold: scores + iou_threshold, "CPU")
    """,
    "torchvision/rules.py": """
        import torch
        torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: scores)
        torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: scores)
    """,
}


@pytest.mark.parametrize("loads", [True, False])
def test_operators_that_load_are_left_alone(loads: bool, tmp_path: Path) -> None:
    for name, text in FAKE_TORCHVISION.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text).replace("LOADS", str(loads)))
    shutil.copy(torchvision_import.__file__, tmp_path / f"{HOOK}.py")
    script = f"""
        import sys
        import {HOOK} as hook
        hook.install()
        hook.install()
        assert sum(type(finder) is hook._Finder for finder in sys.meta_path) == 1
        import torch, torchvision
        assert not any(type(finder) is hook._Finder for finder in sys.meta_path)
        try:
            found = torch.ops.torchvision.nms(torch.ones(1, 4), torch.ones(1), 2.0).item()
        except RuntimeError:
            found = "refused"
        print(found, len(hook._libraries))
    """
    assert run(script, tmp_path) == ("3.0 0\n" if loads else "refused 1\n")


def test_an_import_that_failed_before_the_hook_can_be_repeated(tmp_path: Path) -> None:
    script = f"""
        try:
            import torchvision
        except RuntimeError:
            pass
        import {HOOK} as hook
        hook.install()
        import torchvision
        print("ran")
    """
    shutil.copy(torchvision_import.__file__, tmp_path / f"{HOOK}.py")
    assert run(script, tmp_path) == "ran\n"
