"""Fourier transforms along one axis or several, each carried out axis by axis.

Along a spatial axis, a tile holds whole rows or columns. A transform over both (FNet, global filters, fast
Fourier convolution) is one of all rows, which is stored, and then one of all columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.geometry.axis_maps import Line, Same
from streamcnn.graph.costs import NOTHING, Cost, declare
from streamcnn.graph.ops.padding import roll
from streamcnn.graph.ops.pointwise import per_position
from streamcnn.graph.ops.rules import Call, NotStreamable, Sample, Tracer, rule
from streamcnn.graph.ops.samples import chain
from streamcnn.graph.program import Access, Ref

aten = torch.ops.aten

_ALONG_ONE = (
    aten.fft_fft.default,
    aten.fft_ifft.default,
    aten.fft_rfft.default,
    aten.fft_irfft.default,
    aten.fft_hfft.default,
    aten.fft_ihfft.default,
)
_ALL_COMPLEX = {
    aten.fft_fft2.default: aten.fft_fft.default,
    aten.fft_fftn.default: aten.fft_fft.default,
    aten.fft_ifft2.default: aten.fft_ifft.default,
    aten.fft_ifftn.default: aten.fft_ifft.default,
}
"""Transforms over several axes, with that of each."""
_FROM_REAL = (aten.fft_rfft2.default, aten.fft_rfftn.default)
"""Real transforms of the last axis, then complex ones of the others."""
_TO_REAL = (aten.fft_irfft2.default, aten.fft_irfftn.default)
"""Complex inverses of all axes but the last, then a real one of that."""


@rule(*_ALONG_ONE, *_ALL_COMPLEX, *_FROM_REAL, *_TO_REAL)
def transform(tracer: Tracer, call: Call) -> Ref | NotStreamable:
    """A Fourier transform or its inverse, of real or complex values."""
    ref = call.args[0]
    if tracer.axes(ref) is None:
        return NotStreamable("its operands have their spatial axes at different places")
    found: Ref = ref
    for each in _along_each(call, len(tracer.spec(ref).shape)):
        found = _along(tracer, Call(each.target, (found, *each.args[1:]), each.kwargs))
    return found


def _along_each(call: Call, ndim: int) -> list[Call]:
    """The transforms along one axis that make up a call, in order."""
    if call.target in _ALONG_ONE:
        return [call]
    sizes, dims, norm = call.bind("s", "dim", "norm")
    if dims is None:
        dims = range(ndim) if sizes is None else range(ndim - len(sizes), ndim)
    counts = [None] * len(dims) if sizes is None else [None if size == -1 else size for size in sizes]
    along = list(zip(counts, dims, strict=True))
    if call.target in _ALL_COMPLEX:
        targets: list[Any] = [_ALL_COMPLEX[call.target]] * len(along)
    elif call.target in _FROM_REAL:
        along.reverse()
        targets = [aten.fft_rfft.default, *[aten.fft_fft.default] * (len(along) - 1)]
    else:
        targets = [*[aten.fft_ifft.default] * (len(along) - 1), aten.fft_irfft.default]
    return [
        Call(target, (None, count, dim, norm), {})
        for target, (count, dim) in zip(targets, along, strict=True)
    ]


def _along(tracer: Tracer, call: Call) -> Ref:
    """A transform along one axis."""
    ref, dim = call.bind("self", "dim")
    shape, axes = tracer.spec(ref).shape, tracer.axes(ref) or ()
    rows, cols = (Line(shape[axis]) if axis == dim % len(shape) else Same() for axis in axes)
    return per_position(tracer, call, ref, access=Access(rows, cols), heavy=True)


@rule(aten.fft_fftshift.default, aten.fft_ifftshift.default)
def shift(tracer: Tracer, call: Call) -> Any:
    """The frequency 0 in the middle of each axis, or back at its start."""
    ref, dims = call.bind("self", "dim")
    shape = tracer.spec(ref).shape
    dims = list(range(len(shape)) if dims is None else dims)
    is_back = call.target is aten.fft_ifftshift.default
    shifts = [(shape[dim] + is_back) // 2 for dim in dims]
    return roll(tracer, Call(aten.roll.default, (ref, shifts, dims), {}))


declare(
    *(aten.fft_fft, aten.fft_ifft, aten.fft_rfft, aten.fft_irfft, aten.fft_hfft, aten.fft_ihfft),
    # Operands and results of the library in its order of axes, and real values as complex ones.
    cost=Cost(
        workspace=lambda nbytes: 2 * nbytes.operands + 2 * nbytes.result,
        backward_workspace=lambda nbytes: 3 * (nbytes.operands + nbytes.result),
        saves=NOTHING,
    ),
)


class _Fourier(nn.Module):
    """A filter of frequencies, a convolution of them, and transforms of other axes."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        # There are no transforms of bfloat16.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        spectrum = torch.fft.rfft2(x, norm="ortho")
        channels = torch.cat((spectrum.real, spectrum.imag), 1).relu()
        filtered = torch.complex(*channels.chunk(2, 1))
        y: Tensor = torch.fft.irfft2(filtered, s=size, norm="ortho")
        y = y + torch.fft.fftn(x, dim=(1, 3)).real.sin() + torch.fft.fftshift(x.cos(), (2, 3))
        return y


SAMPLES = (Sample("Fourier transforms", lambda: chain(nn.Conv2d(3, 4, 3), _Fourier())),)
