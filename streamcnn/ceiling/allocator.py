"""Settings of the C library's and MKL's allocators, and of PyTorch's threads, for a process under a limit."""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from pathlib import Path
from threading import Thread

import torch

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_FRUGAL_THRESHOLD = 2**18
_REUSING_THRESHOLD = 2**25
"""The largest that glibc takes."""
_FRUGAL_TRIM = 2**17
_REUSING_TRIM = 2**30
"""Free bytes at the heap's end from which glibc gives them back. Its own 128 KiB would make reuse pointless,
since nearly every block freed there would go back to the kernel at once."""
_TASKS = Path("/proc/self/task")
_LONGEST_END = 0.1
"""Seconds to wait at most for the kernel to let go of a thread."""
_PARALLEL_GRAIN = 2**15
"""Elements from which PyTorch runs a pointwise operator on several threads."""


def set_mmap_threshold(*, reuse: bool = False) -> bool:
    """Make glibc take large blocks from the kernel and give them back when freed; whether that took effect.

    A block is large from 256 KiB on, or with ``reuse`` from 32 MiB on. Smaller blocks come from the heap.

    glibc's own threshold is 128 KiB at first, but rises to the size of any such block that is freed, up
    to 32 MiB. Tiles' tensors then come from its heap, whose holes fit the next tile badly. The table
    gives, for each threshold, the least budget in which four 3x3 and 1x1 convolutions ran forward and
    backward on 64-channel tiles of 77 to 256 pixels a side (blocks of 1 to 17 MB), and the time they
    took, on two virtual cores (torch 2.13, glibc 2.36):

    =========  ======  =======  =======  =======  ======  ======
    threshold  glibc   1 MiB    4 MiB    8 MiB    16 MiB  32 MiB
    =========  ======  =======  =======  =======  ======  ======
    budget     306 MB  156 MB   188 MB   197 MB   268 MB  334 MB
    time       1       1.5-1.7  1.5-1.7  1.5-1.7  1.1     1.0
    =========  ======  =======  =======  =======  ======  ======

    With 1 MiB, smaller blocks that networks of hundreds of phases keep (kernels, statistics) fragment the
    heap: DenseNet-121 at 400 x 900 held 25 MB free that no tensor fitted into. With 256 KiB it held 10 MB,
    and the update took 1 to 3 % longer. 128 KiB gained nothing more.

    The kernel takes the additional time to zero every page of a new block (2.7 million page faults instead
    of 0.2). The trim threshold and the number of arenas made no difference. The setting applies to the whole
    process and stays; with C libraries other than glibc nothing is set.
    """
    library = libc()
    if library is None:
        return False
    threshold, trim = (_REUSING_THRESHOLD, _REUSING_TRIM) if reuse else (_FRUGAL_THRESHOLD, _FRUGAL_TRIM)
    return bool(library.mallopt(_M_MMAP_THRESHOLD, threshold) and library.mallopt(_M_TRIM_THRESHOLD, trim))


def start_thread_pool() -> None:
    """Start the threads on which the calling thread's PyTorch operators run.

    OpenMP starts its threads at the first parallel operator, and ends the process if the kernel refuses a
    stack, so that must not happen under a limit. The first backward pass starts autograd's threads; builds of
    PyTorch with CUDA do so on machines without a GPU too.
    """
    torch.empty(2 * _PARALLEL_GRAIN * torch.get_num_threads(), dtype=torch.uint8).fill_(0)
    _start_autograd()


@functools.cache
def _start_autograd() -> None:
    """Run a first backward pass."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), requires_grad=True)
        torch.autograd.grad(2 * leaf, leaf)


def cache_thread_stack() -> None:
    """Run a thread, so that the C library keeps its stack for the next thread that starts.

    A stack (8 MiB) that exists when a limit is set does not count towards the limit.
    """
    thread = Thread(target=bool, name="streamcnn-stack", daemon=True)
    thread.start()
    thread.join()
    wait_for_stack(thread)


def wait_for_stack(thread: Thread) -> None:
    """Wait until the C library may reuse the stack of a thread that has been joined.

    It may once the kernel has released the thread, some 0.1 ms after ``join`` returns.
    """
    task = _TASKS / str(thread.native_id)
    until = time.monotonic() + _LONGEST_END
    while task.exists() and time.monotonic() < until:
        time.sleep(0)


def trim_heap() -> None:
    """Give the heap's free pages back to the kernel, so that they are not resident any more."""
    library = libc()
    if library is not None:
        library.malloc_trim(0)


def free_matrix_buffers() -> None:
    """Free the buffers that MKL keeps for matrix products, some 5 MB for each size and thread."""
    mkl = _mkl()
    if mkl is not None:
        mkl.mkl_serv_free_buffers()


@functools.cache
def _mkl() -> ctypes.CDLL | None:
    """PyTorch's CPU library, if it exports MKL's functions; else None."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    library = ctypes.CDLL(str(path)) if path.exists() else None
    return library if hasattr(library, "mkl_serv_free_buffers") else None


@functools.cache
def libc() -> ctypes.CDLL | None:
    """The C library if it is glibc, else None."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    library.malloc.restype = ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    return library
