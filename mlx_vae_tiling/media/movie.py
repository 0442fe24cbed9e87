"""Frames as .mp4 or .mov, playable while it grows, continued without encoding a frame twice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from .audio import Sound, Track
from .encoders import Encoding, choose_encoding, converter
from .kept import Kept, read_kept
from .places import (
    BEGIN_AGAIN,
    Frames,
    Output,
    flush_to_disk,
    is_device,
    partial_path,
    refuse_existing,
    replace_durably,
)

if TYPE_CHECKING:
    from av import Packet, VideoStream
    from av.container import OutputContainer

# Fragments reach the disk as they are made; closing turns the file into a plain one (FFmpeg 7.1 on).
# With the header delayed to the first fragment, an edit list lets B-frames and the sound start at time 0.
# Fragments smaller than a group of pictures (frag_duration) can cost the last frame: the muxer then takes the
# clip's end from the last fragment, where the last frame need not be.
_MUXER_OPTIONS = {
    "movflags": "+hybrid_fragmented+frag_keyframe+delay_moov",
    "flush_packets": "1",
    # In units of this the edit list says where sound begins: exact for most, not to a millisecond.
    "movie_timescale": "48000",
    # Pictures must not wait in memory for sound that has ended.
    "max_interleave_delta": "500000",
}
# Decoding times are ours: x265 gives arbitrary ones to clips of two frames, which the muxer aborts at, and
# those of a continued file must go on. No encoder here reorders by more frames.
_REORDERED_FRAMES = 4
_SECONDS_TO_OVERTAKE = 3


@dataclass(frozen=True)
class Movie:
    """How a video is made: "mp4" or "mov", "h264", "hevc" or "prores", frames per second, rate factor."""

    container: str
    codec: str
    rate: Fraction
    quality: float
    sound: Sound | None = None
    clip_seconds: float | None = None


def open_movie(path: str, movie: Movie, *, resume: bool, overwrite: bool) -> Output:
    """Prepare a video to be written or continued.

    Args:
        path: Absolute and without links; in a relative one FFmpeg takes what stands before a colon for a
            protocol.
        movie: How it is made.
        resume, overwrite: As `open_video`.

    Raises:
        ValueError: What an earlier run has left cannot be continued with these settings.
    """
    if movie.sound and movie.clip_seconds is not None:
        movie.sound.warn_of_length(movie.clip_seconds)
    if is_device(path):
        save = partial(_save, path, path, movie, None)
        return Output(path, 0, lambda frames: None, save, lambda frames: None)
    beside = partial_path(path)
    exists = os.path.exists(path) and not overwrite
    kept = None if overwrite and not resume else _settle(beside)
    refuse_existing(path, exists, beside, kept is not None and not resume)
    if kept is None:
        _remove(beside)
        _remove(_fresh(beside))
    else:
        _encoding_of(kept, movie)
    return Output(
        path,
        kept.frames if kept else 0,
        partial(_check, kept, movie),
        partial(_save, beside, _fresh(beside) if kept else beside, movie, kept),
        partial(_publish, beside, path, movie),
    )


def frames_in_movie(path: str) -> int:
    """How many frames an unfinished video holds that can be continued."""
    kept = _settle(partial_path(path))
    return kept.frames if kept else 0


def _fresh(beside: str) -> str:
    """Where a continued file is begun again, until it holds all that the old one does."""
    return partial_path(beside)


def _settle(beside: str) -> Kept | None:
    """Leave one of the two files that a killed continuation has left: the one with more frames."""
    old, new = (read_kept(path) if os.path.exists(path) else None for path in (beside, _fresh(beside)))
    if new is None or (old is not None and old.frames > new.frames):
        _remove(_fresh(beside))
        return old
    os.replace(_fresh(beside), beside)
    return read_kept(beside)


@contextlib.contextmanager
def _closing(file: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(file)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _encoding_of(kept: Kept, movie: Movie) -> Encoding:
    """The encoding that continues a file.

    Raises:
        ValueError: There is none: the file was begun with another encoder, quality or rate.
    """
    if kept.codec == movie.codec:
        for itemsize in (1, 2):
            encoding = choose_encoding(movie.codec, kept.size, itemsize, movie.rate, movie.quality)
            if kept.fits(encoding):
                return encoding
    raise ValueError(
        f"{kept.path} was begun with another codec, frame rate, quality or version of the encoder and cannot "
        f"be continued with these; {BEGIN_AGAIN}"
    )


def _check(kept: Kept | None, movie: Movie, frames: Frames) -> None:
    if kept is None:
        return
    height, width = frames.shape[1:3]
    if not kept.fits(_encoding_for(movie, frames)):
        raise ValueError(
            f"{kept.path} was begun with frames of height, width and bits {(*kept.size, kept.bits)}, "
            f"got {height, width} {frames.dtype}; {BEGIN_AGAIN}"
        )


def _encoding_for(movie: Movie, frames: Frames) -> Encoding:
    height, width = frames.shape[1:3]
    return choose_encoding(movie.codec, (height, width), frames.dtype.itemsize, movie.rate, movie.quality)


def _publish(beside: str, path: str, movie: Movie, frames: int) -> None:
    replace_durably(beside, path)
    if movie.sound and movie.clip_seconds is None:
        movie.sound.warn_of_length(float(movie.sound.start + frames / movie.rate))


def _save(beside: str, target: str, movie: Movie, kept: Kept | None, batches: Iterator[Frames]) -> None:
    """Encode batches of frames (f, H, W, 3) into `target`, after those kept; it replaces `beside`."""
    import av

    first = next(batches, None)
    if first is not None:
        encoding = _encoding_for(movie, first)
    elif kept is not None and not (kept.closed and movie.sound is None):
        encoding = _encoding_of(kept, movie)
    else:
        return  # nothing is missing, or there is nothing
    begun = kept.frames if kept else 0
    file = os.open(target, os.O_RDWR | os.O_CREAT, 0o666)
    with (
        _closing(file),
        av.open(target, "w", movie.container, options=_MUXER_OPTIONS) as container,
    ):
        stream = container.add_stream(encoding.encoder.name, rate=movie.rate)
        encoding.set_up(stream.codec_context)
        track = movie.sound.add_to(container) if movie.sound else None
        packets = chain(kept.packets() if kept else (), _encode(stream, encoding, begun, first, batches))
        for count in _mux(container, stream, movie.rate, track, packets):
            seconds = (count - begun) / movie.rate
            if count % max(1, round(movie.rate / 2)) == 0:
                flush_to_disk(file)
            # By now the muxer has given all that was kept to the disk.
            if target != beside and os.path.exists(target) and seconds >= _SECONDS_TO_OVERTAKE:
                os.replace(target, beside)
    if target != beside and os.path.exists(target):
        os.replace(target, beside)


def _encode(
    stream: VideoStream, encoding: Encoding, begun: int, first: Frames | None, batches: Iterator[Frames]
) -> Iterator[Packet[Any]]:
    if first is None:
        return
    convert = converter(encoding, first.dtype)
    for index, pixels in enumerate((frame for batch in chain([first], batches) for frame in batch), begun):
        frame = convert(pixels)
        frame.pts, frame.time_base = index, 1 / encoding.rate
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _mux(
    container: OutputContainer,
    stream: VideoStream,
    rate: Fraction,
    track: Track | None,
    packets: Iterator[Packet[Any]],
) -> Iterator[int]:
    """Put pictures and sound into a file in the order of time; yield the number of pictures so far."""
    count = 0
    for count, packet in enumerate(packets, 1):
        packet.stream, packet.time_base, packet.duration = stream, 1 / rate, 1
        packet.dts = count - 1 - _REORDERED_FRAMES
        if track is not None:
            container.mux(list(track.until(packet.dts / rate)))
        container.mux(packet)
        yield count
    if track is not None:
        container.mux(list(track.until(count / rate, last=True)))
