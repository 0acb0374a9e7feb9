"""A module's arguments beside the image, with stand-ins for sources, which are read by regions."""

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
from streamcnn.support.sizes import is_size


@dataclass(frozen=True, slots=True, eq=False)
class Arguments:
    """The arguments of a call after the image, with a tensor without memory in place of each source.

    A source, or a list of sources as a batch, may be anywhere among the arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    maps: Mapping[str, MapReader]
    """Readers of the sources, by the key of their argument."""
    passed: Mapping[int, Any]
    """The sources as they were passed, by the identity of their stand-ins."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device) -> Arguments:
        """The arguments of a call that computes on ``device``.

        Raises
        ------
        DatasetMismatch
            If the sources in a list do not make a batch.
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

        def without_sources(value: Any) -> Any:
            # A list or dict without sources is passed as it is: the module may put something into it.
            leaves = pytree.tree_leaves(value, is_leaf=_is_map)
            return pytree.tree_map(stood_in, value, is_leaf=_is_map) if any(map(_is_map, leaves)) else value

        # One by one: a tuple of arguments is not a batch.
        args = tuple(map(without_sources, args))
        named = {name: without_sources(value) for name, value in kwargs.items()}
        keys = {key: id(tensor) for key, tensor in named_arguments((args, named))}
        maps = {key: readers[place] for key, place in keys.items() if place in readers}
        return cls(args, named, maps, passed)

    def restored(self, result: Any) -> Any:
        """The result of a module, with the sources themselves in place of their stand-ins."""
        if not self.passed:
            return result
        return pytree.tree_map(lambda each: self.passed.get(id(each), each), result, is_leaf=is_size)


def _is_map(value: Any) -> bool:
    """Whether ``value`` is a source, or a batch of sources."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(each, ImageSource) for each in value)
    return isinstance(value, ImageSource)
