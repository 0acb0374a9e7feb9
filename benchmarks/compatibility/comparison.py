"""Run a case's script on the plain and on the streamed net, and compare everything that it did."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.compatibility.case import SAME, SAME_OR_REFUSED, Case, Record, seed_everything
from benchmarks.compatibility.snapshot import Difference, Snapshot, differences, snapshot
from streamcnn.errors import StreamError

_STATE = "state of PyTorch"
_AT_THE_END = (_STATE, "random state", "net", "world")
"""Names that are recorded after the script, wherever it ended."""
_RUNS = "runs"
"""What is said of a plain script that has nothing to be compared with."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a case."""

    case: Case
    verdict: str
    """``same``, ``refused: <first line of the error>`` or ``WRONG``."""
    error: float
    """The largest relative error; infinite where values cannot be compared."""
    plain: str
    """The value that differs most, in the plain run; the next is that in the streamed run."""
    streamed: str
    faults: tuple[str, ...] = ()
    """Descriptions of differences, worst first."""

    @property
    def holds(self) -> bool:
        """Whether the verdict is one that the case expects."""
        if self.verdict == "WRONG":
            return False
        if self.case.expected in (SAME, SAME_OR_REFUSED):
            return self.verdict == SAME or self.case.expected == SAME_OR_REFUSED
        return re.search(self.case.expected, self.verdict) is not None

    def explain(self) -> str:
        """The verdict and the worst few faults."""
        lines = [f"{self.case.kind}: {self.case.name}: {self.verdict}, expected: {self.case.expected}"]
        return "\n  ".join([*lines, *self.faults[:8]])


@dataclass(slots=True)
class Outcome:
    """The outcome of one run of a script."""

    values: dict[str, Snapshot] = field(default_factory=dict)
    error: Exception | None = None
    changed: list[Difference] = field(default_factory=list)
    """How a refused pass changed the net."""
    printed: str = ""
    warned: list[str] = field(default_factory=list)
    unable: dict[str, str] = field(default_factory=dict)
    """Operations that fail on the net afterwards, with the reasons."""


def compare(case: Case) -> Result:
    """Run ``case`` plain and streamed, and compare the two runs.

    Raises
    ------
    Exception
        Any error of the script on the plain net, as the case is broken then.
    """
    plain, streamed = outcome_of(case, streamed=False), outcome_of(case, streamed=True)
    if plain.error is not None:
        raise plain.error
    if streamed.error is None:
        return _compared(case, plain, streamed)
    text = _first_line(streamed.error)
    if isinstance(streamed.error, StreamError) or _is_expected(case, text):
        faults = _faults_of_refusal(case, plain, streamed)
        return Result(
            case, "WRONG" if faults else f"refused: {text}", 0.0, _RUNS, faults[0] if faults else text, faults
        )
    text = f"{type(streamed.error).__name__}: {text}"
    return Result(case, "WRONG", math.inf, _RUNS, text, (f"the streamed script raises {text}",))


def outcome_of(case: Case, *, streamed: bool) -> Outcome:
    """Run the script of ``case`` on one of the two nets."""
    outcome = Outcome()
    net, world = _built(case)
    record = Record(case, net, world, streamed=streamed)
    model = record.stream(net)
    with _global_state_kept(), _heard(outcome):
        try:
            case.steps(model, net, record)
        except Exception as error:
            outcome.error = error
            found = differences(record.before, snapshot(net))
            outcome.changed = [difference for difference in found if difference.error > 0]
        record(_STATE, _global_state())
        # Passes are seeded: what they draw shows here.
        record(
            "random state",
            {
                "Python": str(hash(random.getstate())),
                "NumPy": _numpy_state(),
                "PyTorch": torch.get_rng_state(),
            },
        )
    record("net", net)
    record("world", world)
    outcome.values = record.values
    outcome.unable = _unable(net)
    if model is not net:
        outcome.unable |= {f"{key} of the model": why for key, why in _unable(model).items()}
    return outcome


def _built(case: Case) -> tuple[nn.Module, Any]:
    """The net in the case's type, its vectors moved away from 0 and 1, and the world it changes."""
    seed_everything(0)
    built = case.build()
    net, world = built if isinstance(built, tuple) else (built, None)
    _cast(net, case.dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            if not nn.parameter.is_lazy(parameter) and parameter.numel() == max(parameter.shape, default=1):
                parameter.add_(torch.empty_like(parameter).uniform_(0.1, 0.5))
    return net, world


def _cast(net: nn.Module, dtype: torch.dtype) -> None:
    """Cast as ``net.to(dtype)`` does, without dropping imaginary parts."""

    def cast(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    net._apply(cast)


def _is_expected(case: Case, text: str) -> bool:
    """Whether a case asks for an error of this text: PyTorch itself may be the one to refuse."""
    return case.expected not in (SAME, SAME_OR_REFUSED) and re.search(case.expected, text) is not None


def _differences(plain: Outcome, streamed: Outcome, groups: Iterable[str]) -> list[Difference]:
    """The differences of two runs in the values recorded under the names ``groups``."""
    found: list[Difference] = []
    for group in groups:
        for each in differences(plain.values.get(group, {}), streamed.values.get(group, {})):
            name = f"{group}: {each.path}" if each.path else group
            found.append(Difference(name, each.error, each.expected, each.found))
    return found


def _compared(case: Case, plain: Outcome, streamed: Outcome) -> Result:
    """The verdict on two scripts that both ran to their end."""
    found = _differences(plain, streamed, dict.fromkeys([*plain.values, *streamed.values]))
    wrong = [each for each in found if not each.error <= case.tolerance]
    faults = [_text(each) for each in wrong]
    if plain.printed != streamed.printed:
        faults.append(f"printed: plain {plain.printed!r}; streamed {streamed.printed[:300]!r}")
    faults += [f"a warning: {text}" for text in streamed.warned if text not in plain.warned]
    faults += _less_able(plain, streamed)
    error = max((each.error for each in found), default=0.0)
    # The first that is wrong: it comes of nothing else.
    shown = wrong[0] if wrong else max(found, key=lambda each: each.error)
    texts = (f"{shown.path}: {shown.expected}", shown.found if wrong or not faults else faults[0])
    return Result(case, "WRONG" if faults else SAME, error, *texts, tuple(faults))


def _text(each: Difference) -> str:
    return f"{each.path}: plain {each.expected}; streamed {each.found}; error {each.error:.1e}"


def _faults_of_refusal(case: Case, plain: Outcome, streamed: Outcome) -> tuple[str, ...]:
    """Faults of a refusal: it changed the net, printed, or came after a pass that was wrong."""
    before = [group for group in streamed.values if group not in _AT_THE_END]
    found = _differences(plain, streamed, before)
    faults = [_text(each) for each in found if not each.error <= case.tolerance]
    faults += [
        f"the refused pass changed {each.path}: {each.expected} to {each.found}" for each in streamed.changed
    ]
    if not plain.printed.startswith(streamed.printed):
        faults.append(f"the refused pass printed {streamed.printed[:300]!r}")
    faults += [f"a warning: {text}" for text in streamed.warned if text not in plain.warned]
    faults += [_text(each) for each in _differences(plain, streamed, [_STATE]) if each.error > 0]
    return (*faults, *_less_able(plain, streamed))


def _less_able(plain: Outcome, streamed: Outcome) -> list[str]:
    """Operations that work on the plain net afterwards, but not on the streamed one or its model."""
    return [
        f"cannot {what}: {why}"
        for what, why in streamed.unable.items()
        if what.removesuffix(" of the model") not in plain.unable
    ]


def _unable(net: nn.Module) -> dict[str, str]:
    """Which of copying, saving and taking the state fail for ``net``, with the error's first line."""
    found = {}
    actions = {
        "deepcopy": lambda: copy.deepcopy(net),
        "save": lambda: torch.save(net, io.BytesIO()),
        "state_dict": lambda: torch.save(net.state_dict(), io.BytesIO()),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, action in actions.items():
            try:
                action()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {_first_line(error)}"
    return found


def _numpy_state() -> str:
    _, keys, *rest = np.random.get_state()
    return str(hash((keys.tobytes(), *rest)))


def _global_state() -> dict[str, Any]:
    """The global state that a pass must leave as it was."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dispatch modes": torch.utils._python_dispatch._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "global hooks": len(torch.nn.modules.module._global_forward_hooks),
    }


@contextlib.contextmanager
def _global_state_kept() -> Iterator[None]:
    """Undo a script's changes of the state of PyTorch and of the environment."""
    dtype, grad, environment = torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        os.environ.clear()
        os.environ.update(environment)


@contextlib.contextmanager
def _heard(outcome: Outcome) -> Iterator[None]:
    """Capture warnings, and text that Python or other code prints."""
    text = io.StringIO()
    with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with (
            _descriptors_to(file.fileno()),
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
        ):
            yield
        file.seek(0)
        outcome.printed = text.getvalue() + file.read().decode(errors="replace")
    outcome.warned = [str(warning.message) for warning in caught]


@contextlib.contextmanager
def _descriptors_to(target: int) -> Iterator[None]:
    """Send the process's standard output and error to another descriptor."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        for descriptor in (1, 2):
            os.dup2(target, descriptor)
        yield
    finally:
        for descriptor, copied in zip((1, 2), kept, strict=True):
            os.dup2(copied, descriptor)
            os.close(copied)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
