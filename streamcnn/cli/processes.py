"""Commands that ``torchrun`` has several processes carry out together; one process does the same alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamcnn.training.processes import Processes


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of the command, together in the block; warnings are the first one's alone."""
    from streamcnn.support.processes import join, leave
    from streamcnn.training.processes import Processes

    join()
    processes = Processes.present()
    if not processes.is_first:
        warnings.simplefilter("ignore")  # the first one's are the same
    yield processes
    leave()
