"""Recognise errors that mean refused memory: by the kernel, by a GPU's allocator or by a library."""

from __future__ import annotations

import errno

import torch

_OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",  # a tensor, on Linux
    "DefaultCPUAllocator: not enough memory",  # the same elsewhere
    "std::bad_alloc",  # any other memory of PyTorch or oneDNN, such as packed bfloat16 weights
    "could not create a memory object",  # oneDNN: a reordered tensor
    "can't start new thread",  # Python: a thread's stack
)
_ONEDNN_PRIMITIVE = "could not create a primitive"
"""oneDNN: code or scratch memory of an operator. Longer texts that begin so mean *not supported*."""

_CUDA_OUT_OF_MEMORY_TEXTS = (
    "CUDA error: out of memory",  # memory that PyTorch's allocator does not hand out, such as pinned buffers
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",  # a kernel's code
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",  # the same in cuDNN 9, and of host memory
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    # cuDNN tried every algorithm of a convolution, and each was refused its workspace.
    "was unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm to run convolution",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is what Python, NumPy, PyTorch or its libraries raise when memory is refused."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and (
        text == _ONEDNN_PRIMITIVE
        or any(known in text for known in (*_OUT_OF_MEMORY_TEXTS, *_CUDA_OUT_OF_MEMORY_TEXTS))
    )
