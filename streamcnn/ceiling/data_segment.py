"""The kernel's limit on the process's data segment: the lowest of several ceilings, or the user's own."""

from __future__ import annotations

import mmap
import sys

from streamcnn.ceiling.caps import LowestCap
from streamcnn.ceiling.children import watch_starts
from streamcnn.errors import StreamError


def own_data_limit() -> int:
    """The soft limit on the data segment that the user has set; ``sys.maxsize`` for none."""
    return data_caps.own


def soft_limit() -> int:
    """The soft limit on the data segment now; ``sys.maxsize`` for none."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _set_soft_limit(soft: int) -> None:
    """Set the soft limit on the data segment; the hard limit stays."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY if soft == sys.maxsize else soft, hard))


data_caps = LowestCap(soft_limit, _set_soft_limit)
"""The ceilings of all entered blocks."""
watch_starts(data_caps.begin_start)


def is_enforced() -> bool:
    """Whether the kernel refuses a mapping as large as the limit, which other threads may move meanwhile."""
    while True:
        limit = soft_limit()
        if _is_refused(limit):
            return True
        if limit == soft_limit():
            return False


def _is_refused(nbytes: int) -> bool:
    """Whether the kernel refuses a mapping of ``nbytes``; old and emulated ones ignore the limit."""
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return True
    mapping.close()
    return False


def not_enforced() -> StreamError:
    """The error to raise where the kernel does not enforce a limit."""
    return StreamError(
        f"budget= cannot be enforced for host memory on this platform ({sys.platform}): that needs a "
        "Linux kernel with /proc and RLIMIT_DATA; run on Linux or on a GPU, or pass budget=None to "
        "run without a ceiling"
    )
