"""How much two videos differ: squared error, PSNR, SSIM and the largest difference, here and there.

Frame by frame and in rows of a frame, so that nothing larger than a frame is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_vae_tiling.runtime.frames import Frames

LEVELS = 255
"""Of frames of 8 bits: what PSNR and SSIM are relative to."""

REACH, DEVIATION = 5, 1.5
"""Of SSIM's Gaussian window, of 11x11 pixels."""

STABILITY = ((0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2)
"""SSIM's two constants."""

BAND_ROWS = 32
"""Rows of a frame whose SSIM is computed at a time, so that they stay in the processor's cache."""

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """How much some pixels differ; scores of more pixels are added up.

    Attributes:
        values: Values compared, three of a pixel.
        squared_error: Summed over them, in levels of 255.
        largest: Difference.
        windows: Of SSIM, three of a pixel that lies at least 5 pixels from the frame's border.
        similarity: SSIM, summed over them.
    """

    values: int = 0
    squared_error: int = 0
    largest: int = 0
    windows: int = 0
    similarity: float = 0.0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.values + other.values,
            self.squared_error + other.squared_error,
            max(self.largest, other.largest),
            self.windows + other.windows,
            self.similarity + other.similarity,
        )

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB; infinite where nothing differs, NaN of no pixels."""
        if not self.values:
            return math.nan
        mean = self.squared_error / self.values
        return 10 * math.log10(LEVELS**2 / mean) if mean else math.inf

    @property
    def ssim(self) -> float:
        """Mean structural similarity, 1 where nothing differs; NaN of no windows."""
        return self.similarity / self.windows if self.windows else math.nan


def total(scores: Iterable[Score]) -> Score:
    """All of them together."""
    return reduce(Score.__add__, scores, Score())


class Comparison:
    """Compares frames of one size, two by two, in some pixels and in the others.

    Args:
        height, width: Of the frames.

    Attributes:
        squared_error: (height, width) float64: of each pixel, summed over channels and frames.
        frames: Compared so far.
    """

    def __init__(self, height: int, width: int):
        if min(height, width) <= 2 * REACH:
            raise ValueError(
                f"frames must be at least {2 * REACH + 1} pixels high and wide to be compared, "
                f"got {width}x{height}"
            )
        self.squared_error, self.frames = np.zeros((height, width)), 0

    def score(self, first: Frames, second: Frames, chosen: Mask) -> tuple[Score, Score]:
        """Compares two frames.

        Args:
            first, second: (height, width, 3) uint8.
            chosen: (height, width).

        Returns:
            The score of the chosen pixels, and that of the others.
        """
        self.frames += 1
        if np.array_equal(first, second):
            inside = chosen[REACH:-REACH, REACH:-REACH]
            counts = [(int(mask.sum()), int(part.sum())) for mask, part in _both(chosen, inside)]
            one, other = (Score(3 * n, 0, 0, 3 * windows, 3.0 * windows) for n, windows in counts)
            return one, other
        difference = np.abs(first.astype(np.int16) - second).max(axis=2)
        error = np.square(first.astype(np.int32) - second).sum(axis=2)
        self.squared_error += error
        similarity = _similarity(first, second)
        inside = chosen[REACH:-REACH, REACH:-REACH]
        one, other = (
            Score(
                3 * int(mask.sum()),
                int(error[mask].sum(dtype=np.int64)),
                int(difference[mask].max(initial=0)),
                3 * int(part.sum()),
                float(similarity[part].sum(dtype=np.float64)),
            )
            for mask, part in _both(chosen, inside)
        )
        return one, other


def _both(chosen: Mask, inside: Mask) -> Iterator[tuple[Mask, Mask]]:
    yield chosen, inside
    yield ~chosen, ~inside


def _similarity(first: Frames, second: Frames) -> Floats:
    """SSIM of each pixel that is at least 5 from the border, summed over channels."""
    height, width, channels = first.shape
    similarity = np.zeros((height - 2 * REACH, width - 2 * REACH), np.float32)

    def add(start: int) -> None:
        stop = min(start + BAND_ROWS, len(similarity))
        for channel in range(channels):
            rows = slice(start, stop + 2 * REACH), slice(None), channel
            similarity[start:stop] += _similarity_of_rows(first[rows], second[rows])

    with ThreadPoolExecutor() as pool:
        list(pool.map(add, range(0, len(similarity), BAND_ROWS)))
    return similarity


def _similarity_of_rows(first: Frames, second: Frames) -> Any:
    """SSIM of one channel by its definition, with the window's weights summing to one."""
    # Variances do not depend on where zero is; near the middle float32 rounds them less.
    middle = np.float32((LEVELS + 1) / 2)
    x, y = (channel.astype(np.float32) - middle for channel in (first, second))
    mean_x, mean_y, squares, products = (_blurred(field) for field in (x, y, x * x + y * y, x * y))
    covariance = products - mean_x * mean_y
    variances = squares - mean_x * mean_x - mean_y * mean_y
    mean_x, mean_y = mean_x + middle, mean_y + middle
    small_mean, small_variance = (np.float32(constant) for constant in STABILITY)
    luminance = (2 * mean_x * mean_y + small_mean) / (mean_x * mean_x + mean_y * mean_y + small_mean)
    return luminance * (2 * covariance + small_variance) / (variances + small_variance)


def _blurred(field: Floats) -> Floats:
    """Weighted by the window around each position at which all of it lies inside."""
    offsets = np.arange(-REACH, REACH + 1)
    weights = np.exp(-(offsets**2) / (2 * DEVIATION**2))
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        length = field.shape[axis] - 2 * REACH
        parts = [
            field[start : start + length] if axis == 0 else field[:, start : start + length]
            for start in range(2 * REACH + 1)
        ]
        blurred = weights[REACH] * parts[REACH]
        for near in range(REACH):  # the window is symmetric
            blurred += weights[near] * (parts[near] + parts[-1 - near])
        field = blurred
    return field
