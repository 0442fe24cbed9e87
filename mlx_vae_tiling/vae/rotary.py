"""Rotary positions: pairs of channels turned by where a query or a key lies in the video."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.regions import Region, Stride

ROTARY_BASE = 10000.0


def rotary_split(head_dim: int) -> Stride:
    """Channels of a head that are rotated by the position in time, height and width."""
    time = head_dim // 4 // 2 * 2
    if (head_dim - time) // 2 % 2:
        time -= 2
    return time, (head_dim - time) // 2, (head_dim - time) // 2


def rotary_factors(region: Region, head_dim: int) -> tuple[mx.array, mx.array]:
    """Cosines and sines (T, H, W, 1, D/2) of the angles of absolute positions, in float32."""
    t, h, w = (span.length for span in region)
    angles = []
    for axis, (span, width) in enumerate(zip(region, rotary_split(head_dim), strict=True)):
        frequencies = (1 / ROTARY_BASE ** (np.arange(0, width, 2) / width)).astype(np.float32)
        values = np.arange(span.start, span.stop, dtype=np.float32)[:, None] * frequencies
        shape = [1, 1, 1, 1, width // 2]
        shape[axis] = span.length
        angles.append(mx.broadcast_to(mx.array(values).reshape(shape), (t, h, w, 1, width // 2)))
    joined = mx.concatenate(angles, axis=-1)
    return mx.cos(joined), mx.sin(joined)


def rotated(x: mx.array, factors: tuple[mx.array, mx.array]) -> mx.array:
    """Rotates neighbouring channels of x (B, T, H, W, heads, D) in pairs, in float32."""
    cosines, sines = factors
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([even * cosines - odd * sines, even * sines + odd * cosines], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
