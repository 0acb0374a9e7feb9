"""Bytes that libraries keep on the CPU beside tensors: oneDNN's compiled kernels and MKL's buffers.

oneDNN compiles kernels for every shape of a convolution's operands, so as many as a stage has kinds of tiles,
and keeps the last thousand of them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch._ops import OpOverload

from streamcnn.plan import MemoryTerm

KERNEL_BYTES = 3 * 2**15
"""What oneDNN keeps of a kernel, with the code that it touches: 100 KB for one forward, 180 to 290 KB for the
three of a convolution that is differentiated, by sizes of 21 x 21 to 40 x 30 (torch 2.13, AVX-512)."""
CACHED_KERNELS = 1024
"""How many it keeps, if ``ONEDNN_PRIMITIVE_CACHE_CAPACITY`` does not say otherwise."""
CODE_BYTES = 2**20
"""Address space of a kernel's code: part of the limit until the step is over that compiled it."""
MATRIX_BYTES = 5 * 2**20
"""Buffers of a matrix product for each thread, most of it never touched. MKL keeps them until it is told not
to, which is at a step's end, and takes others for every product of a step: on 2 threads 9.2 MB for one linear
layer, 28 MB for three, on 8 threads 36 MB for one, and little more for the gradients of such layers."""
_MATRIX_PRODUCTS = frozenset(f"aten.{name}" for name in "linear addmm mm bmm baddbmm matmul".split())


def is_matrix_product(target: object) -> bool:
    """Whether a target multiplies matrices, a linear layer among others."""
    return isinstance(target, OpOverload) and str(target.overloadpacket) in _MATRIX_PRODUCTS


def compiled_code(num_kernels: int) -> MemoryTerm:
    """Address space of the code that a step compiles."""
    return MemoryTerm("address space of compiled code", num_kernels * CODE_BYTES)


def matrix_buffers(num_products: int) -> MemoryTerm:
    """Address space of the buffers of a step's matrix products."""
    return MemoryTerm("buffers of matrix products", num_products * MATRIX_BYTES * torch.get_num_threads())


class KernelBytes:
    """What is kept of all kernels at every moment of a pass.

    Parameters
    ----------
    by_level
        Kernels that the forward pass compiles in each level.
    training
        Whether a backward pass follows, which compiles two for each of them: for the gradients of operand and
        of weights.
    """

    def __init__(self, by_level: NDArray[np.int64], *, training: bool) -> None:
        so_far = by_level.cumsum()
        differentiated = so_far[-1] - so_far + by_level if training else 0 * by_level
        self.forward_bytes = KERNEL_BYTES * np.minimum(so_far, CACHED_KERNELS)
        """By level, while its phase runs forward; likewise backward, and at its small values."""
        self.backward_bytes = KERNEL_BYTES * np.minimum(so_far[-1] + 2 * differentiated, CACHED_KERNELS)

    def forward(self, level: int) -> MemoryTerm:
        """While the phase of ``level`` runs forward."""
        return MemoryTerm("compiled kernels", int(self.forward_bytes[level]))

    def backward(self, level: int) -> MemoryTerm:
        """While the phase of ``level`` runs backward, or its small values are differentiated."""
        return MemoryTerm("compiled kernels", int(self.backward_bytes[level]))
