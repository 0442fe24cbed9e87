"""The shapes of a convolution: what its forms, and the memory that they take, depend on."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Positions that are added before and after frames, rows and columns; none around the frames."""

NO_PADDING: Padding = ((0, 0), (0, 0), (0, 0))


class Operands(NamedTuple):
    """What one convolution computes, as integers.

    Args:
        batch, frames, height, width: Of the output.
        channels_in, channels_out: Of the kernel.
        itemsize: Bytes of a number.
        padding, reflected: As `convolve`.
    """

    batch: int
    frames: int
    height: int
    width: int
    channels_in: int
    channels_out: int
    itemsize: int
    padding: Padding = NO_PADDING
    reflected: bool = False

    @property
    def beheld(self) -> Operands:
        """As the products see them: after a reflection."""
        return self._replace(padding=NO_PADDING, reflected=False) if self.reflected else self

    @property
    def given(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the input."""
        sizes = zip((self.frames, self.height, self.width), self.padding, strict=True)
        frames, height, width = (size + 2 - before - after for size, (before, after) in sizes)
        return frames, height, width

    @property
    def given_frame(self) -> int:
        """Elements of one frame of the input, of the whole batch."""
        return self.batch * self.given[1] * self.given[2] * self.channels_in

    @property
    def frame_bytes(self) -> int:
        """One frame of the input of one entry of the batch."""
        return self.given_frame // self.batch * self.itemsize

    @property
    def padded(self) -> int:
        """Elements of the padded input."""
        return self.batch * (self.frames + 2) * (self.height + 2) * (self.width + 2) * self.channels_in

    @property
    def weights(self) -> int:
        """Elements of the kernel."""
        return 27 * self.channels_in * self.channels_out

    @property
    def made(self) -> int:
        """Elements of the output."""
        return self.batch * self.frames * self.height * self.width * self.channels_out

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 54 * self.channels_in * self.made

    @property
    def output_bytes(self) -> int:
        return self.made * self.itemsize


def operands_of(
    x: mx.array, weight: mx.array, padding: Padding = NO_PADDING, reflected: bool = False
) -> Operands:
    """The shapes of a convolution of x, as `convolve` is given it."""
    b, *given, c = x.shape
    t, h, w = (size - 2 + sum(pair) for size, pair in zip(given, padding, strict=True))
    return Operands(b, t, h, w, c, len(weight), x.dtype.size, padding, reflected)
