"""Memory that one operation after another computes in, so that none has to ask for its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, ...]

_ALIGNMENT = 16
"""Floats: the width of a cache line, at which every array starts."""


class Workspace:
    """A buffer that grows to the largest request. Arrays of one request are those of the next."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.float32)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def take(self, *shapes: Shape) -> list[np.ndarray]:
        """Float32 arrays with undefined values, valid until the next request.

        They lie in `bytes_of(*shapes)` bytes.
        """
        size = bytes_of(*shapes) // 4
        if size > self._memory.size:
            self._memory = np.empty(0, np.float32)  # the old one goes before the new one comes
            self._memory = np.empty(size, np.float32)
        start = -self._memory.ctypes.data // 4 % _ALIGNMENT
        arrays = []
        for shape in shapes:
            arrays.append(self._memory[start : start + math.prod(shape)].reshape(shape))
            start += _aligned(shape)
        return arrays

    def share_out(
        self, workers: int, own: Sequence[Shape], common: Sequence[Shape] = ()
    ) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """As `take`, for arrays that workers have in common, and for those that each has of its own."""
        arrays = self.take(*common, *list(own) * workers)
        starts = range(len(common), len(arrays), len(own))
        return arrays[: len(common)], [arrays[start : start + len(own)] for start in starts]


def bytes_of(*shapes: Shape) -> int:
    """Bytes that a workspace needs for arrays of these shapes."""
    return 4 * (sum(map(_aligned, shapes)) + _ALIGNMENT)


def part_of(array: np.ndarray, shape: Shape) -> np.ndarray:
    """The beginning of a contiguous array as an array of another shape."""
    return array.reshape(-1)[: math.prod(shape)].reshape(shape)


def _aligned(shape: Shape) -> int:
    return -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
