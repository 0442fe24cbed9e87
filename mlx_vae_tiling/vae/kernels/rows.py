"""Frames as a CPU convolution reads them: some rows at a time, padded, and activated on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlx_vae_tiling.vae.blocks import PaddingMode
from mlx_vae_tiling.vae.kernels.numbers import widen
from mlx_vae_tiling.vae.kernels.workspace import Shape
from mlx_vae_tiling.vae.operations import PIXEL_NORM_EPS

BAND_FLOATS = 2**15
"""Numbers that are activated at a time, so that all passes over them but the first are in cache."""

Activation = Literal["none", "norm_silu"]


@dataclass(frozen=True)
class Rows:
    """Frames with what a convolution needs around and before it, made row by row.

    Args:
        frames: Each (height, width, C), of equal shape, contiguous rows, in float32, float16, or the bits
            of bfloat16 as uint16.
        padding: Rows above and below, columns left and right that are added: 0 or 1 each.
        mode: What is added: zeros, or the frame reflected.
        activation: "norm_silu" for pixel norm, modulation where there is one, SiLU.
        modulation: (shift, scale), each (C,): x * (1 + scale) + shift after the norm.
    """

    frames: Sequence[np.ndarray]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    mode: PaddingMode = "zeros"
    activation: Activation = "none"
    modulation: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, C) with the padding."""
        height, width, channels = self.frames[0].shape
        top, bottom, left, right = self.padding
        return height + top + bottom, width + left + right, channels

    def read(self, frame: int, start: int, stop: int, out: np.ndarray, scratch: np.ndarray) -> np.ndarray:
        """Rows `start` to `stop`, three at least, of a padded frame.

        Returns:
            (stop - start, width, C): a view of the frame, or of `out` where it had to be made.
        """
        x = self.frames[frame]
        if self.activation == "none" and not any(self.padding) and x.dtype == np.float32:
            return x[start:stop]
        height, width, _ = x.shape
        top, bottom, left, right = self.padding
        rows = out[: stop - start]
        first, last = max(start - top, 0), min(stop - top, height)
        inner = rows[first + top - start : last + top - start, left : left + width]
        if self.activation == "none":
            widen(x[first:last], inner)
        else:
            activate(x[first:last], inner, scratch, self.modulation)
        above, below = top and start == 0, bottom and stop == height + top + bottom
        self._pad(rows, (int(above), int(below), left, right))
        return rows

    def _pad(self, rows: np.ndarray, padding: tuple[int, int, int, int]) -> None:
        columns = rows.swapaxes(0, 1)
        above, below, left, right = padding
        for lines, before, after in ((rows, above, below), (columns, left, right)):
            if before:
                lines[0] = 0 if self.mode == "zeros" else lines[2]
            if after:
                lines[-1] = 0 if self.mode == "zeros" else lines[-3]


def row_buffers(rows: int, width: int, channels: int) -> tuple[Shape, Shape]:
    """Shapes of `out` and `scratch` of `Rows.read` for up to that many rows."""
    return (rows, width, channels), (_band(width, channels), width, channels)


def activate(
    x: np.ndarray,
    out: np.ndarray,
    scratch: np.ndarray,
    modulation: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Pixel norm, the timestep's (shift, scale) where there is one, SiLU.

    Args:
        x: (rows, width, C), as the frames of `Rows`.
        out: The same shape, in float32.
        scratch: (n, width, C) or wider, for n rows at a time.
        modulation: (shift, scale), each (C,).
    """
    count, width, channels = x.shape
    band = len(scratch)
    for low in range(0, count, band):
        source, y = x[low : low + band], out[low : low + band]
        other = scratch[: len(source), :width]
        if source.dtype != np.float32:
            source = widen(source, y)
        squares = np.einsum("hwc,hwc->hw", source, source)
        np.multiply(source, (1 / np.sqrt(squares / channels + PIXEL_NORM_EPS))[..., None], out=y)
        if modulation is not None:
            y *= 1 + modulation[1]
            y += modulation[0]
        np.negative(y, out=other)
        np.exp(other, out=other)
        other += 1
        y /= other


def _band(width: int, channels: int) -> int:
    return max(1, BAND_FLOATS // (width * channels))
