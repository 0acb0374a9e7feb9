"""Scores of tiling candidates, as arrays: bytes at every peak point, and seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamcnn.plan.level_bytes import HeldBytes, Ints
from streamcnn.planning.global_bytes import GlobalBytes
from streamcnn.planning.memory_model import PassBytes

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class CandidateScores:
    """Projected bytes and seconds of every candidate, given where maps are stored."""

    forward: Ints
    """(stages, candidates): bytes of a step of the forward pass; 0 if there is none."""
    backward: Ints
    """(stages, candidates): bytes of a step of the backward pass; 0 if there is none."""
    num_kernels: Ints
    """(stages, candidates): different convolutions of the stage's forward pass."""
    reusable: Ints
    """(stages, candidates): bytes of a step in blocks that may be kept for reuse when they are freed."""
    seconds: Floats
    """(stages, candidates): time of the stage, its stores included."""
    levels: Ints
    """(stages,): level of the stage."""
    peak_levels: Ints
    """(stages,): level at which the stage's step runs, later than its own if it rematerialises maps."""
    global_bytes: GlobalBytes
    held: HeldBytes
    """Bytes held beside steps, without what the backend keeps."""
    reuses_blocks: bool
    """Whether freed blocks are kept for reuse."""

    def pass_bytes(self, choice: Ints | None, reusable: int) -> PassBytes:
        """Bytes of a pass in which stages take the candidates of ``choice``; None counts no kernels yet.

        Parameters
        ----------
        reusable
            The most bytes of a step in blocks that may be kept for reuse.
        """
        num_kernels = np.zeros_like(self.global_bytes.num_kernels)
        if choice is not None:
            chosen = self.num_kernels[np.arange(len(choice)), choice]
            num_kernels = np.bincount(self.levels, chosen, len(num_kernels)).astype(np.int64)
        return PassBytes.of(
            self.global_bytes,
            self.held,
            num_kernels,
            len(self.levels),
            reusable if self.reuses_blocks else None,
        )

    def peaks(self, found: PassBytes) -> Ints:
        """(stages, candidates): bytes at the worse of the stage's two peak points."""
        levels = self.peak_levels[:, None]
        forward = found.at(found.held.forward, levels, self.forward)
        backward = found.at(found.held.backward, levels, self.backward)
        peaks: Ints = np.maximum(
            np.where(self.forward > 0, forward, 0), np.where(self.backward > 0, backward, 0)
        )
        return peaks

    def other_peak(self, found: PassBytes) -> int:
        """Bytes at the worst of the peak points that belong to no stage."""
        whole = self.global_bytes
        peaks = [int(found.at(found.held.segments, whole.step_levels, whole.step_bytes).max(initial=0))]
        if whole.reading.opening:
            peaks.append(int(found.at(whole.opening, 0, 0)))
        return max(peaks)
