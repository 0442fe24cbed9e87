"""The matrices of Winograd's filtering, and the kernel as the products need it."""

from __future__ import annotations

import math

import numpy as np

from mlx_vae_tiling.vae.kernels.workspace import Shape

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


def transform(
    weight: np.ndarray, *, out: np.ndarray | None = None, scratch: np.ndarray | None = None
) -> np.ndarray:
    """The kernel as matrices.

    Args:
        weight: (O, 3, 3, 3, C).
        out: (24, 3 * C, O) for the result, and
        scratch: (9, n, O) for n input channels at a time; by default both are new.

    Returns:
        (24, 3 * C, O): by product; tap in time and input channel; output channel.
    """
    outputs, channels = len(weight), weight.shape[-1]
    if out is None or scratch is None:
        out, scratch = (np.empty(shape, np.float32) for shape in kernel_shapes(outputs, channels))
    taps = weight.reshape(outputs, 3, 9, channels).transpose(1, 2, 3, 0)
    split = out.reshape(PRODUCTS, 3, channels, outputs)
    for t in range(3):
        for c in range(0, channels, scratch.shape[1]):
            part = taps[t, :, c : c + scratch.shape[1]]
            piece = part_of(scratch, part.shape)
            for o in range(0, outputs, LINE_FLOATS):  # of whole lines of cache, or it is read in vain
                piece[..., o : o + LINE_FLOATS] = part[..., o : o + LINE_FLOATS]
            step = max(1, KERNEL_FLOATS // (PRODUCTS * outputs))
            for k in range(0, piece.shape[1], step):
                target = split[:, t, c + k : c + min(k + step, piece.shape[1])].reshape(PRODUCTS, -1)
                np.matmul(KERNEL, piece[:, k : k + step].reshape(9, -1), out=target)
    return out


def kernel_shapes(outputs: int, channels: int) -> list[Shape]:
    return [(PRODUCTS, 3 * channels, outputs), (9, min(channels, 4 * LINE_FLOATS), outputs)]


def part_of(array: np.ndarray, shape: Shape) -> np.ndarray:
    """The beginning of a contiguous array as an array of another shape."""
    return array.reshape(-1)[: math.prod(shape)].reshape(shape)
