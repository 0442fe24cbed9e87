"""The 3x3x3 convolution, in the form that suits each backend.

All forms share one contract: x (B, T+2, H+2, W+2, C), weight (O, 3, 3, 3, C) and bias (O,) give
the valid convolution (B, T, H, W, O) in the dtype of x. Padding is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae import convolution_gpu as gpu

ConvolutionForm = Literal["stock", "folded", "blocked", "numpy", "gemm", "winograd32", "winograd_time"]

CACHED_FLOATS = 2**16
"""Numbers that a block of shifted products touches: past a core's cache it is far slower."""

WORKSPACE_BYTES = 32 * 2**20
"""Bound of the im2col buffers that the CPU forms take, for one row of output at least."""


def convolve(x: mx.array, weight: mx.array, bias: mx.array, form: ConvolutionForm) -> mx.array:
    """Valid 3x3x3 convolution.

    Args:
        x: (B, T+2, H+2, W+2, C).
        weight: (O, 3, 3, 3, C).
        bias: (O,).
        form: "stock", "blocked", "numpy", or one of those in `convolution_gpu`.

    Returns:
        (B, T, H, W, O) in the dtype of x.
    """
    if form == "gemm" or form == "winograd32" or form == "winograd_time":
        return gpu.convolve(x, weight, bias, form)
    return FORMS[form](x, weight, bias)


def _stock(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.conv_general(x, weight) + bias


def _rows_per_block(x: mx.array) -> int:
    return max(1, WORKSPACE_BYTES // (4 * 27 * x.shape[-1] * (x.shape[3] - 2)))


def _blocked(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Blocks of rows, each evaluated before the next, so that im2col buffers stay small."""
    frames = []
    rows = _rows_per_block(x)
    for t in range(x.shape[1] - 2):
        blocks = []
        for start in range(0, x.shape[2] - 2, rows):
            blocks.append(_stock(x[:, t : t + 3, start : start + rows + 2], weight, bias))
            mx.eval(blocks[-1])
        frames.append(mx.concatenate(blocks, axis=2))
        mx.eval(frames[-1])
    return mx.concatenate(frames, axis=1)


def _numpy(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """NumPy's BLAS on MLX's buffers, without copies of either input or output in float32."""
    b, t, h, w, c = x.shape
    x32, weight32, bias32 = (mx.contiguous(a.astype(mx.float32)) for a in (x, weight, bias))
    mx.eval(x32, weight32, bias32)
    out = mx.zeros((b, t - 2, h - 2, w - 2, weight.shape[0]))
    mx.eval(out)
    multiply = _multiply_shifts if max(c, len(weight)) <= 32 else _multiply_columns
    with np.errstate(over="ignore", invalid="ignore"):  # whoever decodes looks at the frames
        multiply(*(np.array(a, copy=False) for a in (x32, weight32, bias32, out)))
    return out.astype(x.dtype)


def _multiply_columns(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """im2col for blocks of rows."""
    b, t, h, w, c = x.shape
    matrix = weight.reshape(len(weight), -1).T
    taps = np.lib.stride_tricks.sliding_window_view(x, (3, 3, 3), axis=(1, 2, 3)).transpose(
        0, 1, 2, 3, 5, 6, 7, 4
    )
    rows = max(1, WORKSPACE_BYTES // (4 * 27 * c * (w - 2)))
    for n, f in np.ndindex(b, t - 2):
        for start in range(0, h - 2, rows):
            block = out[n, f, start : start + rows].reshape(-1, len(weight))
            np.matmul(taps[n, f, start : start + rows].reshape(-1, 27 * c), matrix, out=block)
            block += bias


def _multiply_shifts(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """A product per tap: with rows laid end to end, a tap is a shift of the flattened frames."""
    b, t, h, w, c = x.shape
    matrices = np.ascontiguousarray(weight.transpose(1, 2, 3, 4, 0))
    rows = max(1, CACHED_FLOATS // (w * (c + 2 * len(weight))))
    total = np.empty((rows * w, len(weight)), np.float32)
    product = np.empty_like(total)
    for n, f in np.ndindex(b, t - 2):
        frames = x[n, f : f + 3].reshape(3, h * w, c)
        for start in range(0, h - 2, rows):
            count = min(rows, h - 2 - start)
            size = count * w - 2
            total[:size] = bias
            for i, j, k in np.ndindex(3, 3, 3):
                offset = (start + j) * w + k
                np.matmul(frames[i, offset : offset + size], matrices[i, j, k], out=product[:size])
                total[:size] += product[:size]
            out[n, f, start : start + count] = total[: count * w].reshape(count, w, -1)[:, : w - 2]


def convolve_frames(x: mx.array, weight: mx.array, groups: int) -> mx.array:
    """Valid 3x3 convolution of single frames with NumPy's BLAS, as `_numpy`.

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
            view[n, f, start : start + rows, :, g * made : (g + 1) * made] = product.reshape(*part.shape[:2], -1)
    return out.astype(x.dtype)


FORMS: dict[ConvolutionForm, Callable[[mx.array, mx.array, mx.array], mx.array]] = {
    "stock": _stock,
    "blocked": _blocked,
    "numpy": _numpy,
    "folded": partial(gpu.convolve, form="folded"),
}
