"""Sizes in nested arguments: to PyTorch's pytree they are nodes, and a mapped one is a plain tuple.

``x.new(size)`` makes a tensor of that size, and of a tuple one that holds its numbers. So sizes are leaves.
"""

from __future__ import annotations

import torch


def is_size(value: object) -> bool:
    """Whether a value is a ``torch.Size``; for ``is_leaf`` in functions of pytrees."""
    return isinstance(value, torch.Size)
