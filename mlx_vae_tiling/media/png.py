"""Frames as numbered PNG files of 8 or 16 bits, which can be continued after the last whole one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import partial

import numpy as np

from .places import BEGIN_AGAIN, Frames, Output, flush_to_disk, partial_path, refuse_existing

_NUMBERED = re.compile(r"(?P<before>(?:[^%]|%%)*)%(?P<form>0?\d*)d(?P<after>(?:[^%]|%%)*)")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def first_png(pattern: str) -> str:
    """The first file of a sequence.

    Raises:
        ValueError: The pattern does not have exactly one number such as %05d.
    """
    if _NUMBERED.fullmatch(os.path.basename(pattern)) is None:
        raise ValueError(f"a PNG path must number its frames, as frame_%05d.png does, got {pattern}")
    return numbered(pattern, 0)


def numbered(pattern: str, number: int) -> str:
    """One file of a sequence; a percent sign in the name of its folder is no pattern."""
    folder, name = os.path.split(pattern)
    return os.path.join(folder, name % number)


def open_png(pattern: str, *, resume: bool, overwrite: bool) -> Output:
    """Prepare numbered files to be written or continued.

    Raises:
        ValueError: The pattern does not have exactly one number such as %05d.
    """
    first_png(pattern)
    beside = partial_path(pattern)
    finished, unfinished = numbers(pattern), numbers(beside)
    # Files that the end of an earlier run has renamed already are not in the way.
    renamed = min(unfinished, default=0)
    in_the_way = any(number >= renamed for number in finished) and not overwrite
    kept = 0 if overwrite and not resume else frames_in_png(pattern)
    refuse_existing(pattern, in_the_way, beside, kept > 0 and not resume)
    for number in unfinished:
        if number >= kept:
            os.remove(numbered(beside, number))
    return Output(
        pattern,
        kept,
        partial(_check, (_whole(beside, 0) or _whole(pattern, 0)) if kept else None, beside),
        partial(_save, beside, kept),
        lambda frames: _publish(pattern, beside),
    )


def frames_in_png(pattern: str) -> int:
    """How many whole frames in a row an unfinished sequence holds."""
    beside = partial_path(pattern)
    renamed = min(numbers(beside), default=0)
    count = 0
    while _whole(pattern if count < renamed else beside, count):
        count += 1
    return count


def numbers(pattern: str) -> list[int]:
    """The numbers of the files that there are of a pattern, ascending."""
    folder, name = os.path.split(pattern)
    parts = _NUMBERED.fullmatch(name)
    if parts is None or not os.path.isdir(folder or "."):
        return []
    before, after = (re.escape(parts[part].replace("%%", "%")) for part in ("before", "after"))
    found = [re.fullmatch(rf"{before}(\d+){after}", entry) for entry in os.listdir(folder or ".")]
    # A name such as frame_1.png is not of the pattern frame_%05d.png.
    return sorted(int(match[1]) for match in found if match and name % int(match[1]) == match[0])


def _whole(pattern: str, number: int) -> tuple[int, int, int] | None:
    """(height, width, bits) of a file that was written to its end, else None."""
    try:
        with open(numbered(pattern, number), "rb") as file:
            head = file.read(25)
            file.seek(max(0, os.fstat(file.fileno()).st_size - len(_END)))
            if not head.startswith(_SIGNATURE) or file.read() != _END:
                return None
    except FileNotFoundError:
        return None
    return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big"), head[24]


def _check(form: tuple[int, int, int] | None, path: str, frames: Frames) -> None:
    got = (*frames.shape[1:3], 8 * frames.dtype.itemsize)
    if form not in (None, got):
        raise ValueError(f"{path} was begun with (height, width, bits) {form}, got {got}; {BEGIN_AGAIN}")


def _save(pattern: str, kept: int, batches: Iterator[Frames]) -> None:
    for index, frame in enumerate((frame for batch in batches for frame in batch), kept):
        with open(numbered(pattern, index), "wb") as file:
            file.write(_png(frame))
            file.flush()
            flush_to_disk(file.fileno())


def _publish(pattern: str, beside: str) -> None:
    """Remove what an earlier, longer sequence left, then rename in order, so that a kill can be told."""
    unfinished = numbers(beside)
    for number in numbers(pattern):
        if number > unfinished[-1]:
            os.remove(numbered(pattern, number))
    for number in unfinished:
        os.replace(numbered(beside, number), numbered(pattern, number))
    if os.name == "posix":
        flush_to_disk(os.path.dirname(pattern) or ".")


def _png(pixels: Frames) -> bytes:
    import av

    height, width, _ = pixels.shape
    pixel_format = "rgb24" if pixels.dtype == np.uint8 else "rgb48be"
    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt = width, height, pixel_format
    context.time_base = Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=pixel_format)
    return b"".join(bytes(packet) for packet in (*context.encode(frame), *context.encode(None)))
