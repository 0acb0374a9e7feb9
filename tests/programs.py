"""Random programs, without a module or a tensor: maps, windows, reductions and global values."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from streamcnn.geometry.axis_maps import AxisMap, Broadcast, Repeated, Same, Sliding, Transposed
from streamcnn.graph.ops.reduction_types import Sum
from streamcnn.graph.program import Access, Kind, Local, Node, Program, Ref, TensorSpec

CHANNELS = 4


def _spec(size: tuple[int, int], channels: int = CHANNELS) -> TensorSpec:
    return TensorSpec((1, channels, *size), torch.float32)


@st.composite
def _axis(draw: st.DrawFn, size: int) -> tuple[AxisMap, int]:
    """An axis map and the extent of its output."""
    choice = draw(st.integers(0, 2))
    if choice == 0:
        kernel, stride, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
        reach = dilation * (kernel - 1) + 1
        padding = draw(st.integers(max(0, (reach - size + 1) // 2), 4))
        return Sliding(kernel, stride, padding, dilation), (size + 2 * padding - reach) // stride + 1
    if choice == 1:
        kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        return Transposed(kernel, stride, 0, 1), (size - 1) * stride + kernel
    factor, reach = draw(st.integers(1, 2)), draw(st.integers(0, 1))
    return Repeated(factor, reach), size * factor


class _Growing:
    """A program to which nodes are being added."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.nodes = {"image": Node("image", Kind.IMAGE, None, (), {}, _spec(size), axes=(2, 3))}

    def add(self, kind: Kind, spec: TensorSpec, operands: tuple[str, ...], **fields: object) -> str:
        name = f"{kind.value}_{len(self.nodes)}"
        args = tuple(Ref(operand) for operand in operands)
        self.nodes[name] = Node(name, kind, None, args, {}, spec, **fields)
        return name

    def local(
        self,
        size: tuple[int, int],
        accesses: dict[str, Access],
        small: tuple[str, ...] = (),
        heavy: bool = True,
        **rules: Any,
    ) -> str:
        local = Local(accesses, heavy=heavy, **rules)
        return self.add(Kind.LOCAL, _spec(size), (*accesses, *small), axes=(2, 3), local=local)

    def maps(self) -> list[str]:
        return [name for name, node in self.nodes.items() if node.is_map]


@st.composite
def programs(draw: st.DrawFn, max_nodes: int = 9) -> Program:
    """A random program in which every result is read, reduced or returned."""
    growing = _Growing((draw(st.integers(3, 40)), draw(st.integers(3, 40))))
    for _ in range(draw(st.integers(1, max_nodes))):
        maps = growing.maps()
        # The latest maps more often, so that chains are long.
        name = maps[-draw(st.integers(1, min(3, len(maps))))]
        size = growing.nodes[name].size
        choice = draw(st.sampled_from(["window", "window", "pointwise", "join", "gate", "broadcast"]))
        if choice == "window" and max(size) < 60:
            (rows, height), (cols, width) = draw(_axis(size[0])), draw(_axis(size[1]))
            slides = all(isinstance(axis, Sliding) for axis in (rows, cols))
            rules = {"fill": 0.0} if slides else {"positional": draw(st.booleans())}
            growing.local((height, width), {name: Access(rows, cols)}, **rules)
        elif choice == "join":
            partners = [other for other in maps if growing.nodes[other].size == size]
            other = draw(st.sampled_from(partners))
            growing.local(size, {name: Access(), other: Access()}, heavy=False)
        elif choice == "gate":
            shape = growing.nodes[name].tensor.shape
            reduced = growing.add(
                Kind.REDUCTION,
                TensorSpec((1, CHANNELS), torch.float32),
                (name,),
                reduction=Sum(shape, (2, 3), False),
            )
            small = growing.add(Kind.GLOBAL, TensorSpec((1, CHANNELS), torch.float32), (reduced,))
            growing.local(size, {name: Access()}, (small,), heavy=False)
        elif choice == "broadcast":
            row = growing.local((1, size[1]), {name: Access(rows=Sliding(size[0]))})
            growing.local(size, {name: Access(), row: Access(rows=Broadcast())}, heavy=False)
        else:
            growing.local(size, {name: Access(Same(), Same())}, heavy=False)
    return _finished(growing)


def _finished(growing: _Growing) -> Program:
    """The program, which returns whole all values that nothing reads."""
    read = {name for node in growing.nodes.values() for name in node.operands}
    ends = [name for name in growing.maps() if name not in read]
    results = [
        growing.add(Kind.GATHER, growing.nodes[name].tensor, (name,))
        for name in ends
        if growing.nodes[name].kind is Kind.LOCAL
    ]
    return Program(
        nodes=growing.nodes,
        image="image",
        states={},
        maps={},
        outputs=tuple(Ref(name) for name in results),
        updates={},
        constants={},
    )
