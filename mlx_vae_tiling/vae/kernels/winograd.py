"""3x3x3 convolution by Winograd's minimal filtering over height and width, in NumPy.

A tile of 4x2 outputs sees 6x4 positions of each of three frames. Transformed, a tap of the kernel
meets a position once, so that 24 products of matrices replace 72 over channels and frames: 9
multiplications per output, channel in and channel out where the plain sum takes 27. Over height it is
F(4,3) with the points 0, +-11/16, +-3/2 and infinity, which are the most accurate of those tried,
over width F(2,3). The error is about 1e-6 of the largest output; four by four outputs took 3e-6.

How a frame is cut depends on its shape and channels only, so that every product that makes it has the
same shape however many frames a call computes: a frame's bytes do not depend on its company.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_vae_tiling.vae.kernels.rows import Rows, row_buffers
from mlx_vae_tiling.vae.kernels.winograd_kernel import (
    INPUT,
    OUTPUT,
    PRODUCTS,
    TILE_HEIGHT,
    TILE_WIDTH,
    kernel_shapes,
    transform,
)
from mlx_vae_tiling.vae.kernels.workers import share
from mlx_vae_tiling.vae.kernels.workspace import Shape, Workspace, bytes_of, part_of

TILES_PER_BLOCK = 192
"""Rows of each matrix that is multiplied: with fewer BLAS is slower, with more the caches are."""

WEIGHT_BYTES = 24 * 2**20
"""Bound of the transformed weights of one pass, which are those of some output channels."""

FRAME_BYTES = 32 * 2**20
"""Bound of the transformed frames of one block of rows, for three frames at least."""


class Cut(NamedTuple):
    """How frames of one shape are cut.

    Args:
        blocks: Each the first and the past-the-last row of tiles.
        columns: Tiles in a row.
        outputs: Output channels of each pass; the last may have fewer.
    """

    blocks: tuple[tuple[int, int], ...]
    columns: int
    outputs: int

    @property
    def rows(self) -> int:
        """Rows of tiles of the largest block."""
        return max(stop - start for start, stop in self.blocks)


def cut(height: int, width: int, in_channels: int, out_channels: int) -> Cut:
    """Blocks of rows of tiles, of nearly equal size, and passes over output channels."""
    rows, columns = -(-height // TILE_HEIGHT), -(-width // TILE_WIDTH)
    tiles = min(TILES_PER_BLOCK, FRAME_BYTES // (3 * 4 * PRODUCTS * in_channels))
    count = -(-rows // max(1, tiles // columns))
    limits = [i * rows // count for i in range(count + 1)]
    passes = -(-4 * PRODUCTS * 3 * in_channels * out_channels // WEIGHT_BYTES)
    outputs = min(out_channels, -(-out_channels // (16 * passes)) * 16)
    return Cut(tuple(itertools.pairwise(limits)), columns, outputs)


def workspace_bytes(
    frames: int,
    height: int,
    width: int,
    in_channels: int,
    out_channels: int,
    *,
    workers: int = 1,
) -> int:
    """What `convolve` takes of its workspace for (frames, height, width) outputs."""
    shape = cut(height, width, in_channels, out_channels)
    together = _together(shape, frames, in_channels, workers)
    workers = min(workers, len(_jobs(shape, frames, together)))
    matrices, own = _shapes(shape, together, width, in_channels)
    return bytes_of(matrices, *own * workers)


def convolve(
    rows: Rows,
    weight: np.ndarray,
    bias: np.ndarray,
    out: np.ndarray,
    *,
    residual: np.ndarray | None = None,
    workspace: Workspace | None = None,
    workers: int = 1,
) -> None:
    """Valid convolution of frames.

    Args:
        rows: T+2 frames of (H+2, W+2, C), H at least 4.
        weight: (O, 3, 3, 3, C).
        bias: (O,).
        out: (T, H, W, O): the result.
        residual: (T, H, W, O), added to it.
        workspace: Where to compute; by default a new one.
        workers: Threads that compute, each with buffers of its own.
    """
    frames, height, width, out_channels = out.shape
    channels = weight.shape[-1]
    shape = cut(height, width, channels, out_channels)
    together = _together(shape, frames, channels, workers)
    jobs = _jobs(shape, frames, together)
    common, own = _shapes(shape, together, width, channels)
    (shared,), arrays = (workspace or Workspace()).share_out(min(workers, len(jobs)), own, [common])
    buffers = [_Buffers(*each) for each in arrays]
    for first in range(0, out_channels, shape.outputs):
        part = slice(first, min(first + shape.outputs, out_channels))
        matrices = part_of(shared, (PRODUCTS, 3 * channels, part.stop - part.start))
        transform(weight[part], matrices, [each.kernel for each in buffers])
        skip = None if residual is None else residual[..., part]
        work = _Pass(rows, matrices, bias[part], skip, out[..., part], shape.columns)
        share(work.do, jobs, buffers)


Job = tuple[tuple[int, int], int, int]


class _Buffers(NamedTuple):
    """What one worker writes: named after what is in it."""

    kernel: np.ndarray
    read: np.ndarray
    scratch: np.ndarray
    filtered: np.ndarray
    transformed: np.ndarray
    products: np.ndarray
    narrowed: np.ndarray


def _shapes(shape: Cut, together: int, width: int, channels: int) -> tuple[Shape, list[Shape]]:
    """Of the transformed kernel, and of what each worker writes."""
    tiles = shape.rows * shape.columns
    matrices, kernel = kernel_shapes(shape.outputs, channels)
    return matrices, [
        kernel,
        *row_buffers(TILE_HEIGHT * shape.rows + 2, width + 2, channels),
        (TILE_HEIGHT + 2, TILE_WIDTH * shape.columns + 2, channels),
        (PRODUCTS, tiles, together + 2, channels),
        (PRODUCTS, tiles, shape.outputs),
        (TILE_WIDTH, TILE_HEIGHT + 2, tiles, shape.outputs),
    ]


def _together(shape: Cut, frames: int, channels: int, workers: int) -> int:
    """Output frames that share their transformed inputs in a block."""
    fit = FRAME_BYTES // (4 * PRODUCTS * shape.rows * shape.columns * channels) - 2
    even = frames if len(shape.blocks) >= 2 * workers else -(-frames // workers)
    return max(1, min(fit, even))


def _jobs(shape: Cut, frames: int, together: int) -> list[Job]:
    starts = range(0, frames, together)
    return [(block, t, min(t + together, frames)) for block in shape.blocks for t in starts]


@dataclass(frozen=True)
class _Pass:
    """The convolution to some output channels."""

    rows: Rows
    matrices: np.ndarray
    bias: np.ndarray
    residual: np.ndarray | None
    out: np.ndarray
    columns: int

    def do(self, jobs: Sequence[Job], buffers: _Buffers) -> None:
        for block, start, stop in jobs:
            for t in range(start, stop + 2):
                self._transform_frame(t, t - start, block, buffers)
            for t in range(start, stop):
                self._multiply(t - start, block, buffers)
                self._write_frame(t, block, buffers)

    def _tops(self, block: tuple[int, int]) -> list[int]:
        """The first output row of each row of tiles; the last ends where the frame does."""
        return [min(TILE_HEIGHT * i, self.out.shape[1] - TILE_HEIGHT) for i in range(*block)]

    def _transform_frame(self, t: int, slot: int, block: tuple[int, int], buffers: _Buffers) -> None:
        """Rows of tiles, which see six rows each; an odd width ends in an undefined column.

        Of that column makes use only what lies beyond the frame.
        """
        tops = self._tops(block)
        read = self.rows.read(t, tops[0], tops[-1] + TILE_HEIGHT + 2, buffers.read, buffers.scratch)
        _, width, channels = read.shape
        filtered = buffers.filtered
        flat = filtered.reshape(TILE_HEIGHT + 2, -1)[:, : width * channels]
        slots = buffers.transformed.shape[-2]
        v = part_of(buffers.transformed, (6, 4, len(tops), self.columns, slots, channels))[..., slot, :]
        a, b, c, d = (filtered[:, i : i + 2 * self.columns - 1 : 2] for i in range(4))
        for i, top in enumerate(tops):
            six = read[top - tops[0] :][: TILE_HEIGHT + 2]
            np.matmul(INPUT, six.reshape(TILE_HEIGHT + 2, -1), out=flat)
            np.subtract(a, c, out=v[:, 0, i])
            np.add(b, c, out=v[:, 1, i])
            np.subtract(c, b, out=v[:, 2, i])
            np.subtract(b, d, out=v[:, 3, i])

    def _multiply(self, slot: int, block: tuple[int, int], buffers: _Buffers) -> None:
        """Matrices whose rows are tiles, from three frames that lie beside each other."""
        slots, channels = buffers.transformed.shape[-2:]
        tiles, outputs = (block[1] - block[0]) * self.columns, self.matrices.shape[-1]
        v = part_of(buffers.transformed, (PRODUCTS, tiles, slots * channels))
        products = part_of(buffers.products, (PRODUCTS, tiles, outputs))
        np.matmul(v[..., slot * channels : (slot + 3) * channels], self.matrices, out=products)

    def _write_frame(self, t: int, block: tuple[int, int], buffers: _Buffers) -> None:
        tops, outputs = self._tops(block), self.matrices.shape[-1]
        size = len(tops) * self.columns * outputs
        p = part_of(buffers.products, (6, 4, size))
        narrowed = part_of(buffers.narrowed, (2, 6, size))
        even, odd = narrowed
        np.add(p[:, 1], p[:, 2], out=even)
        even += p[:, 0]
        np.subtract(p[:, 1], p[:, 2], out=odd)
        odd -= p[:, 3]
        flat = part_of(buffers.products, (2, TILE_HEIGHT, size))  # which are used up
        np.matmul(OUTPUT, narrowed, out=flat)
        tiles = flat.reshape(2, TILE_HEIGHT, len(tops), self.columns, outputs)
        for i, top in enumerate(tops):
            start = TILE_HEIGHT * (block[0] + i)  # what lies above it another tile has written
            for k in range(TILE_WIDTH):
                y = self.out[t, start : top + TILE_HEIGHT, k::TILE_WIDTH]
                np.add(tiles[k, start - top :, i, : y.shape[1]], self.bias, out=y)
                if self.residual is not None:
                    y += self.residual[t, start : top + TILE_HEIGHT, k::TILE_WIDTH]
