"""Convolutions by MLX's own Winograd kernels in float32, block by block: accurate, and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

from mlx_vae_tiling.vae.kernels.operands import Operands, Padding

TILE = 6
"""Rows and columns of the output that one 8x8 tile of MLX's kernels computes."""


POSITIONS = 4096
"""Input positions from which MLX's 3x3 convolution takes its Winograd kernels."""


class Block(NamedTuple):
    """Rows of one or several frames that are computed at a time.

    Args:
        frame, frames, row, rows: Of the output.
        repeats: How often a single frame is computed, so that there are positions enough.
    """

    frame: int
    frames: int
    row: int
    rows: int
    repeats: int = 1


def takes_winograd(positions: int, channels_in: int, channels_out: int) -> bool:
    """Whether MLX's 3x3 convolution of this many input positions takes its Winograd kernels."""
    aligned = channels_in % 32 == 0 and channels_out % 32 == 0
    return aligned and channels_in + channels_out >= 256 and positions >= POSITIONS


def kernel_bytes(frames: int, height: int, width: int, channels_in: int, channels_out: int, size: int) -> int:
    """What MLX's Winograd convolution allocates besides its output of this height and width.

    Padded input, transformed weights, transformed input, and the products.
    """
    rows, columns = -(-height // TILE), -(-width // TILE)
    padded = frames * (TILE * rows + 2) * (TILE * columns + 2) * channels_in
    tiles = frames * rows * columns
    return size * (padded + 64 * (channels_in * channels_out + tiles * (channels_in + channels_out)))


def _by_the_kernel(padding: Padding) -> bool:
    """Whether MLX's kernel pads: it does so on both sides or on none."""
    return all(pair in ((0, 0), (1, 1)) for pair in padding[1:])


def _block_bytes(operands: Operands, frames: int, rows: int) -> int:
    """Memory of one block of that many rows (all of them, or with a row beside at each end)."""
    c, o = 3 * operands.channels_in, operands.channels_out
    whole = rows == operands.height
    pads_rows = operands.padding[1] == (1, 1)
    height = rows if whole or not pads_rows else rows + 2
    seen = height if pads_rows else rows + 2
    columns = operands.width + 2 - sum(operands.padding[2]) * _by_the_kernel(operands.padding)
    read = frames * seen * columns * c
    made = frames * height * operands.width * o
    kernel = kernel_bytes(frames, height, operands.width, c, o, 4)
    twice = read * operands.itemsize if whole and operands.itemsize < 4 else 0
    return 4 * (read + made) + kernel + twice


def blocks_of(operands: Operands, block_bytes: int) -> list[Block] | None:
    """Whole frames, or even runs of rows of one frame, of which each fits.

    Whether there are any, and where rows are cut, does not depend on the number of frames, so that
    results do not either.

    Returns:
        The blocks; None where MLX would not take Winograd, or no block that is large enough fits.
    """
    frames, height, width = operands.frames, operands.height, operands.width
    if not takes_winograd(POSITIONS, 3 * operands.channels_in, operands.channels_out):
        return None
    least = -(-POSITIONS // (height * width))
    if _block_bytes(operands, least, height) <= block_bytes:
        fitting = [n for n in range(least, frames + 1) if _block_bytes(operands, n, height) <= block_bytes]
        return list(_runs_of_frames(frames, height, least, max(fitting, default=least)))
    fitting = [r for r in range(1, height) if _block_bytes(operands, 1, r) <= block_bytes]
    if not fitting:
        return None
    runs = _even(height, -(-height // max(fitting)))
    if min(rows for _, rows in runs) * width < POSITIONS:
        return None
    return [Block(frame, 1, row, rows) for frame in range(frames) for row, rows in runs]


def _runs_of_frames(frames: int, height: int, least: int, most: int) -> Iterator[Block]:
    for start, count in _even(frames, -(-frames // most)):
        if count >= least:
            yield Block(start, count, 0, height)
        else:
            for frame in range(start, start + count):
                yield Block(frame, 1, 0, height, least)


def _even(length: int, count: int) -> list[tuple[int, int]]:
    """Starts and lengths of `count` runs, about equally long."""
    bounds = [length * i // count for i in range(count + 1)]
    return [(start, stop - start) for start, stop in pairwise(bounds)]


def block_workspace_bytes(operands: Operands, blocks: list[Block]) -> int:
    """Of the form "winograd32": result, weights in float32, and the largest block."""
    largest = max(_block_bytes(operands, block.frames * block.repeats, block.rows) for block in blocks)
    padded = 0 if _by_the_kernel(operands.padding) else operands.padded * operands.itemsize
    return operands.output_bytes + 4 * operands.weights + max(largest, operands.output_bytes) + padded


def in_blocks(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    skip: mx.array | None,
    padding: Padding,
    blocks: list[Block],
) -> mx.array:
    """Two-dimensional convolutions of three frames side by side as channels, in float32.

    One product sums over the three taps in time, so that weights and results are transformed once.
    Each block is evaluated before the next: MLX holds what a kernel allocates until it has run.
    """
    if not _by_the_kernel(padding):
        x, padding = mx.pad(x, [(0, 0), *padding, (0, 0)]), ((0, 0), (0, 0), (0, 0))
    (_, _), (above, below), (left, right) = padding
    b, t, h, w, c = x.shape
    frames, height, width = t - 2, h - 2 + above + below, w - 2 + left + right
    o = len(weight)
    kernel = weight.transpose(0, 2, 3, 1, 4).reshape(o, 3, 3, 3 * c).astype(mx.float32)
    mx.eval(x, kernel)
    parts = []
    for n in range(b):
        for block in blocks:
            y = _block(x, n, kernel, block, above, left)
            if skip is None:
                y = _rounded_sum(y, bias)
            else:
                rows = slice(block.row, block.row + block.rows)
                y = _rounded_sum_with(y, bias, skip[n, block.frame : block.frame + block.frames, rows])
            # A copy at the end, not one in place per block: whether MLX finds nobody else to hold
            # the result is a race with the GPU's last report.
            parts.append(y.reshape(-1, width, o))
            del y
            mx.eval(parts[-1])
    y = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    mx.eval(y)
    return y.reshape(b, frames, height, width, o)


def _block(x: mx.array, n: int, kernel: mx.array, block: Block, above: int, left: int) -> mx.array:
    """The block's rows in float32, without bias."""
    _, t, h, w, c = x.shape
    # Inside the frame the kernel pads too, and the rows that this spoils are left out.
    top, bottom = max(block.row - above, 0), min(block.row + block.rows + 2 - above, h)
    frame, row = h * w * c, w * c
    shape = (block.frames * block.repeats, bottom - top, w, 3, c)
    strides = (0 if block.repeats > 1 else frame, row, c, frame, 1)
    taps = mx.as_strided(x, shape, strides, ((n * t + block.frame) * h + top) * row)
    if bottom - top == h:
        # All of three frames are a permutation of their numbers, which a cast would leave as it is.
        taps = taps.reshape(*shape[:3], 3 * c)
    taps = taps.astype(mx.float32).reshape(*shape[:3], 3 * c)
    y = mx.conv2d(taps, kernel, padding=(above, left))
    spoilt = block.row - top if above else 0
    return y[: block.frames, spoilt : spoilt + block.rows]


@mx.compile
def _rounded_sum(y: mx.array, bias: mx.array) -> mx.array:
    return (y + bias).astype(bias.dtype)


@mx.compile
def _rounded_sum_with(y: mx.array, bias: mx.array, skip: mx.array) -> mx.array:
    return (y + bias + skip).astype(skip.dtype)
