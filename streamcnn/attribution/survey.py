"""A survey of the shapes that a model's layers return for an image of some size, without computing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.data.reader import BatchReader, Image
from streamcnn.errors import UnsupportedModel, some
from streamcnn.runtime.fake_result import captured_result, fake_result
from streamcnn.runtime.streaming_model import StreamingModel


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """The output of one layer."""

    shape: tuple[int, ...] | None
    """Shape of the tensor that its last call returned; None if that was not a tensor."""
    num_calls: int
    """Number of calls of the layer in a forward pass."""

    @property
    def is_map(self) -> bool:
        """Whether the output is a map (N, C, h, w) with more than one row and more than one column."""
        return self.shape is not None and len(self.shape) == 4 and min(self.shape[2:]) > 1


@dataclass(frozen=True, slots=True)
class Survey:
    """The outputs of all layers in a forward pass."""

    layers: Mapping[str, LayerOutput]
    """Outputs by qualified name, in the order in which the layers return."""
    output: Any
    """The model's result, with fake tensors."""

    @property
    def last_map(self) -> str:
        """The layer that returns a map last: the default for Grad-CAM.

        Raises
        ------
        UnsupportedModel
            If there is none.
        """
        maps = self._maps()
        if not maps:
            raise UnsupportedModel("no layer of the model returns a map (N, C, h, w): Grad-CAM needs one")
        return maps[-1]

    def map_shape(self, layer: str) -> tuple[int, int, int, int]:
        """The shape (N, C, h, w) of the map that a layer returns.

        Raises
        ------
        ValueError
            If there is no such layer, it is not called just once, or returns no map; the text names others.
        """
        if layer not in self.layers:
            near = difflib.get_close_matches(layer, self.layers, n=5, cutoff=0.4) or self._maps()[-5:]
            raise ValueError(f"the model calls no layer {layer!r}: allowed are such as {some(near)}")
        found = self.layers[layer]
        if found.num_calls != 1:
            raise ValueError(
                f"layer {layer!r} is called {found.num_calls} times in a forward pass: allowed are layers "
                f"that are called once, such as {some(self._maps()[-5:])}"
            )
        if not found.is_map:
            what = "no tensor" if found.shape is None else f"a tensor of shape {found.shape}"
            raise ValueError(
                f"layer {layer!r} returns {what}: allowed are layers that return a map (N, C, h, w) with "
                f"more than one row and column, such as {some(self._maps()[-5:])}"
            )
        assert found.shape is not None
        n, c, h, w = found.shape
        return n, c, h, w

    def _maps(self) -> list[str]:
        return [name for name, found in self.layers.items() if found.is_map and found.num_calls == 1]


def survey(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, args: Iterable[Any] = ()) -> Survey:
    """Survey the layers of ``net`` for an image of ``shape`` (N, C, H, W), without running or changing it.

    Parameters
    ----------
    args
        Further arguments of the module after the image.

    Raises
    ------
    UnsupportedModel
        If the model fails for such an image.
    """
    outputs: dict[str, list[Any]] = {}

    def watch(bare: nn.Module) -> None:
        for name, module in bare.named_modules():
            if name:
                module.register_forward_hook(partial(_note, outputs, name))

    args = tuple(args)
    output = fake_result(net, shape, dtype, args, prepare=watch)
    # A hook may change what the model returns.
    known = captured_result(net, shape, dtype, args)
    output = output if known is None else known
    layers = {name: LayerOutput(_shape(calls[-1]), len(calls)) for name, calls in outputs.items()}
    return Survey(layers, output)


def survey_of(model: StreamingModel, inputs: Image, args: Iterable[Any] = ()) -> Survey:
    """Survey a streaming model's layers for images as they are after ``preprocess``.

    Raises
    ------
    DatasetMismatch, UnsupportedModel
        If ``inputs`` are not a batch of images, or the model fails for them.
    """
    reader = BatchReader(inputs, model.computing_device(), model.preprocess)
    return survey(model.net, reader.shape, reader.dtype, args)


def name_of(net: nn.Module, layer: nn.Module | str) -> str:
    """The qualified name of a layer of ``net``.

    Raises
    ------
    ValueError
        If the module is not one of its layers.
    """
    if isinstance(layer, str):
        return layer
    names: dict[nn.Module, str] = {module: name for name, module in net.named_modules() if name}
    if layer in names:
        return names[layer]
    raise ValueError(f"this {type(layer).__name__} is no layer of the model: allowed are its own modules")


def _note(
    outputs: dict[str, list[Any]], name: str, _module: nn.Module, _args: tuple[Any, ...], output: Any
) -> None:
    outputs.setdefault(name, []).append(output)


def _shape(output: Any) -> tuple[int, ...] | None:
    return tuple(output.shape) if isinstance(output, Tensor) else None
