"""Passes over a map on a GPU as Triton kernels, each of which reads and writes every element once.

A map (N, C, h, w) in channels last is a matrix of positions by channels. Each program of a kernel sums over
the positions that it visits; then the programs' sums are added, always in the same order. Kernels compute in
float32, or in float64 for maps of that dtype.

Importing this module imports Triton, so :mod:`streamcnn.graph.ops.channel_kernels` imports it only on a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamcnn.graph.ops.activations import IDENTITY, Activation

_ELEMENTS = 2048
"""Elements of a block, which a program holds in registers: 16 for each of its threads."""
_CHANNELS = 64
"""Largest number of channels of a block: so many half-precision values are a cache line."""
_PROGRAMS = 8
"""Programs for each multiprocessor, where each program visits many blocks."""
_MERGED = {"PROGRAMS": 256, "CHANNELS": 8, "num_warps": 8}
"""Programs and channels of a block where moments are merged: few for each thread, whose steps wait for each
other."""


# --- kernels -----------------------------------------------------------------------------------------------
# Triton takes annotations for types of its own, so kernels have them for constants alone. They are given the
# number of positions, and that of channels as ``groups`` of ``ALIGNED``: so the compiler knows what divides
# it, and has each thread read 16 bytes at once.


@triton.jit
def _number(VALUE: tl.constexpr, v):
    """A number in the dtype of ``v``; alone, it is float32 where values are compared and selected."""
    return tl.full((1, 1), VALUE, v.dtype)


@triton.jit
def _activated(v, KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    # Comparisons with NaN are false, so NaN passes through.
    if KIND == "relu":
        v = tl.where(v <= 0, 0.0, v)
    elif KIND == "hardtanh":
        low, high = _number(LOW, v), _number(HIGH, v)
        v = tl.where(v < low, low, tl.where(v > high, high, v))
    elif KIND == "leaky_relu":
        v = tl.where(v > 0, v, v * LOW)
    elif KIND == "silu":
        v = v / (1.0 + tl.exp(-v))
    elif KIND == "hardswish":
        v *= tl.where(v < -3.0, 0.0, tl.where(v > 3.0, 6.0, v + 3.0)) / 6.0
    return v


@triton.jit
def _differentiated(g, v, KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The gradient ``g`` after the backward pass of an activation of ``v``."""
    if KIND == "relu":
        g = tl.where(v <= 0, 0.0, g)
    elif KIND == "hardtanh":
        g = tl.where((v <= _number(LOW, v)) | (v >= _number(HIGH, v)), 0.0, g)
    elif KIND == "leaky_relu":
        g = tl.where(v > 0, g, g * LOW)
    elif KIND == "silu":
        s = 1.0 / (1.0 + tl.exp(-v))
        g = g * s * (1.0 + v * (1.0 - s))
    elif KIND == "hardswish":
        g = tl.where(v <= -3.0, 0.0, tl.where(v < 3.0, g * (v / 3.0 + 0.5), g))
    return g


@triton.jit(do_not_specialize=["rows", "groups"])
def _normalise(
    x,
    mean,
    scale,
    shift,
    summand,
    result,
    rows,
    groups,
    KIND: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ADDS: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = groups * ALIGNED
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = channel < channels
    inside = (row < rows) & there
    place = row * channels + channel
    v = tl.load(x + place, inside).to(TYPE) - tl.load(mean + channel, there)
    v = v * tl.load(scale + channel, there) + tl.load(shift + channel, there)
    if ADDS:
        v += tl.load(summand + place, inside).to(TYPE)
    v = _activated(v, KIND, LOW, HIGH)
    tl.store(result + place, v.to(result.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "groups"])
def _differentiate(
    x,
    gradient,
    mean,
    scale,
    shift,
    result,
    sums,
    rows,
    groups,
    KIND: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = groups * ALIGNED
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = channel < channels
    middle = tl.load(mean + channel, there)
    factor = tl.load(scale + channel, there)
    offset = tl.load(shift + channel, there)
    total = tl.zeros((ROWS, CHANNELS), TYPE)
    product = tl.zeros((ROWS, CHANNELS), TYPE)
    for first in range(program * ROWS, rows, num_programs * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & there
        place = row * channels + channel
        v = tl.load(x + place, inside, 0.0).to(TYPE) - middle
        g = tl.load(gradient + place, inside, 0.0).to(TYPE)
        g = _differentiated(g, v * factor + offset, KIND, LOW, HIGH)
        tl.store(result + place, (g * factor).to(result.dtype.element_ty), inside)
        total += g
        # Beyond the last position the gradient is zero and the value finite.
        product += g * v
    at = sums + 2 * program * channels + channel
    tl.store(at, tl.sum(total, 0)[None, :], there)
    tl.store(at + channels, tl.sum(product, 0)[None, :], there)


@triton.jit(do_not_specialize=["rows", "groups"])
def _observe(
    x,
    moments,
    rows,
    groups,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = groups * ALIGNED
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = channel < channels
    # Differences from one of the channel's own values are small, and exact where it matters.
    pivot = tl.load(x + (program * ROWS * channels + channel), there, 0.0).to(TYPE)
    # For each row of the blocks by itself, by Welford's algorithm.
    count = tl.zeros((ROWS, 1), TYPE)
    mean = tl.zeros((ROWS, CHANNELS), TYPE)
    deviation = tl.zeros((ROWS, CHANNELS), TYPE)
    for first in range(program * ROWS, rows, num_programs * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        is_row = row < rows
        value = tl.load(x + (row * channels + channel), is_row & there, 0.0).to(TYPE) - pivot
        count += tl.where(is_row, 1.0, 0.0).to(TYPE)
        delta = tl.where(is_row, value - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)
        deviation += delta * (value - mean)
    number = tl.sum(count, 0)[None, :]
    middle = tl.sum(count * mean, 0)[None, :] / tl.maximum(number, 1.0)
    deviation += count * (mean - middle) * (mean - middle)
    at = moments + 4 * program * channels + channel
    tl.store(at, number + tl.zeros((1, CHANNELS), TYPE), there)
    tl.store(at + channels, pivot, there)
    tl.store(at + 2 * channels, middle, there)
    tl.store(at + 3 * channels, tl.sum(deviation, 0)[None, :], there)


@triton.jit(do_not_specialize=["programs", "channels"])
def _merge(moments, mean, variance, programs, channels, PROGRAMS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = channel < channels
    # For each row of the blocks by itself, by the formula of Chan, Golub and LeVeque (1979).
    number = tl.zeros((PROGRAMS, 1), tl.float64)
    middle = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    deviation = tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    for first in range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)[:, None]
        is_program = program < programs
        inside = is_program & there
        # All channels have as many values, so a thread divides once for its channels.
        count = tl.load(moments + 4 * program * channels, is_program, 0.0).to(tl.float64)
        at = moments + 4 * program * channels + channel
        pivot = tl.load(at + channels, inside, 0.0).to(tl.float64)
        delta = pivot + tl.load(at + 2 * channels, inside, 0.0) - middle
        number += count
        share = count / tl.maximum(number, 1.0)
        middle += delta * share
        deviation += tl.load(at + 3 * channels, inside, 0.0) + delta * delta * ((number - count) * share)
    total = tl.maximum(tl.sum(number, 0), 1.0)[None, :]
    whole = tl.sum(number * middle, 0)[None, :] / total
    deviation += number * (middle - whole) * (middle - whole)
    tl.store(mean + channel, whole.to(mean.dtype.element_ty), there)
    spread = tl.sum(deviation, 0)[None, :] / total
    tl.store(variance + channel, spread.to(variance.dtype.element_ty), there)


# --- what calls them ---------------------------------------------------------------------------------------

IS_INTERPRETED = not isinstance(_normalise, triton.JITFunction)
"""Whether Triton interprets kernels, as ``TRITON_INTERPRET=1`` has it do: on the host, block by block."""


def normalised(
    x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: Activation, summand: Tensor | None
) -> Tensor:
    """``activation((x - mean) * scale + shift + summand)``, rounded once.

    ``x`` and ``summand`` are dense and channels_last, and the result is a new map like ``x``; per-channel
    values (C,) are in the dtype of the computation.
    """
    grid, result = _Grid.of(x), torch.empty_like(x)
    with _on(x.device):
        _normalise[grid.blocks](
            *(x, mean, scale, shift, x if summand is None else summand, result),
            *(grid.rows, grid.groups),
            KIND=activation.kind,
            LOW=activation.low,
            HIGH=activation.high,
            ADDS=summand is not None,
            **grid.constants,
        )
    return result


def gradients(
    x: Tensor, gradient: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of :func:`normalised` without a summand; ``gradient`` has the layout of ``x``.

    Returns
    -------
    tuple of Tensor
        The gradient of ``x``, and for each channel (C,) the sum of the activation's input gradient, and of
        that times ``x - mean``.
    """
    grid, result = _Grid.of(x), torch.empty_like(x)
    programs = grid.walking(x.device)
    sums = scale.new_empty(programs, 2, grid.channels)
    with _on(x.device):
        _differentiate[programs, grid.blocks[1]](
            *(x, gradient, mean, scale, shift, result, sums),
            *(grid.rows, grid.groups),
            KIND=activation.kind,
            LOW=activation.low,
            HIGH=activation.high,
            **grid.constants,
        )
    total, product = sums.sum(0)
    return result, total, product


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of each channel of a dense channels_last map."""
    grid = _Grid.of(x)
    programs = grid.walking(x.device)
    found = torch.empty(programs, 4, grid.channels, dtype=grid.dtype, device=x.device)
    mean, variance = (found.new_empty(grid.channels) for _ in range(2))
    with _on(x.device):
        _observe[programs, grid.blocks[1]](x, found, grid.rows, grid.groups, **grid.constants)
        _merge[(triton.cdiv(grid.channels, _MERGED["CHANNELS"]),)](
            *(found, mean, variance, programs, grid.channels), **_MERGED, enable_fp_fusion=True
        )
    return mean, variance


def plus_line(total: Tensor, x: Tensor, mean: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """``total + slope * (x - mean) + offset`` in the dtype of ``x``; ``total`` has the layout of ``x``."""
    return normalised(x, mean, slope, offset, IDENTITY, total)


class _Grid(NamedTuple):
    """The division of a map among programs."""

    rows: int
    channels: int
    blocks: tuple[int, int]
    """Blocks along positions and along channels."""
    constants: dict[str, Any]
    """The compile-time constants of kernels."""

    @classmethod
    def of(cls, x: Tensor) -> _Grid:
        """The grid for a map (N, C, h, w)."""
        return _grid(x.numel() // x.shape[1], x.shape[1], x.dtype)

    @property
    def groups(self) -> int:
        """Number of groups of ``ALIGNED`` channels."""
        aligned: int = self.constants["ALIGNED"]
        return self.channels // aligned

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        return torch.float64 if self.constants["TYPE"] is tl.float64 else torch.float32

    def walking(self, device: torch.device) -> int:
        """Number of programs along positions that run at a time, where each visits many blocks."""
        down, across = self.blocks
        return max(1, min(down, _PROGRAMS * _multiprocessors(device) // across))


@lru_cache(1024)
def _grid(rows: int, channels: int, dtype: torch.dtype) -> _Grid:
    across = min(_CHANNELS, triton.next_power_of_2(channels))
    down = _ELEMENTS // across
    constants = {
        "TYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "ALIGNED": min(16, channels & -channels),
        "ROWS": down,
        "CHANNELS": across,
        # Explicit, since the default changes with Triton 3.10.
        "enable_fp_fusion": True,
    }
    return _Grid(rows, channels, (triton.cdiv(rows, down), triton.cdiv(channels, across)), constants)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        # Under Triton's interpreter, programs run one after another.
        return 1
    found: int = torch.cuda.get_device_properties(device).multi_processor_count
    return found


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
