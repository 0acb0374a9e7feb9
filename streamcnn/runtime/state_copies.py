"""Copy many small tensors at once, since on a GPU each copy would be a launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping

import torch
from torch import Tensor, nn


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors by name, without gaps; copies of one type and device share one piece of memory."""
    found: dict[str, Tensor] = {}
    for names in _alike(tensors, lambda name: _kind(tensors[name])):
        each = [tensors[name].detach() for name in names]
        if len(each) == 1:
            found[names[0]] = each[0].clone()
            continue
        parts = torch.split(torch.cat([one.flatten() for one in each]), [one.numel() for one in each])
        found.update({name: part.view_as(one) for name, part, one in zip(names, parts, each, strict=True)})
    return found


def assign(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy each of ``values`` into the target of its name."""
    with torch.no_grad():
        for names in _alike(values, lambda name: (_kind(targets[name]), _kind(values[name]))):
            if len(names) == 1:
                targets[names[0]].copy_(values[names[0]])
            else:
                torch._foreach_copy_([targets[name] for name in names], [values[name] for name in names])


def _alike(names: Iterable[str], kind: Callable[[str], Hashable]) -> list[list[str]]:
    """Names grouped by kind."""
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(kind(name), []).append(name)
    return list(groups.values())


def _kind(tensor: Tensor) -> Hashable:
    """A key that is equal for tensors that can be copied together; tensor subclasses are copied alone."""
    is_plain = type(tensor) in (Tensor, nn.Parameter)
    return (tensor.device, tensor.dtype) if is_plain else id(tensor)
