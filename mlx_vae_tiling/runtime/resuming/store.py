"""Decoded frames on disk, where several windows have to be put together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vae_tiling.runtime.frames import Frames
from mlx_vae_tiling.runtime.planning.cost import Part
from mlx_vae_tiling.runtime.resuming.journal import Journal, unreadable


class FrameStore:
    """Frames (F, H, W, 3) in one flat file, with a journal that counts them or without one.

    The journal is replaced only after the frames it counts are written, so that after a kill at any
    moment it never claims too much.

    Args:
        folder: Where the file is.
        parts: What is decoded one after the other.
        shape: (F, H, W, 3).
        dtype: Of the frames.
        journal: Whose frames they are.

    Raises:
        ValueError: If the journal counts frames that are not there.
    """

    bounded = False

    def __init__(
        self,
        folder: Path,
        parts: tuple[Part, ...],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        journal: Journal | None = None,
    ):
        self.parts = parts
        self.done = [0] * len(parts) if journal is None or journal.done is None else journal.done
        self._journal, self._shape, self._dtype = journal, shape, dtype
        self._corner = tuple(min(part.pixels[axis].start for part in parts) for axis in range(3))
        self._file = os.open(folder / "frames", os.O_RDWR | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        if size < max(self._end(part) for part in range(len(parts))):
            self.close()
            raise unreadable(folder, ValueError(f"{size} bytes of frames for {self.done} finished ones"))

    @property
    def complete(self) -> int:
        """Frames of the output that are finished, from its first one on."""
        ends = [(part.pixels.time, done) for part, done in zip(self.parts, self.done, strict=True)]
        unfinished = [time.start + done - self._corner[0] for time, done in ends if done < time.length]
        return min(unfinished, default=self._shape[0])

    def _end(self, part: int) -> int:
        """Where the last byte of a part's finished frames is followed by the next one."""
        if not self.done[part]:
            return 0
        time, rows, columns = self.parts[part].pixels
        _, height, width, _ = self._shape
        frame = time.start + self.done[part] - 1 - self._corner[0]
        last = rows.stop - 1 - self._corner[1]
        pixels = (frame * height + last) * width + columns.stop - self._corner[2]
        return pixels * 3 * self._dtype.itemsize

    def append(self, part: int, frames: Frames) -> None:
        """Adds finished frames (f, h, w, 3) of a part."""
        time, rows, columns = self.parts[part].pixels
        top, left = rows.start - self._corner[1], columns.start - self._corner[2]
        _, height, width, _ = self._shape
        pixel = 3 * self._dtype.itemsize
        for index, frame in enumerate(
            np.ascontiguousarray(frames), time.start - self._corner[0] + self.done[part]
        ):
            start = ((index * height + top) * width + left) * pixel
            runs = [frame] if frame.shape[1] == width else frame
            for row, run in enumerate(runs):
                _write_all(self._file, run, start + row * width * pixel)
        self.done[part] += len(frames)
        os.fsync(self._file)
        if self._journal is not None:
            self._journal.write()

    def read(self, start: int, stop: int) -> Frames:
        """Frames start to stop - 1, which all parts must have finished."""
        frame_bytes = int(np.prod(self._shape[1:])) * self._dtype.itemsize
        data = os.pread(self._file, (stop - start) * frame_bytes, start * frame_bytes)
        return np.frombuffer(data, self._dtype).reshape(stop - start, *self._shape[1:])

    def close(self) -> None:
        os.close(self._file)


def _write_all(file: int, data: Any, offset: int) -> None:
    contiguous: Any = np.ascontiguousarray(data)
    view = memoryview(contiguous).cast("B")
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
