"""Facts about a call from ATen's schemas: the operator's name, arguments by name, permutations of axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload


def operator_name(target: object) -> str:
    """The name of an ATen operator without its overload, such as ``"relu_"``; empty for anything else.

    Another library's operator of the same name may do something else.
    """
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return ""
    return name_in_library(target)


def name_in_library(target: OpOverload) -> str:
    """The name of an operator of any library, without namespace and overload."""
    name: str = target._schema.name.split("::")[1]
    return name


def names_a_collective(text: str) -> bool:
    """Whether a text, such as a call's name or a graph's code, names one of PyTorch's collectives."""
    return "c10d" in text


def in_place_form(target: Callable[..., Any]) -> OpOverload:
    """The in-place overload of a pointwise ATen operator; an in-place operator is its own."""
    assert isinstance(target, OpOverload)
    packet = getattr(torch.ops.aten, operator_name(target).removesuffix("_") + "_")
    found: OpOverload = getattr(packet, target._overloadname)
    return found


def bound(target: object, args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> list[Any]:
    """Values of the schema's arguments ``names``, defaults filled in."""
    assert isinstance(target, OpOverload)
    values = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(args):
            values[argument.name] = args[position]
        else:
            values[argument.name] = kwargs.get(argument.name, argument.default_value)
    return [values[name] for name in names]


def takes(target: object, name: str) -> bool:
    """Whether an operator's schema has an argument ``name``."""
    assert isinstance(target, OpOverload)
    return any(argument.name == name for argument in target._schema.arguments)


def with_argument(
    target: object, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments with another value for the schema's argument ``name``."""
    assert isinstance(target, OpOverload)
    place = next(i for i, argument in enumerate(target._schema.arguments) if argument.name == name)
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), dict(kwargs)
    return tuple(args), {**kwargs, name: value}


def places_of_axes(
    target: Callable[..., Any], ndim: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[int]:
    """The new place of each axis under a permutation; ``args`` are the arguments after the tensor."""
    # Axis d of the probe has d + 1 positions, so the result's shape tells where each axis went.
    probe = torch.empty(tuple(range(1, ndim + 1)), device="meta")
    after = list(target(probe, *args, **kwargs).shape)
    return [after.index(axis + 1) for axis in range(ndim)]
