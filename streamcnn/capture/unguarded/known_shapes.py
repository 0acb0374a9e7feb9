"""Functions whose result's shape depends on values, for values that are known while tracing.

Examples are a mask in a buffer that picks channels (``x[:, self.mask]``), and the indices of non-zero entries
of a pruned parameter. The indices found become a constant of this pass, with a known shape. Tensors used as
numbers, as in ``x[:, :, box[0] : box[2]]``, become numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from streamcnn.capture.unguarded.known_values import called_on_values
from streamcnn.graph.entries import assigned, indexed
from streamcnn.graph.whole import beside_the_trace

_SELECT = frozenset({torch.masked_select, Tensor.masked_select})
_REPEAT = frozenset({torch.repeat_interleave, Tensor.repeat_interleave})
_WHERE = frozenset({torch.where, Tensor.where})
_FIND = frozenset(
    getattr(place, name)
    for place in (torch, Tensor, F)
    for name in ("nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "one_hot")
    if hasattr(place, name)
)
"""Functions without a gradient, which are worked out if all that they are given is known."""
_BY_ENTRIES = {Tensor.__getitem__: indexed, Tensor.__setitem__: assigned}
"""What stands for functions where they are given indices whose values are not known."""


@dataclass(frozen=True, slots=True)
class KnownShapes:
    """Carries out such functions while a pass is traced."""

    values_of: Callable[[Tensor], Tensor | None]
    """Gives the values of a traced tensor, or None if they are not known."""
    constant: Callable[[Tensor], Tensor]
    """Gives the traced tensor that stands for a tensor with values."""

    def call(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Carry out a call on traced tensors, if its result's shape depends on values and these are known.

        Returns
        -------
        Any
            The result; ``NotImplemented`` if the call is to be traced like any other.
        """
        if function is Tensor.__getitem__:
            return self._indexed(*args, **kwargs)
        if function is torch.combinations:
            return self._combined(*args, **kwargs)
        if function in _SELECT:
            return self._selected(*args, **kwargs)
        if function in _REPEAT:
            return self._repeated(*args, **kwargs)
        if function in _FIND or (function in _WHERE and len(args) + len(kwargs) == 1):
            found = called_on_values(function, args, kwargs, self.values_of)
            return pytree.tree_map_only(Tensor, self.constant, found)
        return NotImplemented

    def with_numbers(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Carry out a call that may use tensors as numbers, such as ``x[:, first:last]`` and ``narrow``.

        Raises
        ------
        DataDependentOutputException
            If it needs the value of a tensor that is not known.
        """
        try:
            return function(*args, **kwargs)
        except DataDependentOutputException as error:
            numbered = self._numbered(args), {name: self._numbered(kwargs[name]) for name in kwargs}
            by_entries = _BY_ENTRIES.get(function, function)
            try:
                return by_entries(*numbered[0], **numbered[1])
            except (DataDependentOutputException, TypeError):
                raise error from None

    def _numbered(self, value: Any) -> Any:
        """``value`` with tensors of up to one axis replaced by numbers where their values are known."""
        if isinstance(value, slice):
            return slice(*map(self._numbered, (value.start, value.stop, value.step)))
        if type(value) in (tuple, list):
            return type(value)(map(self._numbered, value))
        if not isinstance(value, Tensor) or value.dim() > 1:
            return value
        known = self.values_of(value)
        return value if known is None else _beside_the_trace(known.tolist)

    def _indexed(self, x: Tensor, index: Any) -> Any:
        """``x[index]``, with masks replaced by the indices that they pick."""
        parts = list(index) if isinstance(index, tuple) else [index]
        masks = [(place, mask) for place, each in enumerate(parts) if (mask := self._mask(each)) is not None]
        for place, mask in reversed(masks):
            parts[place : place + 1] = self._places(mask, x.device)
        return self.with_numbers(Tensor.__getitem__, (x, tuple(parts)), {}) if masks else NotImplemented

    def _mask(self, index: Any) -> Tensor | None:
        """The values of an index that is a mask; None if it is not one, or they are not known."""
        if isinstance(index, Tensor):
            is_mask = index.dtype in (torch.bool, torch.uint8) and index.dim() > 0
            return self.values_of(index) if is_mask else None
        is_list = isinstance(index, list) and bool(index) and all(isinstance(each, bool) for each in index)
        is_array = isinstance(index, np.ndarray) and index.dtype == np.bool_ and index.ndim > 0
        return _beside_the_trace(torch.tensor, index) if is_list or is_array else None

    def _selected(self, input: Tensor, mask: Tensor) -> Any:
        """``input.masked_select(mask)``."""
        values = self.values_of(mask)
        if values is None:
            return NotImplemented
        shape = torch.broadcast_shapes(input.shape, values.shape)  # type: ignore[no-untyped-call]
        mask = _beside_the_trace(values.expand, shape)
        return input.expand(shape)[tuple(self._places(mask, input.device))]

    def _combined(self, input: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
        """``torch.combinations``, which by itself picks them by a mask."""
        places = self._constants(
            lambda: torch.combinations(torch.arange(input.shape[0], device=input.device), r, with_replacement)
        )
        return input[places]

    def _repeated(
        self, input: Tensor, repeats: Any = None, dim: int | None = None, *, output_size: int | None = None
    ) -> Any:
        """``input.repeat_interleave(repeats, dim)`` with a count for each slice."""
        times = input if repeats is None else repeats
        values = self.values_of(times) if isinstance(times, Tensor) else None
        if values is None:
            return NotImplemented
        if repeats is None:
            return self._constants(torch.repeat_interleave, values)
        slices, axis = (input.flatten(), 0) if dim is None else (input, dim)
        each = _beside_the_trace(values.expand, slices.shape[axis])
        order = self._constants(torch.repeat_interleave, each)
        return slices.index_select(axis, order)

    def _places(self, mask: Tensor, device: torch.device) -> list[Tensor]:
        """The indices along each axis where a mask is true, on ``device``."""
        return list(self._constants(lambda: mask.to(device).nonzero(as_tuple=True)))

    def _constants(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a function of real values, as constants in the trace."""
        return pytree.tree_map_only(Tensor, self.constant, _beside_the_trace(function, *args, **kwargs))


def _beside_the_trace(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with beside_the_trace():
        return function(*args, **kwargs)
