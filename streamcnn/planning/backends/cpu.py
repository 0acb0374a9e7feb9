"""CPUs: glibc's heap, oneDNN's compiled kernels and blocked layouts, MKL's buffers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from streamcnn.graph.costs import CallBytes, Cost, Routine
from streamcnn.plan.level_bytes import HeldBytes, Ints, LevelBytes
from streamcnn.plan.storage import MemoryTerm
from streamcnn.planning.backends.base import Backend, Fragmentation

CACHED_KERNELS = 1024
"""Kernels that oneDNN keeps, unless ``ONEDNN_PRIMITIVE_CACHE_CAPACITY`` says otherwise."""
RUNTIME_BYTES = 3 * 2**23
"""Bytes for threads' buffers, the interpreter's own growth and library code that runs for the first time."""
KEEPING = Fragmentation(fixed=3 * 2**24, per_stage=5 * 2**18, held=1.25)
"""Loss of the C library if its heap, which never shrinks, keeps freed blocks. Beyond the other terms and
the share ``held`` (torch 2.13, glibc 2.36), EfficientNet-B0 with 66 stages and DenseNet-121 with 122 needed
some 110 MiB, U-Net with 14 between 53 and 65 MiB, ResNet-18 and ConvNeXt-T nothing."""
RETURNING = Fragmentation(step_percent=10)
"""Loss of the C library if it gives freed blocks back."""
ROUNDING = Fragmentation(step_percent=3)
"""Loss of the project's own allocator, which keeps blocks: it hands out whole pages, and small blocks still
come from the C library. Its holes only cost time."""
_KERNELS, _CODE, _PRODUCTS = (
    "compiled kernels",
    "address space of compiled code",
    "buffers of matrix products",
)


@dataclass(frozen=True, kw_only=True)
class CpuBackend(Backend):
    """Host memory, which ``RLIMIT_DATA`` limits: address space counts, touched or not.

    oneDNN compiles kernels for every shape of a convolution's operands, so for every shape of a stage's
    tiles, and keeps the last thousand of them. A convolution reorders operands, weights and result into
    blocked layouts, as its declared cost says.
    """

    kernel_bytes: int
    """Bytes kept for every compiled kernel, with the code that is touched."""
    code_bytes: int
    """Bytes of address space of a kernel's code, which count until the step that compiled it is over."""
    matrix_bytes: int
    """Bytes of address space of the buffers of one matrix product."""
    runtime_bytes: int = RUNTIME_BYTES
    reusable_bytes: int = 2**25
    """glibc's largest threshold: blocks from this size on always go back to the operating system."""
    keeping: Fragmentation = KEEPING
    returning: Fragmentation = RETURNING
    fragmentation: str = "allocator waste"
    converts_halves: bool = False
    """Whether a matrix product in half precision takes copies in float32 of what it reads and gives."""
    has_choice: bool = True
    beside_tensors: frozenset[str] = frozenset((_KERNELS, _CODE, _PRODUCTS))
    fuses_attention: bool = False
    prefers_bands: bool = False

    @classmethod
    def on(cls, num_threads: int, *, keeps_blocks: bool = False) -> Self:
        """The backend where operators run on ``num_threads`` threads.

        With ``keeps_blocks`` tensors come from blocks that are kept and counted outside the C library.

        Kernels took 100 KB for one forward, and 180 to 290 KB for the three of a differentiated convolution,
        on maps of 21 x 21 to 40 x 30 (torch 2.13, AVX-512). MKL keeps its buffers until they are freed at a
        step's end. It takes separate buffers for every size of product, mostly never touched: on 2 threads
        9.2 MB for one linear layer and 28 MB for three, on 8 threads 36 MB for one, and little more for the
        gradients of such layers. Copies in float32 were seen on a processor with AVX-512 and no arithmetic of
        bfloat16, and none on one that has it.
        """
        libraries = cls(
            kernel_bytes=3 * 2**15,
            code_bytes=2**20,
            matrix_bytes=5 * 2**20 * num_threads,
            converts_halves=not torch.cpu._is_avx512_bf16_supported(),
        )
        if not keeps_blocks:
            return libraries
        return replace(libraries, returning=ROUNDING, has_choice=False, keeps_blocks=True)

    def converted(self, cost: Cost, nbytes: CallBytes) -> int:
        """Bytes in float32 of what a product in half precision reads and gives."""
        if not self.converts_halves or not nbytes.is_half or cost.routine is not Routine.MATRIX_PRODUCT:
            return 0
        return 2 * (nbytes.operands + nbytes.weights + nbytes.result)

    def step_terms(self, num_kernels: int, num_products: int) -> tuple[MemoryTerm, ...]:
        """Terms of compiled code and buffers, which stop counting at the step's end."""
        return (
            MemoryTerm(_CODE, num_kernels * self.code_bytes),
            MemoryTerm(_PRODUCTS, num_products * self.matrix_bytes),
        )

    def kept(self, num_kernels: Ints, *, training: bool) -> HeldBytes:
        """Bytes of kernels; backward, two more are compiled for each, for operand and weight gradients."""
        so_far = num_kernels.cumsum()
        differentiated = so_far[-1] - so_far + num_kernels if training else 0 * num_kernels

        def of_kernels(compiled: Ints) -> LevelBytes:
            nbytes = self.kernel_bytes * np.minimum(compiled, CACHED_KERNELS)
            return LevelBytes.of(len(nbytes), (_KERNELS, nbytes))

        backward = of_kernels(so_far[-1] + 2 * differentiated)
        return HeldBytes(of_kernels(so_far), segments=backward, backward=backward)
