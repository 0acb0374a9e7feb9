"""The build backend: setuptools', with the start-up hook for torchvision added to the wheels.

A ``.pth`` has to lie in the root of a wheel, to be read when Python starts, and setuptools puts none there by
its configuration. So the wheel is made by setuptools and then written once more with two files beside the
package: a copy of ``streamcnn/support/torchvision_import.py``, which says what it is for, and the ``.pth``
that calls it. Both ``pip install .`` and ``pip install -e .`` make such a wheel. They are listed in its
``RECORD``, so ``pip uninstall`` removes them. It is a copy because to import ``streamcnn`` would import
PyTorch whenever Python starts, and because an editable install may lose sight of the package.
"""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist as build_sdist
from setuptools.build_meta import get_requires_for_build_editable as get_requires_for_build_editable
from setuptools.build_meta import get_requires_for_build_sdist as get_requires_for_build_sdist
from setuptools.build_meta import get_requires_for_build_wheel as get_requires_for_build_wheel
from setuptools.build_meta import prepare_metadata_for_build_editable as prepare_metadata_for_build_editable
from setuptools.build_meta import prepare_metadata_for_build_wheel as prepare_metadata_for_build_wheel

_HOOK = Path("streamcnn", "support", "torchvision_import.py")
_MODULE = "streamcnn_torchvision_import"


def build_wheel(wheel_directory: str, *arguments: Any, **settings: Any) -> str:
    """The name of the wheel in ``wheel_directory``, which holds the package and the hook."""
    return _with_hook(wheel_directory, build_meta.build_wheel(wheel_directory, *arguments, **settings))


def build_editable(wheel_directory: str, *arguments: Any, **settings: Any) -> str:
    """The name of the wheel in ``wheel_directory``, which leads to the package and holds the hook."""
    return _with_hook(wheel_directory, build_meta.build_editable(wheel_directory, *arguments, **settings))


def _with_hook(folder: str, name: str) -> str:
    """Write the wheel again with the hook in it; its name."""
    files = {
        f"{_MODULE}.py": _HOOK.read_bytes(),
        f"{_MODULE}.pth": f"import {_MODULE}; {_MODULE}.install()\n".encode(),
    }
    path = Path(folder, name)
    written = path.with_suffix(".part")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as new:
        *entries, record = sorted(old.infolist(), key=lambda entry: entry.filename.endswith("/RECORD"))
        for entry in entries:
            new.writestr(entry, old.read(entry), entry.compress_type)
        for file, content in files.items():
            new.writestr(_entry(file, record), content)
        lines = [_record_line(file, content) for file, content in files.items()]
        new.writestr(record, old.read(record) + "".join(lines).encode(), record.compress_type)
    os.replace(written, path)
    return name


def _entry(file: str, like: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """An entry with the time and the permissions of another."""
    entry = zipfile.ZipInfo(file, like.date_time)
    entry.external_attr, entry.compress_type = like.external_attr, zipfile.ZIP_DEFLATED
    return entry


def _record_line(file: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{file},sha256={digest},{len(content)}\n"
