"""The caller's modes around a call of the model: hooks on saved tensors, and dispatch modes.

Capture and planning are no part of the caller's computation: activation checkpointing must not count
their tensors, and a profiler's mode must not see their operators. The pass itself runs under both.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch._C import _autograd
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _push_mode as _push_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode


class CallerModes:
    """The caller's hooks and modes, which one block removes and a block inside it restores."""

    def __init__(self) -> None:
        self._hooks: list[tuple[Any, Any]] = []
        self._modes: list[Any] = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run a block without the caller's hooks and modes."""
        self._hooks, self._modes = _take_hooks(), _take_modes()
        try:
            with _trackers_aside():
                yield
        finally:
            _put_hooks(self._hooks)
            _put_modes(self._modes)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run a block inside :meth:`aside` with the caller's hooks and modes."""
        _put_hooks(self._hooks)
        _put_modes(self._modes)
        try:
            yield
        finally:
            _take_hooks()
            _take_modes()


class _Collector:
    """Keeps Python's cyclic garbage collector off while any thread is inside a block of :meth:`off`."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._num_blocks = 0
        self._was_on = False

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run a block with the collector off.

        Capture and planning create many long-lived objects within a few seconds. The collector would walk all
        of them and all of PyTorch's repeatedly, which takes a quarter of that time.
        """
        with self._lock:
            if not self._num_blocks:
                self._was_on = gc.isenabled()
                gc.disable()
            self._num_blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_blocks -= 1
                if self._was_on and not self._num_blocks:
                    gc.enable()


collector = _Collector()


@contextmanager
def function_modes_aside() -> Iterator[None]:
    """Run a block without the caller's function modes, which saw its calls when they were captured."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    for _ in modes:
        _pop_function_mode()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for mode in modes:
            _push_function_mode(mode)  # type: ignore[no-untyped-call]


@contextmanager
def saved_tensors_hooks_aside() -> Iterator[None]:
    """Run a block without the caller's hooks on saved tensors, for autograd graphs of our own."""
    hooks = _take_hooks()
    try:
        yield
    finally:
        _put_hooks(hooks)


def _take_hooks() -> list[tuple[Any, Any]]:
    taken = []
    while (top := _autograd._top_saved_tensors_default_hooks(True)) is not None:
        taken.append(top)
        _autograd._pop_saved_tensors_default_hooks()
    return taken[::-1]


def _take_modes() -> list[Any]:
    modes = _get_current_dispatch_mode_stack()
    for _ in modes:
        _pop_mode()
    return modes


def _put_hooks(hooks: list[tuple[Any, Any]]) -> None:
    for pack, unpack in hooks:
        _autograd._push_saved_tensors_default_hooks(pack, unpack)


def _put_modes(modes: list[Any]) -> None:
    for mode in modes:
        _push_mode(mode)


@contextmanager
def _trackers_aside() -> Iterator[None]:
    """Run a block without the global hooks by which PyTorch's own tools track the running module."""
    taken = [
        (registry, key, registry.pop(key))
        for registry in (module_hooks._global_forward_pre_hooks, module_hooks._global_forward_hooks)
        for key, hook in list(registry.items())
        if (getattr(hook, "__module__", None) or "").startswith("torch.")
    ]
    try:
        yield
    finally:
        for registry, key, hook in taken:
            registry[key] = hook
