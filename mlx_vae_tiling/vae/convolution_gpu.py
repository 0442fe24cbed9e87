"""The 3x3x3 convolution on a GPU: several forms under one contract, and the memory that each takes.

Which kernel MLX's Metal backend launches depends on shapes alone, so a form is an arrangement of
the operands. Each was read off MLX's own dispatch; none was timed on a Mac.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import mlx.core as mx

from mlx_vae_tiling.vae import convolution_winograd as winograd

GPUForm = Literal["stock", "folded", "gemm", "winograd32", "winograd_time"]

Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Zeros before and after the input's frames, rows and columns; none around the frames."""

NO_PADDING: Padding = ((0, 0), (0, 0), (0, 0))

Pointwise = Callable[[mx.array], mx.array]

BLOCK_BYTES = 512 * 2**20
"""Bound of a block of "winograd32" where no plan gives one."""


class Operands(NamedTuple):
    """What one convolution computes, as integers.

    Args:
        batch, frames, height, width: Of the output.
        channels_in, channels_out: Of the kernel.
        itemsize: Bytes of a number.
        padding: As `convolve`.
    """

    batch: int
    frames: int
    height: int
    width: int
    channels_in: int
    channels_out: int
    itemsize: int
    padding: Padding = NO_PADDING

    @property
    def given(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the input."""
        sizes = zip((self.frames, self.height, self.width), self.padding, strict=True)
        frames, height, width = (size + 2 - before - after for size, (before, after) in sizes)
        return frames, height, width

    @property
    def frame_bytes(self) -> int:
        """One frame of the input."""
        return self.given[1] * self.given[2] * self.channels_in * self.itemsize

    @property
    def output_bytes(self) -> int:
        return self.batch * self.frames * self.height * self.width * self.channels_out * self.itemsize


def convolve(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    form: GPUForm,
    padding: Padding = NO_PADDING,
    *,
    before: Pointwise | None = None,
    skip: mx.array | None = None,
    first_frame: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> mx.array:
    """3x3x3 convolution in one of the forms.

    - "folded": equal parts of the frames as a batch, which takes one implicit GEMM with one float32
      accumulator.
    - "winograd32": Winograd in float32, block by block; "folded" where MLX would not take it.
    - "winograd_time": F(2, 3) along time, four implicit GEMMs in place of six.
    - "gemm": nine products of shifted rows, the only ones that an M5's neural accelerators take.
    - "stock": what MLX chooses. In half precision its Winograd kernels are inaccurate.

    Args:
        x: (B, T+2, H+2, W+2, C), less what `padding` adds.
        weight: (O, 3, 3, 3, C).
        bias: (O,).
        form: The form.
        padding: Zeros before and after frames, rows and columns of x.
        before: An operation on single numbers, applied to x first. Where a form copies x anyway, it
            costs no pass of its own.
        skip: (B, T, H, W, O), added to the result in the same pass as the bias.
        first_frame: Number of the first output frame in the video: pairs in time are aligned to
            it, so that the result does not depend on how frames are grouped.
        block_bytes: Bound of the memory of one block of "winograd32".

    Returns:
        (B, T, H, W, O) in the dtype of x.
    """
    if padding[0] != (0, 0):
        raise ValueError(f"frames cannot be padded by the convolution, got padding {padding}")
    if form == "winograd32":
        operands = operands_of(x, weight, padding)
        if blocks := winograd.blocks_of(operands, block_bytes):
            return winograd.in_blocks(before(x) if before else x, weight, bias, skip, padding, blocks)
        form = "folded"
    if form == "winograd_time":
        return winograd.in_time(before(x) if before else x, weight, bias, skip, padding, first_frame)
    return {"stock": _stock, "folded": _folded, "gemm": _gemm}[form](x, weight, bias, padding, before, skip)


def operands_of(x: mx.array, weight: mx.array, padding: Padding = NO_PADDING) -> Operands:
    b, *given, c = x.shape
    t, h, w = (size - 2 + sum(pair) for size, pair in zip(given, padding, strict=True))
    return Operands(b, t, h, w, c, len(weight), x.dtype.size, padding)


def workspace_bytes(form: GPUForm, operands: Operands, block_bytes: int = BLOCK_BYTES) -> int:
    """Bytes alive at the peak of one evaluated convolution, besides x and the parameters.

    The result is counted, `skip` is not. With `before`, x is what it is applied to, and can be
    freed by it only in "folded".

    Args:
        form: The form.
        operands: Its shapes.
        block_bytes: As `convolve`.
    """
    made = operands.output_bytes
    if form == "winograd32":
        if blocks := winograd.blocks_of(operands, block_bytes):
            return winograd.block_workspace_bytes(operands, blocks)
        form = "folded"
    if form == "folded":
        parts = _parts(operands.frames) if operands.batch == 1 else 1
        copied = operands.frames + 2 * parts if parts > 1 else 0
        # The bias is added in place where there is no copy to be made.
        return copied * operands.frame_bytes + made
    if form == "winograd_time":
        return winograd.time_workspace_bytes(operands)
    if form == "gemm":
        t, h, w = operands.frames, operands.height + 2, operands.width + 2
        padded = operands.batch * (t + 2) * h * w * operands.channels_in * operands.itemsize
        summed = operands.batch * t * h * w * operands.channels_out * operands.itemsize
        return padded * (operands.padding != NO_PADDING) + 2 * summed
    return _stock_bytes(operands)


def _add(y: mx.array, bias: mx.array, skip: mx.array | None) -> mx.array:
    return y + bias if skip is None else _add_both(y, bias, skip)


@mx.compile
def _add_both(y: mx.array, bias: mx.array, skip: mx.array) -> mx.array:
    return y + bias + skip


def _general(x: mx.array, weight: mx.array, padding: Padding, stride: int = 1) -> mx.array:
    low, high = ([pair[side] for pair in padding] for side in (0, 1))
    return mx.conv_general(x, weight, stride=(stride, 1, 1), padding=(low, high))


def _stock(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    padding: Padding,
    before: Pointwise | None,
    skip: mx.array | None,
) -> mx.array:
    return _add(_general(before(x) if before else x, weight, padding), bias, skip)


def _parts(frames: int) -> int:
    """The smallest number of parts, above one, into which the frames divide evenly."""
    return next((n for n in range(2, math.isqrt(frames) + 1) if frames % n == 0), frames)


def fold(x: mx.array, parts: int) -> mx.array:
    """(1, T+2, H, W, C) as (parts, T/parts + 2, H, W, C) that overlap, without a copy."""
    _, frames, h, w, c = x.shape
    step = (frames - 2) // parts
    strides = (step * h * w * c, h * w * c, w * c, c, 1)
    return mx.as_strided(x, (parts, step + 2, h, w, c), strides)


def _folded(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    padding: Padding,
    before: Pointwise | None,
    skip: mx.array | None,
) -> mx.array:
    """Parts of equal length, so that undoing it costs nothing.

    MLX splits a batch of one with temporal stride 1 into two-dimensional convolutions, and takes
    the implicit GEMM for everything else: also for a single frame with a stride that never applies.
    """
    b, frames, *_ = x.shape
    parts = _parts(frames - 2) if b == 1 and frames > 3 else 1
    if parts > 1:
        x = fold(x, parts)
    y = _general(before(x) if before else x, weight, padding, stride=2 if frames == 3 else 1)
    return _add(y.reshape(b, frames - 2, *y.shape[2:]), bias, skip)


def _gemm(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    padding: Padding,
    before: Pointwise | None,
    skip: mx.array | None,
) -> mx.array:
    """With rows laid end to end, three neighbours are 3C consecutive numbers, C apart from the next three.

    Two products of each row straddle its end, and are left out of the view that is returned.
    """
    x = before(x) if before else x
    if padding != NO_PADDING:
        x = mx.pad(x, [(0, 0), *padding, (0, 0)])
    b, t, h, w, c = x.shape
    o = len(weight)
    # Windows that begin at the first position up to the last valid one.
    count = b * t * h * w - (2 * h + 2) * w - 2
    y = bias
    for i in range(3):
        for j in range(3):
            rows = mx.as_strided(x, (count, 3 * c), (c, 1), (i * h + j) * w * c)
            y = mx.addmm(y, rows, weight[:, i, j].reshape(o, 3 * c).T)
            mx.eval(y)  # or all nine sums would be alive
    frame = h * w * o
    y = mx.as_strided(y, (b, t - 2, h - 2, w - 2, o), (t * frame, frame, w * o, o, 1))
    return y if skip is None else y + skip


def _stock_bytes(operands: Operands) -> int:
    """One two-dimensional convolution per temporal tap for a batch of one, all of them alive at once."""
    made = operands.output_bytes
    if operands.batch > 1:
        return made
    taps = 27 * operands.channels_in * operands.channels_out * operands.itemsize
    if not winograd.takes_winograd(
        operands.frames * operands.given[1] * operands.given[2],
        operands.channels_in,
        operands.channels_out,
    ):
        return 4 * made + taps
    one = winograd.kernel_bytes(
        operands.frames,
        operands.height,
        operands.width,
        operands.channels_in,
        operands.channels_out,
        operands.itemsize,
    )
    return 3 * one + 4 * made + taps
