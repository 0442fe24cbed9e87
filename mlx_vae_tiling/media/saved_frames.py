"""Frames of the outside world: a video, an array or PNG images, read a few at a time."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .places import Frames
from .png import first_png, numbered, numbers

AT_A_TIME = 8
"""Frames of a piece."""


@dataclass(frozen=True)
class SavedFrames:
    """Frames that were saved.

    Attributes:
        path: Where.
        count: How many; None of a video, which tells only at its end.
        pieces: Of uint8 RGB (f, H, W, 3), in order, once.
    """

    path: str
    count: int | None
    pieces: Generator[Frames]


def read_frames(path: str | os.PathLike[str]) -> SavedFrames:
    """Opens saved frames.

    Args:
        path: An array `.npy` (F, H, W, 3) of uint8, `frame_%05d.png`, a directory of PNG images, which are
            taken in the order of their numbers, or a video in any form that PyAV reads.

    Raises:
        FileNotFoundError: There is nothing of this name.
        ModuleNotFoundError: PyAV is needed and not installed.
        ValueError: It cannot be read as frames.
    """
    path = os.fspath(path)
    if path.lower().endswith(".npy"):
        return read_array(path, _array(path))
    if path.lower().endswith(".png") or os.path.isdir(path):
        images = _images(path)
        return SavedFrames(path, len(images), _pictures(images))
    _require_file(path)
    return SavedFrames(path, None, _video(path))


def read_array(name: str, frames: Frames) -> SavedFrames:
    """Frames that are an array (F, H, W, 3) of uint8 already.

    Raises:
        ValueError: It is another array.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(f"{name} must hold uint8 frames (F, H, W, 3), got {frames.dtype} {frames.shape}")
    starts = range(0, len(frames), AT_A_TIME)
    return SavedFrames(name, len(frames), (frames[start : start + AT_A_TIME] for start in starts))


def _require_file(path: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, "no such file or directory of frames", path)
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no file of frames")


def _array(path: str) -> Frames:
    _require_file(path)
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an array ({error})") from error


def _images(path: str) -> list[str]:
    """Files of PNG images in order."""
    if os.path.isdir(path):
        names = [name for name in os.listdir(path) if name.lower().endswith(".png")]
        images = [os.path.join(path, name) for name in sorted(names, key=_by_numbers)]
    else:
        first_png(path)
        images = [numbered(path, number) for number in numbers(path)]
    if not images:
        raise FileNotFoundError(errno.ENOENT, "no PNG images of frames", path)
    return images


def _by_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _pictures(images: list[str]) -> Generator[Frames]:
    av = _av(images[0])
    for path in images:
        with open(path, "rb") as file:
            data = file.read()
        try:
            (frame,) = av.CodecContext.create("png", "r").decode(av.Packet(data))
            yield frame.to_ndarray(format="rgb24")[None]
        except (av.FFmpegError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a PNG image ({error})") from error


def _video(path: str) -> Generator[Frames]:
    av = _av(path)
    try:
        # A name such as a:b.mp4 is one of a file, and no protocol.
        with av.open(f"file:{path}") as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video in it")
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")[None]
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video ({error.strerror})") from error


def _av(path: str) -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading {path} needs PyAV: pip install 'mlx_vae_tiling[video]'"
        ) from error
    return av
