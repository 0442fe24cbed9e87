"""The 3x3 convolution of single frames on the CPU."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

WORKSPACE_BYTES = 2**24
"""Bound of the unfolded rows that are multiplied at a time, for one row of output at least."""


def convolve_frames(x: mx.array, weight: mx.array, groups: int) -> mx.array:
    """Valid 3x3 convolution of single frames with NumPy's BLAS on MLX's buffers.

    Args:
        x: (B, T, H+2, W+2, C).
        weight: (O, 3, 3, C / groups).
        groups: Into which the channels fall.

    Returns:
        (B, T, H, W, O) in the dtype of x.
    """
    b, t, h, w, c = x.shape
    x32, weight32 = (mx.contiguous(a.astype(mx.float32)) for a in (x, weight))
    mx.eval(x32, weight32)
    out = mx.zeros((b, t, h - 2, w - 2, weight.shape[0]))
    mx.eval(out)
    taps = np.lib.stride_tricks.sliding_window_view(np.array(x32, copy=False), (3, 3), axis=(2, 3))
    taps = taps.transpose(0, 1, 2, 3, 5, 6, 4)
    matrices = np.array(weight32, copy=False).reshape(groups, weight.shape[0] // groups, -1)
    view, inner, made = np.array(out, copy=False), c // groups, weight.shape[0] // groups
    rows = max(1, WORKSPACE_BYTES // (4 * 9 * inner * (w - 2)))
    for n, f, g in np.ndindex(b, t, groups):
        for start in range(0, h - 2, rows):
            part = taps[n, f, start : start + rows, ..., g * inner : (g + 1) * inner]
            product = part.reshape(-1, 9 * inner) @ matrices[g].T
            place = view[n, f, start : start + rows, :, g * made : (g + 1) * made]
            place[...] = product.reshape(place.shape)
    return out.astype(x.dtype)
