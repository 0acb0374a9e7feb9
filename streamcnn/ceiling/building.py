"""Build the package's own C++ on the user's machine, once for every version of PyTorch.

PyTorch's C++ interface differs between versions, so a library is built where it is used, as Triton and
Inductor build theirs, and kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from streamcnn.support.cache import cache_folder

_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-O2", "-std=c++20", "-fPIC", "-shared")
_SECONDS = 300
"""Seconds to wait for the compiler at most; it takes four."""


class CannotBuild(Exception):
    """There is no compiler, it failed, or its result cannot be stored."""


class _NoPlace(CannotBuild):
    """There is no folder that can keep the library."""


def loaded(source: Path) -> ctypes.CDLL:
    """Load the shared library of a C++ file, built by :func:`built` if need be.

    Where the cache folder cannot keep the library, or the system loads no code from there, it is built for
    this process alone, which takes some seconds.

    Raises
    ------
    CannotBuild
        With the reason.
    """
    try:
        return ctypes.CDLL(str(built(source)))
    except (_NoPlace, OSError) as error:
        refused = error
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, f"{source.stem}.so")
            _compile(_compiler(), source, library)
            # Once it is loaded, its file may go.
            return ctypes.CDLL(str(library))
    except OSError as error:
        raise CannotBuild(f"{refused}, and for this process alone: {error}") from error


def built(source: Path) -> Path:
    """Build the shared library of a C++ file that uses PyTorch's ``c10``, unless it exists; return its path.

    The C++ file may include headers from its own folder.

    Several processes may do so at the same time: each builds a file of its own, and the last one stays.

    Raises
    ------
    CannotBuild
        With the reason.
    """
    library = _folder(source) / f"{source.stem}.so"
    if library.exists():
        return library
    compiler = _compiler()
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            fresh = Path(folder, library.name)
            _compile(compiler, source, fresh)
            os.replace(fresh, library)
    except OSError as error:
        raise _NoPlace(f"{library.parent} cannot be written to: {error}") from error
    return library


def _folder(source: Path) -> Path:
    """The cache folder of a source's library, named by a hash of all that the library depends on."""
    parts = (
        *(torch.__version__, str(torch._C._GLIBCXX_USE_CXX11_ABI), platform.machine(), *platform.libc_ver()),
        *_FLAGS,
    )
    files = [source, *sorted(source.parent.glob("*.h"))]
    content = b"".join(file.read_bytes() for file in files)
    key = hashlib.sha256("\n".join(parts).encode() + content).hexdigest()[:16]
    try:
        return cache_folder() / key
    except RuntimeError as error:
        raise _NoPlace("there is no home folder to keep it in") from error


def _compiler() -> list[str]:
    """The user's command in ``CXX`` if that is set, or else the first compiler found."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise CannotBuild(f"no C++ compiler was found ({' '.join(named) or ', '.join(_COMPILERS)})")


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    home = Path(torch.__file__).parent
    command = [
        *compiler,
        *_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-I{home / 'include'}",
        str(source),
        f"-L{home / 'lib'}",
        # The loader finds it by name, since PyTorch has loaded it already.
        "-lc10",
        "-o",
        str(library),
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(str(error)) from error
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise CannotBuild(f"{compiler[0]} failed: {reason}")
