"""Arithmetic without weights on arrays (B, frames, height, width, channels)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_vae_tiling.vae.blocks import PaddingMode, Stride
from mlx_vae_tiling.vae.regions import Reach, Region

PIXEL_NORM_EPS = 1e-8

SHARED_BYTES = 2**14
"""MLX's `contiguous` makes no copy where one would free no more than this; gathering always does."""


class Activation(NamedTuple):
    """Pixel norm, the timestep's shift and scale (B, 1, 1, 1, C) where there are any, SiLU."""

    shift: mx.array | None = None
    scale: mx.array | None = None

    @property
    def modulation(self) -> tuple[mx.array, mx.array] | None:
        """Shift and scale."""
        return None if self.shift is None or self.scale is None else (self.shift, self.scale)

    def __call__(self, x: mx.array) -> mx.array:
        return self.after_norm(pixel_norm(x))

    def after_norm(self, x: mx.array) -> mx.array:
        """What is done to single numbers, in one pass on a GPU."""
        if self.shift is None or self.scale is None:
            return nn.silu(x)
        return _modulated(x, self.shift, 1 + self.scale)


@mx.compile
def _modulated(x: mx.array, shift: mx.array, factor: mx.array) -> mx.array:
    x = x * factor + shift
    return x * mx.sigmoid(x)


class Padding(NamedTuple):
    """What a convolution adds to its input: replicas in time, zeros or reflections in space."""

    frames: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    mode: PaddingMode

    @classmethod
    def between(cls, source: Region, output: Region, reach: Reach, mode: PaddingMode) -> Padding:
        """What `source` lacks of all that a 3x3x3 convolution for `output` sees."""
        frames, rows, columns = (
            (before - (wanted.start - inner.start), after - (inner.stop - wanted.stop))
            for inner, wanted, (before, after) in zip(source, output, (reach, (1, 1), (1, 1)), strict=True)
        )
        return cls(frames, rows, columns, mode)


def pixel_norm(x: mx.array) -> mx.array:
    """x / sqrt(mean over channels of x**2 + 1e-8), with statistics in float32."""
    return mx.fast.rms_norm(x, None, PIXEL_NORM_EPS)


def replicate(x: mx.array, frames: tuple[int, int]) -> mx.array:
    """Copies of the first frame before it and of the last one behind it."""
    before, after = frames
    return mx.concatenate([x[:, :1]] * before + [x] + [x[:, -1:]] * after, axis=1) if any(frames) else x


def reflect(x: mx.array, axis: int, amounts: tuple[int, int]) -> mx.array:
    """One position more before or after, or neither: the last but one, mirrored."""
    # Not mx.pad's own reflection, which wraps silently where an axis is too short.
    if not any(amounts):
        return x
    second, last_but_one = (mx.take(x, mx.array([i]), axis=axis) for i in (1, x.shape[axis] - 2))
    return mx.concatenate([second] * amounts[0] + [x] + [last_but_one] * amounts[1], axis=axis)


def mirrored(x: mx.array, rows: tuple[int, int], columns: tuple[int, int]) -> mx.array:
    """(B, T, H, W, C) with what lies beside each border mirrored beyond it: one copy, then the borders."""
    if not any(rows + columns):
        return x
    y = mx.pad(x, [(0, 0), (0, 0), rows, columns, (0, 0)])
    _, _, h, w, _ = x.shape
    vertical, horizontal = _reflections(rows, h), _reflections(columns, w)
    for target, source in vertical:
        y[:, :, target, columns[0] : columns[0] + w] = x[:, :, source]
    for target, source in horizontal:
        y[:, :, rows[0] : rows[0] + h, target] = x[:, :, :, source]
    for row_target, row in vertical:
        for target, source in horizontal:
            y[:, :, row_target, target] = x[:, :, row, source]
    return y


def _reflections(amounts: tuple[int, int], size: int) -> list[tuple[slice, slice]]:
    """Positions beyond the borders, and what is mirrored there; of both borders at once where steps allow."""
    if amounts == (1, 1) and size > 3:
        return [(slice(0, None, size + 1), slice(1, size - 1, size - 3))]
    before, after = amounts
    first, last = (slice(0, 1), slice(1, 2)), (slice(before + size, None), slice(size - 2, size - 1))
    return [first] * before + [last] * after


def surround(x: mx.array, rows: tuple[int, int], columns: tuple[int, int]) -> mx.array:
    """Rows and columns of zeros around every frame."""
    return mx.pad(x, [(0, 0), (0, 0), rows, columns, (0, 0)]) if any(rows + columns) else x


def depth_to_space(x: mx.array, stride: Stride) -> mx.array:
    """(B, T, H, W, C*t*h*w) to (B, T*t, H*h, W*w, C): channel (c, t, h, w) with w fastest."""
    b, frames, height, width, _ = x.shape
    t, h, w = stride
    x = x.reshape(b, frames, height, width, -1, t, h, w).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    # A single frame that becomes two could be a view of what it was.
    return mx.contiguous(x.reshape(b, frames * t, height * h, width * w, -1))


def unpatchify(x: mx.array, patch_size: int) -> mx.array:
    """(B, T, H, W, C*p*p) to (B, C, T, H*p, W*p): channel (c, column, row) with the row fastest."""
    b, frames, height, width, _ = x.shape
    p = patch_size
    x = x.reshape(b, frames, height, width, -1, p, p).transpose(0, 4, 1, 2, 6, 3, 5)
    return x.reshape(b, -1, frames, height * p, width * p)


def patchify(x: mx.array, patch_size: int) -> mx.array:
    """The inverse of `unpatchify`."""
    b, channels, frames, height, width = x.shape
    p = patch_size
    x = x.reshape(b, channels, frames, height // p, p, width // p, p).transpose(0, 2, 3, 5, 1, 6, 4)
    return x.reshape(b, frames, height // p, width // p, channels * p * p)


def cut(x: mx.array, parts: Sequence[slice], first_axis: int = 1) -> mx.array:
    """A part of an array, from an axis on, as a copy without the rest; all of it as it is."""
    narrowed = [axis for axis, part in enumerate(parts, first_axis) if part != slice(0, x.shape[axis])]
    if not narrowed:
        return x
    view = x[(slice(None),) * first_axis + tuple(parts)]
    if x.nbytes - view.nbytes > SHARED_BYTES:
        return mx.contiguous(view)
    return mx.take(view, mx.arange(view.shape[narrowed[0]]), axis=narrowed[0])
