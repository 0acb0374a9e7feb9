"""What goes into a module beside the image: sources are stood in for, and read by regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from streamcnn.capture.capture import named_arguments
from streamcnn.capture.forward_pass import stand_in
from streamcnn.data.map_reader import MapReader
from streamcnn.data.sources import ImageSource


@dataclass(frozen=True, slots=True, eq=False)
class Arguments:
    """Arguments of a call after the image, a tensor without memory in the place of each source.

    A source, or a list of sources as a batch, may be anywhere among them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    maps: Mapping[str, MapReader]
    """What is read by regions, by the key of its argument."""
    passed: Mapping[int, Any]
    """The same as it was passed, by the identity of what stands in for it."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device) -> Arguments:
        """The arguments of a call that computes on ``device``.

        Raises
        ------
        DatasetMismatch
            If sources of a list are no batch.
        """
        readers: dict[int, MapReader] = {}
        passed: dict[int, Any] = {}

        def stood_in(value: Any) -> Any:
            if not _is_map(value):
                return value
            reader = MapReader(value, device)
            tensor = stand_in(reader.shape, reader.dtype, device)
            readers[id(tensor)], passed[id(tensor)] = reader, value
            return tensor

        # One by one: the arguments together are no batch.
        args = tuple(pytree.tree_map(stood_in, each, is_leaf=_is_map) for each in args)
        named = pytree.tree_map(stood_in, dict(kwargs), is_leaf=_is_map)
        keys = {key: id(tensor) for key, tensor in named_arguments((args, named))}
        maps = {key: readers[place] for key, place in keys.items() if place in readers}
        return cls(args, named, maps, passed)

    def restored(self, result: Any) -> Any:
        """What a module returns, sources that it returns being those that were passed."""
        if not self.passed:
            return result
        return pytree.tree_map(lambda each: self.passed.get(id(each), each), result)


def _is_map(value: Any) -> bool:
    """Whether it is a source, or a batch of them."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(each, ImageSource) for each in value)
    return isinstance(value, ImageSource)
