"""Write a module's maps to files piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from streamcnn.capture.forward_pass import ForwardPass, stand_in
from streamcnn.data.map_files import check_place, write_map
from streamcnn.data.reader import Image
from streamcnn.data.sources import ImageSource, as_sources
from streamcnn.data.sources.placement import Placement
from streamcnn.errors import DatasetMismatch, UnsupportedModel
from streamcnn.geometry.regions import Region
from streamcnn.stores import MemoryStore, Store, StoreSpec

Output = Literal["values", "classes", "softmax", "sigmoid"]
Key = str | int | None
_BYTES = 255
"""The byte for a probability of 1."""


class Predicting(nn.Module):
    """A module whose result is turned into the map to write.

    Parameters
    ----------
    net
        The module.
    output
        ``"values"`` for the result as it is; ``"classes"`` for the index of the largest channel, or, of one
        channel, whether it is positive; ``"softmax"`` and ``"sigmoid"`` for probabilities as bytes, 255
        being 1.
    key
        Name or index of the result to take, of several; ``None`` if there is only one.
    dtype
        Element type of ``"values"``.
    """

    def __init__(self, net: nn.Module, output: Output, key: Key, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = net
        self.output = output
        self.key = key
        self.dtype = dtype

    def forward(self, image: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The map (N, C, H, W) to write for a whole image."""
        result = self.net(image, *args, **kwargs)
        scores = result if self.key is None else _at(result, self.key)
        if not isinstance(scores, Tensor):
            raise _no_map("is one of several: key= says which" if self.key is None else "is none")
        if scores.dim() != 4:
            raise _no_map(f"has shape {tuple(scores.shape)}")
        if self.output == "values":
            return scores.to(self.dtype)
        if self.output == "classes":
            classes = scores > 0 if scores.shape[1] == 1 else scores.argmax(1, keepdim=True)
            # Stored maps have no uint16.
            return classes.to(torch.uint8 if scores.shape[1] <= 256 else torch.int32)
        if self.output == "softmax" and scores.shape[1] == 1:
            raise UnsupportedModel("the softmax of the model's one channel is 1 everywhere: take sigmoid")
        chances = torch.softmax(scores, 1) if self.output == "softmax" else torch.sigmoid(scores)
        return (chances * _BYTES).round().to(torch.uint8)


def _at(result: Any, key: str | int) -> Any:
    """The part of a module's result under a key.

    Raises
    ------
    UnsupportedModel
        If there is none.
    """
    if isinstance(result, Tensor):
        raise UnsupportedModel(f"the model's result is one tensor, and key={key!r} is given: leave key= out")
    try:
        return result[key]
    except (KeyError, IndexError, TypeError) as error:
        known = f": it has {', '.join(map(repr, result))}" if isinstance(result, Mapping) else ""
        raise UnsupportedModel(
            f"the model's result is a {type(result).__name__}, which has no key={key!r}{known}"
        ) from error


@dataclass(slots=True)
class PredictionCalls:
    """The captured calls of one module, by output, key and element type."""

    _known: dict[tuple[Output, Key, torch.dtype], tuple[Predicting, ForwardPass]] = field(
        default_factory=dict
    )

    def of(
        self, net: nn.Module, output: Output, key: Key, dtype: torch.dtype
    ) -> tuple[Predicting, ForwardPass]:
        """The module that turns the result of ``net`` into such a map, and its captured calls.

        Raises
        ------
        ValueError
            If ``output`` or ``dtype`` is not allowed.
        """
        if output not in get_args(Output):
            raise ValueError(f"output={output!r}: allowed are {', '.join(map(repr, get_args(Output)))}")
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"dtype={dtype}: allowed are torch.float32 and torch.float16")
        place = (output, key, dtype)
        if place not in self._known:
            self._known[place] = Predicting(net, output, key, dtype), ForwardPass()
        return self._known[place]


class MapWriter:
    """Writes the map of one image to ``place``.

    Raises
    ------
    CannotWrite
        If something is at ``place`` already and must not be overwritten.
    DatasetMismatch
        If ``image`` is not exactly one.
    """

    def __init__(
        self, place: Path, image: Image, *, overwrite: bool, class_names: Sequence[str] | None
    ) -> None:
        check_place(place, overwrite=overwrite)
        _require_one_image(image)
        self._place = place
        self._image = image
        self._class_names = class_names
        self._is_written = False

    def keep(self, store: Store) -> Tensor:
        """Write a stored map, and return a stand-in for it as the module's result."""
        found = _as_stored_map(store)
        placement = _placement_of(self._image).of_map(found.shape[1:])
        write_map(self._place, found, placement, class_names=self._class_names)
        self._is_written = True
        return stand_in(store.spec.shape, store.spec.dtype, torch.device("cpu"))

    def finished(self, result: Tensor) -> Path:
        """Write the map now if the pass has returned it whole, and return its path."""
        if not self._is_written:
            self.keep(_whole_map(result))
        return self._place


class StoredMap(ImageSource):
    """The map (1, C, H, W) in a store as an image (C, H, W)."""

    def __init__(self, store: Store) -> None:
        _, *shape = store.spec.shape
        kinds = {torch.int32: torch.uint16}
        dtype = kinds.get(store.spec.dtype, store.spec.dtype)
        super().__init__((shape[0], shape[1], shape[2]), dtype)
        self._store = store

    def _read(self, region: Region) -> Tensor:
        return self._store.read(region)[0].cpu().to(self.dtype)


def _as_stored_map(store: Store) -> StoredMap:
    """A stored result as the map to write.

    Raises
    ------
    UnsupportedModel
        If the result is not the map (1, C, H, W) of one image.
    """
    shape, axes = store.spec.shape, store.spec.axes
    if len(shape) != 4 or shape[0] != 1 or axes != (2, 3):
        raise _no_map(f"has shape {shape}")
    return StoredMap(store)


def _no_map(found: str) -> UnsupportedModel:
    return UnsupportedModel(f"the model's result {found}: allowed is a map (1, C, H, W) of one image")


def _require_one_image(image: Image) -> None:
    """Check the number of images before one is read.

    Raises
    ------
    DatasetMismatch
        If there are several, or none.
    """
    count = len(image) if isinstance(image, Tensor) else len(as_sources(image))
    if count != 1:
        raise DatasetMismatch(f"a map of one image is written, and {count} are given: call it for each image")


def _placement_of(image: Image) -> Placement:
    """The placement of one image's pixels in space."""
    if isinstance(image, Tensor):
        return Placement((image.shape[2], image.shape[3]))
    return as_sources(image)[0].placement


def _whole_map(result: Tensor) -> Store:
    """A store of a result that was made whole, as by an operator without a rule.

    Raises
    ------
    UnsupportedModel
        If the result does not have four axes.
    """
    if result.dim() != 4:
        raise _no_map(f"has shape {tuple(result.shape)}")
    store = MemoryStore(StoreSpec(tuple(result.shape), result.dtype, (2, 3)), torch.device("cpu"))
    store.write(Region.whole(store.spec.size), result)
    return store


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put all parts of a module in eval mode without gradients, and restore their modes afterwards."""
    training: Sequence[nn.Module] = [module for module in net.modules() if module.training]
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
