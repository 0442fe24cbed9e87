"""The matrices of Winograd's filtering, and the kernel as the products need it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from mlx_vae_tiling.vae.kernels.workers import share
from mlx_vae_tiling.vae.kernels.workspace import Shape, part_of

TILE_HEIGHT, TILE_WIDTH = 4, 2
PRODUCTS = (TILE_HEIGHT + 2) * (TILE_WIDTH + 2)

KERNEL_FLOATS = 2**16
"""Transformed numbers of a kernel that are made at a time: within a core's cache."""

LINE_FLOATS = 16


def interpolation(points: tuple[float, ...], scales: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """Matrices of F(m, 3) by Toom and Cook: of the output (m, n), the kernel (n, 3) and the input (n, n).

    Args:
        points: n - 1 finite points; the last is infinity.
        scales: n factors that move from the input's matrix to the kernel's.
    """
    n = len(points) + 1
    output, kernel, inputs = np.zeros((n - 2, n)), np.zeros((n, 3)), np.zeros((n, n))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        inputs[i, : n - 1] = np.poly(others)[::-1]
        kernel[i] = point ** np.arange(3) / np.prod(point - others)
        output[:, i] = point ** np.arange(n - 2)
    inputs[-1], kernel[-1, -1], output[-1, -1] = np.poly(points)[::-1], 1, 1
    return output, kernel * np.array(scales)[:, None], inputs / np.array(scales)[:, None]


OUTPUT, KERNEL_HEIGHT, INPUT = interpolation((0, 11 / 16, -11 / 16, 3 / 2, -3 / 2), (1, 2, 2, 1, 1, 2))
KERNEL_WIDTH = np.array([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]])
OUTPUT, INPUT = OUTPUT.astype(np.float32), INPUT.astype(np.float32)
KERNEL = np.kron(KERNEL_HEIGHT, KERNEL_WIDTH).astype(np.float32)


def transform(weight: np.ndarray, out: np.ndarray, buffers: Sequence[np.ndarray]) -> None:
    """The kernel as matrices.

    Args:
        weight: (O, 3, 3, 3, C).
        out: (24, 3 * C, O) for the result: by product; tap in time and input channel; output channel.
        buffers: (9, n, O) of each worker, for n input channels at a time.
    """
    outputs, channels = len(weight), weight.shape[-1]
    taps = weight.reshape(outputs, 3, 9, channels).transpose(1, 2, 3, 0)
    split = out.reshape(PRODUCTS, 3, channels, outputs)
    step = max(1, KERNEL_FLOATS // (PRODUCTS * outputs))

    def work(jobs: Sequence[tuple[int, int]], buffer: np.ndarray) -> None:
        for t, c in jobs:
            part = taps[t, :, c : c + buffer.shape[1]]
            piece = part_of(buffer, part.shape)
            for o in range(0, outputs, LINE_FLOATS):  # of whole lines of cache, or it is read in vain
                piece[..., o : o + LINE_FLOATS] = part[..., o : o + LINE_FLOATS]
            for k in range(0, piece.shape[1], step):
                target = split[:, t, c + k : c + min(k + step, piece.shape[1])].reshape(PRODUCTS, -1)
                np.matmul(KERNEL, piece[:, k : k + step].reshape(9, -1), out=target)

    share(work, list(product(range(3), range(0, channels, buffers[0].shape[1]))), buffers)


def kernel_shapes(outputs: int, channels: int) -> list[Shape]:
    """Of the result of `transform`, and of a worker's buffer."""
    return [(PRODUCTS, 3 * channels, outputs), (9, min(channels, 4 * LINE_FLOATS), outputs)]
