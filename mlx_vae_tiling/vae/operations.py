"""Operations without weights on chunks (B, frames, height, width, channels)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_vae_tiling.vae.backend import current_backend
from mlx_vae_tiling.vae.blocks import PaddingMode, Stride
from mlx_vae_tiling.vae.streaming import Region

PIXEL_NORM_EPS = 1e-8


def pixel_norm(x: mx.array) -> mx.array:
    """x / sqrt(mean over channels of x**2 + 1e-8), with statistics in float32."""
    return mx.fast.rms_norm(x, None, PIXEL_NORM_EPS)


def computed(x: mx.array) -> mx.array:
    """x, computed at once on the CPU, so that its inputs can go and the peak depends on no thread's luck."""
    if current_backend() == "cpu":
        mx.eval(x)
    return x


def activate(x: mx.array, modulation: tuple[mx.array, mx.array] | None) -> mx.array:
    """Pixel norm, the timestep's (shift, scale) where there is one, SiLU."""
    if current_backend() != "cpu":
        return _activate(x, modulation)
    # The CPU's norm takes several copies of its input, in float32: here, of one frame.
    frames = [computed(_activate(x[:, i : i + 1], modulation)) for i in range(x.shape[1])]
    return computed(mx.concatenate(frames, axis=1))


def _activate(x: mx.array, modulation: tuple[mx.array, mx.array] | None) -> mx.array:
    x = pixel_norm(x)
    if modulation is not None:
        shift, scale = modulation
        x = x * (1 + scale) + shift
    return nn.silu(x)


def pad_spatially(x: mx.array, source: Region, output: Region, padding: PaddingMode) -> mx.array:
    """Adds the rows and columns that a convolution needs around `output` and `source` lacks."""
    rows, columns = (
        (inner.start - wanted.start + 1, wanted.stop + 1 - inner.stop)
        for inner, wanted in ((source.height, output.height), (source.width, output.width))
    )
    if padding == "zeros":
        return mx.pad(x, [(0, 0), (0, 0), rows, columns, (0, 0)]) if any(rows + columns) else x
    for axis, (before, after) in ((2, rows), (3, columns)):
        # Not mx.pad's own reflection, which wraps silently where an axis is too short.
        second, last_but_one = (mx.take(x, mx.array([i]), axis=axis) for i in (1, x.shape[axis] - 2))
        x = computed(mx.concatenate([second] * before + [x] + [last_but_one] * after, axis=axis))
    return x


def crop_spatially(x: mx.array, source: Region, output: Region) -> mx.array:
    return x[:, :, output.height.inside(source.height), output.width.inside(source.width)]


def depth_to_space(x: mx.array, stride: Stride) -> mx.array:
    """(B, T, H, W, C*t*h*w) to (B, T*t, H*h, W*w, C): channel (c, t, h, w) with w fastest."""
    b, frames, height, width, _ = x.shape
    t, h, w = stride
    x = x.reshape(b, frames, height, width, -1, t, h, w).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, frames * t, height * h, width * w, -1)


def unpatchify(x: mx.array, patch_size: int) -> mx.array:
    """(B, T, H, W, C*p*p) to (B, C, T, H*p, W*p): channel (c, column, row) with the row fastest."""
    b, frames, height, width, _ = x.shape
    p = patch_size
    x = x.reshape(b, frames, height, width, -1, p, p).transpose(0, 4, 1, 2, 6, 3, 5)
    return x.reshape(b, -1, frames, height * p, width * p)
