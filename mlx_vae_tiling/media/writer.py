"""A thread that writes frames beside whatever makes them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np

from .places import Frames, Output

_WAITING_WRITES = 2


class VideoWriter:
    """An output being written by a thread; `open_video` makes it.

    At most two written batches wait for the thread, then `write` does. What goes wrong in the thread is
    raised by the next `write` or by `close`. `close` gives the output its own name; a `with` block that
    is left by an exception finishes the file under its temporary one, from where it can be continued.

    Attributes:
        path: The file, or the pattern of the PNG files.
        frames_kept: Frames of an earlier run that are kept: the first to be written is the one of this index.
        frames_written: Frames taken so far, without those kept.
    """

    def __init__(self, path: str, save: Callable[[Iterator[Frames]], None], output: Output | None = None):
        self.path = path
        self.frames_kept = output.frames_kept if output else 0
        self.frames_written = 0
        self._save, self._output = save, output
        self._queue: queue.Queue[Frames | None] = queue.Queue(_WAITING_WRITES)
        # A daemon, so that a writer nobody closed cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"write {path}", daemon=True)
        self._error: Exception | None = None
        self._form: tuple[tuple[int, ...], np.dtype[np.generic]] | None = None
        self._closed = False

    def write(self, frames: Frames) -> None:
        """Add frames (f, H, W, 3), uint8 or uint16 RGB, all of one size and dtype; they are copied.

        Raises:
            OSError: An earlier write failed, the disk being full for example.
            ValueError: The frames have another form, or the file is closed.
        """
        if self._closed:
            raise ValueError(f"frames must be written before {self.path} is closed")
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.size == 0 or frames.dtype not in ("u1", "u2"):
            raise ValueError(
                f"frames must be (f, height, width, 3), uint8 or uint16, got {frames.shape} {frames.dtype}"
            )
        form = (frames.shape[1:], frames.dtype)
        if self._form is None:
            if self._output:
                self._output.check(frames)
            self._form = form
            self._thread.start()
        if form != self._form:
            raise ValueError(f"every frame of {self.path} must be {self._form}, as the first, got {form}")
        self._queue.put(frames.copy())
        self.frames_written += len(frames)
        if self._error is not None:
            self.close()

    def close(self) -> None:
        """Write what is waiting, finish the output and give it its name.

        Raises:
            OSError: Writing failed.
            ValueError: No frame was ever written.
        """
        if self._closed:
            return
        if self._form is None and self.frames_kept:  # nothing was missing but the end
            self._thread.start()
        self._finish()
        if self._form is None and not self.frames_kept:
            raise ValueError(f"a video needs at least one frame, none was written to {self.path}")
        if self._output:
            self._output.publish(self.frames_kept + self.frames_written)

    def _finish(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._thread.ident is not None:
            self._queue.put(None)
            self._thread.join()
        if isinstance(self._error, OSError):
            raise OSError(self._error.errno, self._error.strerror, self.path) from self._error
        if self._error is not None:
            raise OSError(f"cannot write {self.path}: {self._error}") from self._error

    def _run(self) -> None:
        batches = self._waiting()
        try:
            self._save(batches)
        except Exception as error:
            self._error = error
            for _ in batches:  # so that a waiting write goes on, and sees the error
                pass

    def _waiting(self) -> Iterator[Frames]:
        while (batch := self._queue.get()) is not None:
            yield batch

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._finish()
