"""Channels to positions on the CPU, with the residual added on the way: one array is made and no other."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.blocks import Stride


def upsample_numpy(y: mx.array, skip: mx.array | None, stride: Stride, repeats: int = 1) -> mx.array:
    """Depth-to-space of y, plus that of the residual, whose channels are tiled.

    Args:
        y: (B, T, H, W, C*t*h*w) in float32, channel (c, t, h, w) with w fastest.
        skip: (B, T, H, W, C/repeats*t*h*w) in float32, or None.
        stride: (t, h, w).
        repeats: Of the residual's channels: A, B, A, B, ...

    Returns:
        (B, T*t, H*h, W*w, C), evaluated.
    """
    count = math.prod(stride)
    b, frames, height, width, channels = y.shape
    (t, h, w), channels = stride, channels // count
    out = mx.zeros((b, frames * t, height * h, width * w, channels))
    mx.eval(out)
    result = np.array(out, copy=False).reshape(b, frames, t, height, h, width, w, channels)
    coarse = (b, frames, height, width)
    given = np.array(y, copy=False).reshape(*coarse, repeats, -1, count)
    added = None if skip is None else np.array(skip, copy=False).reshape(*coarse, 1, -1, count)
    for n, (i, j, k) in enumerate(np.ndindex(stride)):
        target = result[:, :, i, :, j, :, k].reshape(*coarse, repeats, -1)
        if added is None:
            target[...] = given[..., n]
        else:
            with np.errstate(over="ignore", invalid="ignore"):  # whoever decodes looks at the frames
                np.add(given[..., n], added[..., n], out=target)
    return out
