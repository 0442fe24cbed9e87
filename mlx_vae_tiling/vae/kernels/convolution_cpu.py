"""The 3x3x3 convolution on the CPU: NumPy's BLAS on MLX's buffers, in the form that suits the shape.

The CPU wheel of MLX for Linux is linked to a reference BLAS, NumPy's to a fast one. Which form computes
a frame, and in which pieces, depends on its height, width and channels and never on the number of
frames, so that a frame's bytes do not depend on its company.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.blocks import PaddingMode
from mlx_vae_tiling.vae.kernels import winograd
from mlx_vae_tiling.vae.kernels.numbers import numbers
from mlx_vae_tiling.vae.kernels.rows import Activation, Rows, row_buffers
from mlx_vae_tiling.vae.kernels.winograd_kernel import TILE_HEIGHT, TILE_WIDTH
from mlx_vae_tiling.vae.kernels.workers import share
from mlx_vae_tiling.vae.kernels.workspace import Shape, Workspace, bytes_of

CpuForm = Literal["columns", "shifts", "winograd"]
Job = tuple[int, int]
"""A frame, and its first row of those that are computed at once."""

Multiply = Callable[[Sequence[Job], Sequence[np.ndarray]], None]
"""Does jobs, with the buffers of one worker."""

CACHED_FLOATS = 2**16
"""Numbers that a block of shifted products touches: past a core's cache it is far slower."""

WORKSPACE_BYTES = 32 * 2**20
"""Bound of the im2col buffer, for one row of output at least."""

WINOGRAD_TILES = 32
"""Tiles that a frame needs for its matrices to be worth transforming the kernel's."""


def choose_form(height: int, width: int, in_channels: int, out_channels: int) -> CpuForm:
    """The form that is expected to be the fastest for an output (height, width).

    Up to 32 channels, copying 27 values per product costs more than the product. With few positions
    the time goes into reading the kernel, of which Winograd's matrices are 2.7 times as large.
    """
    if max(in_channels, out_channels) <= 32:
        return "shifts"
    tiles = height // TILE_HEIGHT * (width // TILE_WIDTH)
    return "winograd" if tiles >= WINOGRAD_TILES else "columns"


def workspace_bytes(
    form: CpuForm, frames: int, height: int, width: int, in_channels: int, out_channels: int, workers: int = 1
) -> int:
    """Bytes that `convolve_rows` takes outside MLX for (frames, height, width) outputs."""
    if form == "winograd":
        return winograd.workspace_bytes(frames, height, width, in_channels, out_channels, workers=workers)
    common, own = _shapes(form, height, width, in_channels, out_channels)
    return bytes_of(*common, *own * min(workers, len(_jobs(frames, height, own))))


def convolve_rows(
    rows: Rows,
    weight: np.ndarray,
    bias: np.ndarray,
    out: np.ndarray,
    *,
    form: CpuForm | None = None,
    residual: np.ndarray | None = None,
    workspace: Workspace | None = None,
    workers: int = 1,
) -> None:
    """Valid convolution of frames in float32.

    Args:
        rows: T+2 frames of (H+2, W+2, C), padding included.
        weight: (O, 3, 3, 3, C).
        bias: (O,).
        out: (T, H, W, O), contiguous: the result.
        form: How to compute; by default what `choose_form` says.
        residual: (T, H, W, O), added to the result.
        workspace: Where to compute; by default a new one.
        workers: Threads that compute; more than one is for a BLAS with one thread.
    """
    _, height, width, outputs = out.shape
    form = form or choose_form(height, width, weight.shape[-1], outputs)
    workspace = workspace or Workspace()
    if form == "winograd":
        winograd.convolve(
            *(rows, weight, bias, out),
            residual=residual,
            workspace=workspace,
            workers=workers,
        )
        return
    common, own = _shapes(form, height, width, weight.shape[-1], outputs)
    jobs = _jobs(len(out), height, own)
    shared, buffers = workspace.share_out(min(workers, len(jobs)), own, common)
    multiply = _columns if form == "columns" else _shifts
    share(multiply(rows, weight, bias, out, *shared), jobs, buffers)
    if residual is not None:
        out += residual


def convolve_numpy(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    *,
    replicas: tuple[int, int] = (0, 0),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    mode: PaddingMode = "zeros",
    activation: Activation = "none",
    modulation: tuple[mx.array, mx.array] | None = None,
    residual: mx.array | None = None,
    form: CpuForm | None = None,
    workspace: Workspace | None = None,
    workers: int = 1,
) -> mx.array:
    """3x3x3 convolution of what activation and padding make of x, in one pass from x to the result.

    Nothing is copied but rows that are at work, and the kernel in half precision, in which what goes in
    and what comes out are rounded, and nothing between.

    Args:
        x: (B, t, h, w, C).
        weight: (O, 3, 3, 3, C).
        bias: (O,).
        replicas: Copies of the first frame before it, of the last behind it, which make T+2 frames.
        padding: Rows above and below, columns left and right that are added: 0 or 1 each.
        mode: What is added: zeros, or the frame reflected.
        activation: "norm_silu" for pixel norm, modulation, SiLU.
        modulation: (shift, scale), each (B, 1, 1, 1, C) or (1, 1, 1, 1, C).
        residual: (B, T, H, W, O), added to the result.
        form: How to compute; by default what `choose_form` says.
        workspace: Where to compute; by default a new one.
        workers: Threads that compute; more than one is for a BLAS with one thread.

    Returns:
        (B, T, H, W, O) in the dtype of x, computed.
    """
    b, t, h, w, _ = x.shape
    (before, after), (top, bottom, left, right) = replicas, padding
    given = numbers(x)
    weight32, bias32 = _as_numpy(weight, bias)
    out = mx.zeros((b, before + t + after - 2, h + top + bottom - 2, w + left + right - 2, len(weight)))
    mx.eval(out)
    result = np.array(out, copy=False)
    pairs = None if modulation is None else _as_numpy(*(m.reshape(len(m), -1) for m in modulation))
    skip = None if residual is None else _as_numpy(residual)[0]
    workspace = workspace or Workspace()
    for i in range(b):
        own = None if pairs is None else (pairs[0][i % len(pairs[0])], pairs[1][i % len(pairs[1])])
        frames = [given[i][0]] * before + list(given[i]) + [given[i][-1]] * after
        convolve_rows(
            *(Rows(frames, padding, mode, activation, own), weight32, bias32, result[i]),
            residual=None if skip is None else skip[i],
            form=form,
            workspace=workspace,
            workers=workers,
        )
    # Rounded by whoever evaluates it, when what went in is gone.
    return out.astype(x.dtype)


def _as_numpy(*arrays: mx.array) -> list[np.ndarray]:
    """Float32 arrays, on MLX's buffers where they are of that type."""
    return [np.array(a.astype(mx.float32), copy=False) for a in arrays]


def _shapes(
    form: CpuForm, height: int, width: int, in_channels: int, out_channels: int
) -> tuple[list[Shape], list[Shape]]:
    """Of what all workers have in common, and of what each has, of which the last holds rows at once."""
    if form == "columns":
        rows = min(height, max(1, WORKSPACE_BYTES // (4 * 27 * in_channels * width)))
        return [], [*row_buffers(rows + 2, width + 2, in_channels), (rows, width, 3, 3, 3, in_channels)]
    padded = width + 2
    rows = min(height, max(1, CACHED_FLOATS // (padded * (in_channels + 2 * out_channels))))
    total = (rows, padded, out_channels)
    return [(27, in_channels, out_channels)], [*row_buffers(rows + 2, padded, in_channels), total, total]


def _jobs(frames: int, height: int, own: list[Shape]) -> list[Job]:
    return list(itertools.product(range(frames), range(0, height, own[-1][0])))


def _columns(rows: Rows, weight: np.ndarray, bias: np.ndarray, out: np.ndarray) -> Multiply:
    """im2col for blocks of rows."""
    _, height, _, outputs = out.shape
    matrix = weight.reshape(outputs, -1).T

    def multiply(jobs: Sequence[Job], buffers: Sequence[np.ndarray]) -> None:
        read, scratch, taps = buffers
        for t, start in jobs:
            stop = min(start + len(taps), height)
            block = taps[: stop - start]
            for i in range(3):
                x = rows.read(t + i, start, stop + 2, read, scratch)
                windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(0, 1))
                block[:, :, i] = windows.transpose(0, 1, 3, 4, 2)
            y = out[t, start:stop].reshape(-1, outputs)
            np.matmul(block.reshape(len(y), -1), matrix, out=y)
            y += bias

    return multiply


def _shifts(
    rows: Rows, weight: np.ndarray, bias: np.ndarray, out: np.ndarray, matrices: np.ndarray
) -> Multiply:
    """A product per tap: with rows laid end to end, a tap is a shift of the flattened frames."""
    _, height, width, outputs = out.shape
    padded, channels = width + 2, weight.shape[-1]
    matrices[...] = weight.reshape(outputs, 27, channels).transpose(1, 2, 0)

    def multiply(jobs: Sequence[Job], buffers: Sequence[np.ndarray]) -> None:
        read, scratch, *sums = buffers
        total, product = (array.reshape(-1, outputs) for array in sums)
        for t, start in jobs:
            stop = min(start + len(sums[0]), height)
            size = (stop - start) * padded - 2
            total[:size] = bias
            for i in range(3):
                x = rows.read(t + i, start, stop + 2, read, scratch).reshape(-1, channels)
                for j, k in np.ndindex(3, 3):
                    offset = j * padded + k
                    np.matmul(x[offset : offset + size], matrices[9 * i + 3 * j + k], out=product[:size])
                    total[:size] += product[:size]
            y = total[: (stop - start) * padded].reshape(stop - start, padded, outputs)
            out[t, start:stop] = y[:, :width]

    return multiply


def blocked(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """MLX's own convolution by blocks of rows, each evaluated before the next, for small im2col buffers."""
    frames = []
    rows = max(1, WORKSPACE_BYTES // (4 * 27 * x.shape[-1] * (x.shape[3] - 2)))
    for t in range(x.shape[1] - 2):
        blocks = []
        for start in range(0, x.shape[2] - 2, rows):
            part = mx.conv_general(x[:, t : t + 3, start : start + rows + 2], weight) + bias
            mx.eval(part)
            blocks.append(part)
        frames.append(mx.concatenate(blocks, axis=2))
        mx.eval(frames[-1])
    return mx.concatenate(frames, axis=1)
