"""The compiled parts of a plan: steps of its phases, and segments.

The layouts of tensors are known only once they have been computed. So the first pass of a plan runs operator
by operator and notes the layouts that it meets. Steps and segments are compiled for these before the next
pass, while no limit on memory is in force.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from streamcnn.execution.compiled_segments import CompiledSegments
from streamcnn.execution.compiled_steps import CompiledSteps
from streamcnn.execution.compiler import Candidate, Compile, by_inductor, lacks_a_compiler
from streamcnn.graph.fakes import TRACING
from streamcnn.graph.program import Program


class Compiled:
    """The compiled parts of one plan, of which there are none at first."""

    def __init__(self, program: Program, compile_module: Compile = by_inductor) -> None:
        self.steps = CompiledSteps(compile_module)
        self.segments = CompiledSegments(program, compile_module)
        self._is_over = False
        self._refusal: str | None = None

    @property
    def num_parts(self) -> int:
        """Compiled steps and segments, counted once for each layout of their inputs."""
        return self.steps.num_compiled + self.segments.num_compiled

    def prepare(self, device: torch.device, casts: torch.dtype | None) -> None:
        """Compile the steps and segments that earlier passes have met.

        Parts that cannot be compiled still run operator by operator, and a warning says so. If there is no
        compiler, nothing more is tried.

        Parameters
        ----------
        device
            Where passes run.
        casts
            Element type to which autocast casts there; ``None`` for no casts.
        """
        if self._refusal is not None:
            warnings.warn(f"compile=True: nothing is compiled of this model: {self._refusal}", stacklevel=2)
        if self._is_over:
            return
        candidates = [*self.steps.candidates(device, casts), *self.segments.candidates(device, casts)]
        failures: list[tuple[Candidate, Exception]] = []
        for candidate in candidates:
            try:
                with TRACING:
                    candidate.compile()
            except Exception as error:
                failures.append((candidate, error))
                self._is_over = lacks_a_compiler(error)
                if self._is_over:
                    break
        if failures:
            warnings.warn(_warning(failures, len(candidates), nothing_more=self._is_over), stacklevel=2)

    def refuse(self, reason: str) -> None:
        """Compile nothing, and have every pass say why."""
        self._is_over, self._refusal = True, reason

    def give_up(self) -> bool:
        """Run everything operator by operator from now on; return whether anything was compiled."""
        was_compiled, self._is_over = self.num_parts > 0, True
        self.steps.drop()
        self.segments.drop()
        return was_compiled


def _warning(failures: Sequence[tuple[Candidate, Exception]], num_tried: int, *, nothing_more: bool) -> str:
    """The warning about parts that could not be compiled."""
    (first, error), *_ = failures
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if nothing_more:
        return (
            f"compile=True: nothing can be compiled here: {reason}. Passes run operator by operator, with "
            "the same results; install what is missing, or leave compile= out"
        )
    return (
        f"compile=True: {len(failures)} of {num_tried} parts of a pass cannot be compiled and run operator "
        f"by operator, with the same results; the first is {first.name}: {reason}"
    )
