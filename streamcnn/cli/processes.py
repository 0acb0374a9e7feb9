"""Commands that several processes of ``torchrun`` carry out together; one process does the same alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamcnn.training.processes import Processes


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the command's processes into a group for the block; only the first one prints warnings."""
    from streamcnn.support.processes import join, leave
    from streamcnn.training.processes import Processes

    join()
    processes = Processes.present()
    if not processes.is_first:
        warnings.simplefilter("ignore")  # they are the same as the first one's
    yield processes
    leave()
