"""What waits at rank 0 to be put together: how many frames of each part, and the memory that they take.

A rank sends no frame that rank 0 has no room for, and rank 0 computes none. The room is part of rank 0's
plan, so that the frames of the others cannot push it over its limit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_vae_tiling.runtime.frames import Frames
from mlx_vae_tiling.runtime.planning.cost import CostModel, Part
from mlx_vae_tiling.runtime.planning.grids import chunks
from mlx_vae_tiling.runtime.planning.memory import format_bytes
from mlx_vae_tiling.vae.regions import Region

MOST_SHARE = 8
"""Rank 0 gives an eighth of its memory to what waits at most, as long as that is a frame of each part."""


class Room(NamedTuple):
    """How much of each part may be ahead of what was put together.

    Attributes:
        frames: Of a part; of rank 0's own, where parts advance together, twice as many.
        frame_bytes: Of a frame of the whole output.
    """

    frames: int
    frame_bytes: int

    def nbytes(self, ranges: int) -> int:
        """The most that waits, in so many ranges of frames that are decoded at the same time.

        Of each part its frames, on their way or in their place; of the last that came, both; and rank 0's
        own a second time, or, where ranges wait on the disk, not at all.
        """
        return self.frames * self.frame_bytes * (ranges + 1)


def room_for(model: CostModel, output: Region, itemsize: int, budget: int) -> Room:
    """Room for the largest useful piece, if rank 0's memory is large enough.

    Args:
        model: What the decode costs.
        output: Its frames, of numbers of
        itemsize: bytes.
        budget: Rank 0's memory in bytes.

    Raises:
        ValueError: If that is less than a frame of each part takes.
    """
    frame_bytes, scale = 3 * output.area * itemsize, model.decoder.config.temporal_scale
    for step, cap in chunks(model):
        room = Room(cap or step * scale, frame_bytes)
        if room.nbytes(1) <= budget // MOST_SHARE:
            break
    if room.nbytes(1) > budget:
        raise ValueError(
            f"rank 0 needs {format_bytes(room.nbytes(1))} for frames that the others send, got "
            f"{format_bytes(budget)}: raise its memory limit"
        )
    return room


def ranges_of(parts: Sequence[Part]) -> int:
    """How many ranges of frames there are parts of."""
    return len({part.pixels.time for part in parts})


class FrameBands:
    """Frames in memory, of parts that advance together: only those of which a part is still missing.

    Args:
        parts: Each of all frames.
        shape: (F, H, W, 3).
        dtype: Of the frames.
        start: Frames that an earlier run has put together.
    """

    bounded = True

    def __init__(self, parts: tuple[Part, ...], shape: tuple[int, ...], dtype: np.dtype[Any], start: int = 0):
        self.parts, self.done = parts, [start] * len(parts)
        self._shape, self._dtype, self._first = shape, dtype, start
        corner = [min(part.pixels[axis].start for part in parts) for axis in (1, 2)]
        self._places = [
            tuple(
                slice(span.start - first, span.stop - first)
                for span, first in zip(part.pixels[1:], corner, strict=True)
            )
            for part in parts
        ]
        self._held: list[deque[Frames]] = [deque() for _ in parts]

    @property
    def complete(self) -> int:
        """Frames of the output that are finished, from its first one on."""
        return min(self.done)

    def append(self, part: int, frames: Frames) -> None:
        """Adds finished frames (f, h, w, 3) of a part, each of which is let go by itself."""
        self._held[part].extend(frame.copy() for frame in frames)
        self.done[part] += len(frames)

    def read(self, start: int, stop: int) -> Frames:
        """Frames start to stop - 1, which all parts have finished, and which are then gone."""
        read = np.empty((stop - start, *self._shape[1:]), self._dtype)
        for number in range(self._first, stop):
            for place, held in zip(self._places, self._held, strict=True):
                frame = held.popleft()
                if number >= start:
                    read[number - start][place] = frame
        self._first = stop
        return read
