"""The 3x3x3 convolution on a GPU: several forms under one contract, and the memory that each takes.

Which kernel MLX's Metal backend launches depends on shapes alone, so a form is an arrangement of
the operands. Each was read off MLX's own dispatch; none was timed on a Mac.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import mlx.core as mx

from mlx_vae_tiling.vae.kernels import winograd_gpu, winograd_time
from mlx_vae_tiling.vae.kernels.operands import NO_PADDING, Operands, Padding, operands_of
from mlx_vae_tiling.vae.operations import mirrored

GPUForm = Literal["stock", "folded", "gemm", "winograd32", "winograd_time"]

Pointwise = Callable[[mx.array], mx.array]

LONGEST_EVALUATION = 1_500_000_000_000
"""Operations of one kernel of the form "folded": 0.2 s at 9 TFLOP/s. A watchdog ends what takes too long."""

BLOCK_BYTES = 512 * 2**20
"""Bound of a block of "winograd32" where no plan gives one."""


def convolve(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    form: GPUForm,
    padding: Padding = NO_PADDING,
    *,
    reflected: bool = False,
    given: Pointwise | None = None,
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
        padding: Before and after the frames, rows and columns of x.
        reflected: Whether the padding is a reflection; else it is zeros.
        given: What x is made by from the array that is passed for it. What is made here can go here.
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
    x = given(x) if given else x
    operands = operands_of(x, weight, padding, reflected)
    form = form_of(form, operands, block_bytes)
    parts = _parts(operands.frames) if form == "folded" and operands.batch == 1 else 1
    x = fold(x, parts) if parts > 1 else x
    x = before(x) if before else x
    x = mirrored(x, padding[1], padding[2]) if reflected else x
    left = NO_PADDING if reflected else padding
    if form == "folded":
        return _folded(x, weight, bias, left, skip, operands)
    if form == "stock":
        return _add(_general(x, weight, left), bias, skip)
    mx.eval(x)  # what it was made from can go before the products begin
    if form == "gemm":
        return _gemm(x, weight, bias, left, skip)
    if form == "winograd_time":
        return winograd_time.in_time(x, weight, bias, skip, left, first_frame)
    blocks = winograd_gpu.blocks_of(operands_of(x, weight, left), block_bytes)
    assert blocks
    return winograd_gpu.in_blocks(x, weight, bias, skip, left, blocks)


def form_of(form: GPUForm, operands: Operands, block_bytes: int = BLOCK_BYTES) -> GPUForm:
    """The form that is really taken: "folded" in place of a "winograd32" that MLX would not take."""
    if form == "winograd32" and not winograd_gpu.blocks_of(operands.beheld, block_bytes):
        return "folded"
    return form


def workspace_bytes(
    form: GPUForm,
    operands: Operands,
    block_bytes: int = BLOCK_BYTES,
    activated: bool = False,
    replicated: int = 0,
) -> int:
    """Bytes alive at the peak of one evaluated convolution, besides x and the parameters.

    The result is counted, `skip` is not.

    Args:
        form: The form.
        operands: Its shapes.
        block_bytes: As `convolve`.
        activated: Whether x is an intermediate that nobody else holds, and there is an operation before.
        replicated: Bytes of what x was made from by replicas in time; 0 if there are none.
    """
    form = form_of(form, operands, block_bytes)
    given = operands.batch * (operands.frames + 2) * operands.frame_bytes
    made_from = replicated if activated else 0
    activated = activated or replicated > 0
    if form == "folded":
        return _folded_bytes(operands, given, activated, made_from)
    seen = operands.beheld
    reflected = operands.batch * (operands.frames + 2) * seen.frame_bytes if operands.reflected else 0
    # The operation before writes over its input.
    preparing, ready = made_from + activated * given + reflected, reflected or activated * given
    if form == "stock":
        return preparing + _stock_bytes(seen)
    if form == "gemm":
        working = _gemm_bytes(seen)
    elif form == "winograd_time":
        working = winograd_time.workspace_bytes(seen)
    else:
        working = winograd_gpu.block_workspace_bytes(seen, winograd_gpu.blocks_of(seen, block_bytes) or [])
    return max(preparing, ready + working)


def _folded_bytes(operands: Operands, given: int, activated: bool, made_from: int) -> int:
    """All that lies between two evaluations; the bias is added in place."""
    parts = _parts(operands.frames) if operands.batch == 1 else 1
    frames = operands.batch * (operands.frames + 2 * parts)
    copied = frames * operands.frame_bytes if parts > 1 and (activated or not operands.reflected) else 0
    reflected = frames * operands.beheld.frame_bytes if operands.reflected else 0
    preparing = made_from + activated * given + copied + reflected
    made, count = operands.output_bytes, _kernels(operands)
    if count == 1:
        return preparing + made
    ready = reflected or copied or activated * given
    return max(preparing + made // count, ready + made, 2 * made)


def _gemm_bytes(operands: Operands) -> int:
    t, h, w = operands.frames, operands.height + 2, operands.width + 2
    summed = operands.batch * t * h * w * operands.channels_out
    return operands.itemsize * (operands.padded * (operands.padding != NO_PADDING) + 2 * summed)


def _add(y: mx.array, bias: mx.array, skip: mx.array | None) -> mx.array:
    return y + bias if skip is None else _add_both(y, bias, skip)


@mx.compile
def _add_both(y: mx.array, bias: mx.array, skip: mx.array) -> mx.array:
    return y + bias + skip


def _general(x: mx.array, weight: mx.array, padding: Padding, stride: int = 1) -> mx.array:
    low, high = ([pair[side] for pair in padding] for side in (0, 1))
    return mx.conv_general(x, weight, stride=(stride, 1, 1), padding=(low, high))


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
    skip: mx.array | None,
    operands: Operands,
) -> mx.array:
    """x in parts of equal length, so that undoing it costs nothing; long kernels one by one.

    MLX splits a batch of one with temporal stride 1 into two-dimensional convolutions, and takes
    the implicit GEMM for everything else: also for a single frame with a stride that never applies.
    """
    stride, count = 2 if operands.frames == 1 else 1, _kernels(operands)
    if count == 1:
        y = _general(x, weight, padding, stride)
    else:
        # What is folded but in no pass yet is copied once, not for each kernel.
        x, made = mx.contiguous(x) if len(x) > operands.batch else x, []
        for low, high in pairwise(len(weight) * i // count for i in range(count + 1)):
            made.append(_general(x, weight[low:high], padding, stride))
            mx.eval(made[-1])
        y = mx.concatenate(made, axis=-1)
        del made
    return _add(y.reshape(operands.batch, operands.frames, *y.shape[2:]), bias, skip)


def _kernels(operands: Operands) -> int:
    """Over how many kernels the output channels are divided evenly, in multiples of 16."""
    wanted = -(-operands.operations // LONGEST_EVALUATION)
    runs = operands.channels_out // 16
    return next((n for n in range(wanted, runs + 1) if operands.channels_out % (16 * n) == 0), 1)


def _gemm(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    padding: Padding,
    skip: mx.array | None,
) -> mx.array:
    """With rows laid end to end, three neighbours are 3C consecutive numbers, C apart from the next three.

    Two products of each row straddle its end, and are left out of the view that is returned.
    """
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
    taps = operands.weights * operands.itemsize
    if not winograd_gpu.takes_winograd(
        operands.frames * operands.given[1] * operands.given[2],
        operands.channels_in,
        operands.channels_out,
    ):
        return 4 * made + taps
    one = winograd_gpu.kernel_bytes(
        operands.frames,
        operands.height,
        operands.width,
        operands.channels_in,
        operands.channels_out,
        operands.itemsize,
    )
    return 3 * one + 4 * made + taps
