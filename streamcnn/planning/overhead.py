"""Backend overhead: what libraries take beside tensors, oneDNN's compiled kernels and MKL's buffers.

oneDNN compiles kernels for every shape of a convolution's operands, so as many as a stage has kinds of tiles,
and keeps the last thousand of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamcnn.graph.costs import Routine, cost_of
from streamcnn.graph.program import Program
from streamcnn.plan.storage import MemoryTerm

CACHED_KERNELS = 1024
"""Kernels that oneDNN keeps, if ``ONEDNN_PRIMITIVE_CACHE_CAPACITY`` does not say otherwise."""


def num_products(program: Program, names: Iterable[str]) -> int:
    """Matrix products of different sizes among the operators ``names``."""
    return num_sizes(program, names, Routine.MATRIX_PRODUCT)


def num_sizes(program: Program, names: Iterable[str], routine: Routine) -> int:
    """How many of the operators ``names`` that are of one kind differ in their operands' or result's size."""
    nodes = program.nodes
    return len(
        {
            (nodes[name].spec, *(nodes[n].spec for n in nodes[name].operands))
            for name in names
            if cost_of(nodes[name].target).routine is routine
        }
    )


@dataclass(frozen=True, slots=True)
class BackendOverhead:
    """What libraries take beside tensors where a plan is carried out."""

    kernel_bytes: int
    """Kept of every compiled kernel, with the code that is touched."""
    code_bytes: int
    """Address space of a kernel's code: part of the limit until the step is over that compiled it."""
    matrix_bytes: int
    """Address space of the buffers of one matrix product."""

    @classmethod
    def host(cls, num_threads: int) -> BackendOverhead:
        """oneDNN and MKL on a CPU.

        A kernel: 100 KB for one forward, 180 to 290 KB for the three of a convolution that is differentiated,
        on maps of 21 x 21 to 40 x 30 (torch 2.13, AVX-512). MKL keeps its buffers until it is told not to, at
        a step's end, and takes others for every size of product, most of it never touched: on 2 threads
        9.2 MB for one linear layer and 28 MB for three, on 8 threads 36 MB for one, and little more for the
        gradients of such layers.
        """
        return cls(kernel_bytes=3 * 2**15, code_bytes=2**20, matrix_bytes=5 * 2**20 * num_threads)

    @classmethod
    def card(cls) -> BackendOverhead:
        """On a GPU, where what libraries take is measured before a pass and reserved."""
        return cls(kernel_bytes=0, code_bytes=0, matrix_bytes=0)

    def terms(self, num_kernels: int, num_products: int) -> tuple[MemoryTerm, MemoryTerm]:
        """What a step takes with so many kernels and matrix products of so many sizes."""
        return (
            MemoryTerm("address space of compiled code", num_kernels * self.code_bytes),
            MemoryTerm("buffers of matrix products", num_products * self.matrix_bytes),
        )


class KernelBytes:
    """What is kept of all kernels at every moment of a pass.

    Parameters
    ----------
    each
        Bytes of a kernel.
    by_level
        Kernels that the forward pass compiles in each level.
    training
        Whether a backward pass follows, which compiles two for each of them: for the gradients of operand and
        of weights.
    """

    def __init__(self, each: int, by_level: NDArray[np.int64], *, training: bool) -> None:
        so_far = by_level.cumsum()
        differentiated = so_far[-1] - so_far + by_level if training else 0 * by_level
        self.forward_bytes = each * np.minimum(so_far, CACHED_KERNELS)
        """By level, while its phase runs forward; likewise backward, and at its global values."""
        self.backward_bytes = each * np.minimum(so_far[-1] + 2 * differentiated, CACHED_KERNELS)

    def forward(self, level: int) -> MemoryTerm:
        """While the phase of ``level`` runs forward."""
        return MemoryTerm("compiled kernels", int(self.forward_bytes[level]))

    def backward(self, level: int) -> MemoryTerm:
        """While the phase of ``level`` runs backward, or its global values are differentiated."""
        return MemoryTerm("compiled kernels", int(self.backward_bytes[level]))
