"""Frames to files: .mp4 (H.264, HEVC), .mov (ProRes), a sequence of PNG images, or one .npy array.

A thread writes beside whatever makes the frames. Each format is a function that consumes an iterator of
frames, so however the frames end, by the last one or by an exception, the file is finished the same way.
"""

from __future__ import annotations

import errno
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from types import TracebackType

import numpy as np

from .frame_files import Frames, save_npy, save_png, save_video

_CODECS = {".mp4": ("h264", "hevc"), ".mov": ("prores", "h264", "hevc")}
_NTSC_RATES = tuple(Fraction(1000 * rate, 1001) for rate in (24, 30, 48, 60, 120))
_NUMBERED = re.compile(r"(?:[^%]|%%)*%0?\d*d(?:[^%]|%%)*")
_WAITING_WRITES = 2


def open_video(
    path: str | os.PathLike[str],
    *,
    fps: float | str | Fraction = 24,
    codec: str | None = None,
    quality: float | None = None,
) -> VideoWriter:
    """Open a file that takes frames while they are being made.

    `.mp4` and `.mov` are converted to and tagged as BT.709 in limited range. They stay playable while they
    grow: a killed process loses the last few seconds. A Mac's hardware encoder is used where it opens.
    4:2:0 video has no odd sizes, so the last row or column is repeated to make height and width even (ProRes:
    only the width); PNG and `.npy` are exact. Files of the same name are overwritten.

    Args:
        path: `.mp4`, `.mov`, `.npy`, `frame_%05d.png`, or a directory for PNG (an existing one, or with "/").
        fps: Frames per second; 23.976 means 24000/1001, and so on. PNG and `.npy` have none.
        codec: "h264" (default in `.mp4`), "hevc", or in `.mov` "prores" (default there).
        quality: Constant rate factor of H.264 and HEVC, from 1, best, to 51; 18, the default, looks lossless.

    Returns:
        A context manager with `write(frames)`.

    Raises:
        ModuleNotFoundError: PyAV is needed and not installed.
        OSError: The place to write to is missing or not writable.
        ValueError: The suffix, codec, rate or quality cannot be used.

    Example:
        >>> with open_video("clip.mp4", fps="24000/1001") as video:
        ...     for frames in decode_frames(decoder, latents):
        ...         video.write(frames)
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower()
    rate = frame_rate(fps)
    if path.endswith(("/", os.sep)) or (os.path.isdir(path) and suffix not in (*_CODECS, ".npy", ".png")):
        _check_writable(path.rstrip("/" + os.sep) or path)
        os.makedirs(path, exist_ok=True)
        return _open_png(os.path.join(path.replace("%", "%%"), "frame_%05d.png"), codec, quality)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "a directory has the name of the file to write", path)
    if suffix not in (*_CODECS, ".npy", ".png"):
        raise ValueError(f"path must end in .mp4, .mov, .npy, %05d.png or / (PNG in a directory), got {path}")
    _check_writable(path)
    if suffix == ".png":
        return _open_png(path, codec, quality)
    if suffix == ".npy":
        _check_unused(path, codec, quality)
        return VideoWriter(path, partial(save_npy, path))
    codec = codec or _CODECS[suffix][0]
    if codec not in _CODECS[suffix]:
        raise ValueError(f"codec of {suffix} must be one of {', '.join(_CODECS[suffix])}, got {codec!r}")
    if codec == "prores":
        _check_unused(path, None, quality)
    if quality is not None and not 1 <= quality <= 51:
        raise ValueError(f"quality must be between 1 (best) and 51, got {quality}")
    _check_av(path)
    return VideoWriter(path, partial(save_video, path, codec=codec, rate=rate, quality=quality or 18))


def frame_rate(fps: float | str | Fraction) -> Fraction:
    """Return a frame rate as a fraction, taking 23.976, 29.97 and their like for n * 1000/1001.

    Raises:
        ValueError: fps is not a number, or not between 0.01 and 1000.

    Example:
        >>> frame_rate(23.976)
        Fraction(24000, 1001)
    """
    try:
        rate = Fraction(str(fps))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"fps must be a number or a fraction such as 24000/1001, got {fps!r}") from error
    if not Fraction(1, 100) <= rate <= 1000:
        raise ValueError(f"fps must be between 0.01 and 1000, got {fps!r}")
    near = [ntsc for ntsc in _NTSC_RATES if abs(ntsc - rate) < Fraction(1, 200)]
    return near[0] if near else rate.limit_denominator(1001)


class VideoWriter:
    """A file being written by a thread; `open_video` makes it.

    At most two written batches wait for the thread, then `write` does. What goes wrong in the thread is
    raised by the next `write` or by `close`. Leaving a `with` block, by an exception too, finishes the file.

    Attributes:
        path: The file, or the pattern of the PNG files.
        frames_written: Frames taken so far.
    """

    def __init__(self, path: str, save: Callable[[Iterator[Frames]], None]) -> None:
        self.path = path
        self.frames_written = 0
        self._save = save
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
            self._form = form
            self._thread.start()
        if form != self._form:
            raise ValueError(f"every frame of {self.path} must be {self._form}, as the first, got {form}")
        self._queue.put(frames.copy())
        self.frames_written += len(frames)
        if self._error is not None:
            self.close()

    def close(self) -> None:
        """Write what is waiting and finish the file.

        Raises:
            OSError: Writing failed.
            ValueError: No frame was ever written.
        """
        if self._closed:
            return
        self._finish()
        if self._form is None:
            raise ValueError(f"a video needs at least one frame, none was written to {self.path}")

    def _finish(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._form is not None:
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


def _open_png(pattern: str, codec: str | None, quality: float | None) -> VideoWriter:
    if _NUMBERED.fullmatch(pattern) is None:
        raise ValueError(f"a PNG path must number its frames, as frame_%05d.png does, got {pattern}")
    _check_unused(pattern, codec, quality)
    _check_av(pattern)
    return VideoWriter(pattern, partial(save_png, pattern))


def _check_unused(path: str, codec: str | None, quality: float | None) -> None:
    if codec is not None or quality is not None:
        raise ValueError(
            f"codec and quality are for H.264 and HEVC, leave them out for {path}: {codec}, {quality}"
        )


def _check_av(path: str) -> None:
    try:
        import av  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"writing {path} needs PyAV: pip install 'mlx_vae_tiling[video]'"
        ) from error


def _check_writable(path: str) -> None:
    parent = os.path.dirname(path) or "."
    if not os.path.isdir(parent):
        raise FileNotFoundError(errno.ENOENT, "no such directory to write in, create it first", parent)
    if not os.access(path if os.path.exists(path) else parent, os.W_OK):
        raise PermissionError(errno.EACCES, "not writable, choose another place", path)
