"""Convolutions by Winograd's products along time, of which each is an implicit GEMM on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_vae_tiling.vae.kernels.operands import Operands, Padding


class _Pairs(NamedTuple):
    """Output frames 2i and 2i + 1 of the video, of which the first or last pair may be half there.

    Args:
        phase: 1 if the first output frame is odd, else 0.
        slots: Pairs that are there at least in half.
        odd_stop: End of the pairs whose odd frame is there; of all but the first `phase` pairs the
            even one is.
    """

    phase: int
    slots: int
    odd_stop: int

    def frames(self, tap: int, start: int, stop: int) -> slice:
        """Of each pair, the input frame that its tap (0 to 3) reads."""
        first = 2 * start + tap - self.phase
        return slice(first, first + 2 * (stop - start) - 1, 2)


def _pairs_of(frames: int, first_frame: int) -> _Pairs:
    phase = first_frame % 2
    return _Pairs(phase, (frames + phase + 1) // 2, (frames + phase) // 2)


def workspace_bytes(operands: Operands, first_frame: int = 0) -> int:
    """Of the form "winograd_time": weights, and the most products and results at a time."""
    pairs = _pairs_of(operands.frames, first_frame)
    evens, odds = pairs.slots - pairs.phase, pairs.odd_stop
    weights = 36 * operands.channels_in * operands.channels_out * operands.itemsize
    made = operands.output_bytes // operands.frames
    read = operands.batch * operands.frame_bytes
    steps = [
        made * pairs.slots + (read + made) * pairs.slots,
        2 * made * pairs.slots + (read + made) * evens,
        2 * made * pairs.slots + made * evens + (read + made) * odds,
        made * (evens + odds) + (operands.output_bytes if evens and odds else 0),
    ]
    return max(steps) + weights


def in_time(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    skip: mx.array | None,
    padding: Padding,
    first_frame: int,
) -> mx.array:
    """F(2, 3) along time: of each pair of frames, four products in place of six.

    A frame without its partner takes three of them, so that its value is the same with or without.
    Products are evaluated one by one, so that each one's operand can go.
    """
    pairs = _pairs_of(x.shape[1] - 2, first_frame)
    phase, slots, odd_stop = pairs
    kernels = _time_kernels(weight)

    def product(which: int, start: int, stop: int) -> mx.array:
        (one, other), sign = _TAPS[which]
        first, second = x[:, pairs.frames(one, start, stop)], x[:, pairs.frames(other, start, stop)]
        return _plane_convolution(first + second if sign > 0 else first - second, kernels[which], padding)

    low, high = product(1, 0, slots), product(2, 0, slots)
    mx.eval(low)
    mx.eval(high)
    even = odd = None
    if phase < slots:
        even = _even_frames(product(0, phase, slots), low[:, phase:], high[:, phase:], bias)
        mx.eval(even)
    if odd_stop:
        odd = _odd_frames(low[:, :odd_stop], high[:, :odd_stop], product(3, 0, odd_stop), bias)
        mx.eval(odd)
    del low, high
    y = _interleaved(even, odd, pairs)
    return y if skip is None else y + skip


def _interleaved(even: mx.array | None, odd: mx.array | None, pairs: _Pairs) -> mx.array:
    if even is None or odd is None:
        return next(frames for frames in (even, odd) if frames is not None)
    phase, slots, odd_stop = pairs
    parts = [odd[:, :1]] if phase else []
    if odd_stop > phase:
        parts.append(mx.stack([even[:, : odd_stop - phase], odd[:, phase:]], axis=2).flatten(1, 2))
    if odd_stop < slots:
        parts.append(even[:, -1:])
    return mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


_TAPS = (((0, 2), -1), ((1, 2), 1), ((2, 1), -1), ((1, 3), -1))
"""Of each product, two of a pair's four input frames, and the sign of the second."""


def _time_kernels(weight: mx.array) -> list[mx.array]:
    """(O, 3, 3, 3, C) to four of (O, 1, 3, 3, C), rounded once."""
    first, middle, last = (weight[:, i : i + 1] for i in range(3))
    kernels = [first, _half_sum(first, middle, last), _half_sum(first, -middle, last), last]
    kernels = [mx.contiguous(kernel) for kernel in kernels]
    mx.eval(kernels)
    return kernels


@mx.compile
def _half_sum(first: mx.array, middle: mx.array, last: mx.array) -> mx.array:
    total = first.astype(mx.float32) + middle.astype(mx.float32) + last.astype(mx.float32)
    return (total / 2).astype(first.dtype)


def _plane_convolution(x: mx.array, kernel: mx.array, padding: Padding) -> mx.array:
    """(B, N, H, W, C) frames, each with a kernel of one frame, as a batch.

    A batch of one would take two-dimensional Winograd, unless a stride is given, which never applies.
    """
    b, n, h, w, c = x.shape
    low, high = ([pair[side] for pair in padding] for side in (0, 1))
    y = mx.conv_general(
        x.reshape(b * n, 1, h, w, c),
        kernel,
        stride=(2 if b * n == 1 else 1, 1, 1),
        padding=(low, high),
    )
    return y.reshape(b, n, *y.shape[2:])


@mx.compile
def _even_frames(m0: mx.array, m1: mx.array, m2: mx.array, bias: mx.array) -> mx.array:
    return m0 + m1 + m2 + bias


@mx.compile
def _odd_frames(m1: mx.array, m2: mx.array, m3: mx.array, bias: mx.array) -> mx.array:
    return m1 - m2 - m3 + bias
