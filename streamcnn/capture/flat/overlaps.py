"""Whether two views of one tensor share some elements, but not each with its counterpart.

What an operator that overwrites one and reads the other then computes depends on the order in which it goes
through memory: ATen refuses it only where that is easy to see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor


def overlap_in_part(written: Tensor, read: Tensor) -> bool:
    """Whether elements of ``written`` are elsewhere in ``read``, both views of the same memory.

    ``read`` is broadcast to ``written``. False also where that is not certain: for views whose axes have
    other strides, or overlap themselves.
    """
    lacking = written.dim() - read.dim()
    if lacking < 0 or read.numel() == 0:
        return False
    sizes, strides = (1,) * lacking + tuple(read.shape), (0,) * lacking + read.stride()
    # From the outermost to the innermost in memory.
    extents = {
        axis: (written.shape[axis], sizes[axis])
        for axis in sorted(range(written.dim()), key=written.stride, reverse=True)
        if max(written.shape[axis], sizes[axis]) > 1
    }
    if any(own > 1 and strides[axis] != written.stride(axis) for axis, (_, own) in extents.items()):
        return False
    steps = {axis: int(written.stride(axis)) for axis in extents}
    is_same = all(before == after for before, after in extents.values())
    return any(
        (any(move.values()) or not is_same)
        and all(-own < move[axis] < extent for axis, (extent, own) in extents.items())
        for move in _moves(int(read.storage_offset()) - int(written.storage_offset()), steps, extents)
    )


def _moves(
    distance: int, steps: Mapping[int, int], extents: Mapping[int, tuple[int, int]]
) -> Iterator[dict[int, int]]:
    """The ways to go a distance in memory in steps along axes, each shorter than the axis."""
    if not steps:
        if distance == 0:
            yield {}
        return
    (axis, step), *inner = steps.items()
    reach = sum(each * (max(extents[other]) - 1) for other, each in inner)
    if step <= reach:
        return
    for count in (distance // step, distance // step + 1):
        if abs(distance - count * step) <= reach:
            for rest in _moves(distance - count * step, dict(inner), extents):
                yield {axis: count, **rest}
