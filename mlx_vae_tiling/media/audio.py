"""The sound of a clip for .mp4 and .mov: copied where the container takes it, AAC otherwise."""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

if TYPE_CHECKING:
    from av import AudioFrame, AudioStream, Packet
    from av.container import InputContainer, OutputContainer


class AudioWarning(UserWarning):
    """Sound and pictures differ in length."""


_COPIED = {
    ".mp4": ("aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"),
    ".mov": ("aac", "mp3", "ac3", "eac3", "alac", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_f32le"),
}
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
# FFmpeg guesses how long these are, from their first packets.
_GUESSED_LENGTHS = ("aac", "ac3", "eac3", "mp3")
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
_AAC_BITS_PER_SECOND = 128_000  # of one channel
_TOLERANCE_SECONDS = 0.1
_PIECE_SAMPLES = 256
_SILENT_SAMPLES = 1 << 16


class Track(Protocol):
    """A sound being put into a file, from the start of the pictures on."""

    def until(self, seconds: float | Fraction, last: bool = False) -> Iterator[Packet[Any]]:
        """Packets that begin before `seconds`, each given once; `last` ends the sound there."""


@dataclass(frozen=True)
class Sound:
    """A file with sound, checked; frame 0 of the pictures lies `start` seconds after its beginning."""

    path: str
    start: Fraction
    seconds: float
    copied: bool

    def add_to(self, container: OutputContainer) -> Track:
        """Add a stream for it to a file."""
        return _Copied(self, container) if self.copied else _Encoded(self, container)

    def warn_of_length(self, clip_seconds: float) -> None:
        """Warn if sound and clip differ in length by more than 0.1 s."""
        difference = self.seconds - clip_seconds
        if abs(difference) > _TOLERANCE_SECONDS:
            what = "what is over is cut off" if difference > 0 else "the end is silent"
            warnings.warn(
                f"{self.path} has {self.seconds:.2f} s of sound for a clip of {clip_seconds:.2f} s: {what}",
                AudioWarning,
                stacklevel=3,
            )


def open_sound(path: str | os.PathLike[str], start_seconds: float, container_suffix: str) -> Sound:
    """Look into a file with sound.

    Args:
        path: Any file with a stream of sound that FFmpeg reads; a video too.
        start_seconds: Where in it the first frame lies; negative where the sound begins later.
        container_suffix: ".mp4" or ".mov".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or has no sound.
    """
    import av

    path = os.path.abspath(path)  # FFmpeg takes what stands before a colon for a protocol
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, "no such file with sound", path)
    if not os.path.isfile(path):
        raise ValueError(f"audio must be a file with sound, got {path}")
    try:
        start = Fraction(float(start_seconds))
    except (ValueError, OverflowError, TypeError) as error:
        raise ValueError(f"audio_start_seconds must be a number, got {start_seconds!r}") from error
    try:
        with av.open(path) as source:
            if not source.streams.audio:
                raise ValueError(f"audio must be a file with sound, {path} has none")
            stream = source.streams.audio[0]
            name = stream.codec_context.codec.canonical_name
            known = stream.duration and stream.time_base and source.format.name not in _GUESSED_LENGTHS
            seconds = float(stream.duration * stream.time_base) if known else _length(path)
            copied = name in _COPIED[container_suffix]
            if name == "aac" and not stream.codec_context.extradata:
                copied = False  # in .aac and .ts each packet has its own header, which .mp4 does not take
            return Sound(path, start, seconds, copied)
    except av.FFmpegError as error:
        raise ValueError(
            f"audio must be a file with sound, {path} cannot be read: {error.strerror}"
        ) from error


def _length(path: str) -> float:
    return max((float(end) for _, end, _ in _demux(path)), default=0.0)


def _origin(source: InputContainer) -> Fraction:
    """When a file's sound begins by its own clock: .mp3 has a delay there, which is none beside pictures."""
    stream = source.streams.audio[0]
    if source.streams.video or not stream.start_time or not stream.time_base:
        return Fraction(0)
    return stream.start_time * stream.time_base


def _demux(path: str) -> Iterator[tuple[Fraction, Fraction, Packet[Any]]]:
    """Packets of a file's first sound, with the times in seconds at which they begin and end."""
    import av

    with av.open(path) as source:
        origin = _origin(source)
        for packet in source.demux(source.streams.audio[0]):
            if packet.size and packet.pts is not None:
                begin = packet.pts * packet.time_base - origin
                yield begin, begin + (packet.duration or 0) * packet.time_base, packet


class _Copied:
    """Whole packets, from the one before the start on, since decoders need it; an edit list hides it."""

    def __init__(self, sound: Sound, container: OutputContainer):
        import av

        with av.open(sound.path) as source:
            stream = source.streams.audio[0]
            self._stream = container.add_stream_from_template(stream)
            context, packets = stream.codec_context, _demux(sound.path)
            if context.name.startswith("pcm_"):
                sample_bytes = context.channels * int(re.findall(r"\d+", context.name)[0]) // 8
                packets = _pieces(packets, context.sample_rate, sample_bytes)
        self._packets = _from(packets, sound.start)
        self._start = sound.start
        self._waiting: tuple[Fraction, Packet[Any]] | None = next(self._packets, None)

    def until(self, seconds: float | Fraction, last: bool = False) -> Iterator[Packet[Any]]:
        while self._waiting is not None and self._waiting[0] - self._start < seconds:
            begin, packet = self._waiting
            packet.pts = packet.dts = round((begin - self._start) / packet.time_base)
            packet.stream = self._stream
            self._waiting = next(self._packets, None)
            yield packet


def _from(
    packets: Iterator[tuple[Fraction, Fraction, Packet[Any]]], start: Fraction
) -> Iterator[tuple[Fraction, Packet[Any]]]:
    before = None
    for begin, end, packet in packets:
        if end <= start:
            before = begin, packet
            continue
        if before is not None:
            yield before
            before = None
        yield begin, packet


def _pieces(
    packets: Iterator[tuple[Fraction, Fraction, Packet[Any]]], rate: int, sample_bytes: int
) -> Iterator[tuple[Fraction, Fraction, Packet[Any]]]:
    """Packets of plain samples in small pieces, so that they can be cut."""
    import av

    for begin, _, packet in packets:
        data = bytes(packet)
        for at in range(0, len(data), _PIECE_SAMPLES * sample_bytes):
            piece = av.Packet(data[at : at + _PIECE_SAMPLES * sample_bytes])
            first = begin + Fraction(at // sample_bytes, rate)
            piece.time_base, piece.duration = Fraction(1, rate), piece.size // sample_bytes
            piece.pts, piece.is_keyframe = round(first * rate), True
            yield first, first + Fraction(piece.duration, rate), piece


class _Encoded:
    """Samples from the start on, exactly, as AAC."""

    def __init__(self, sound: Sound, container: OutputContainer):
        import av

        with av.open(sound.path) as source:
            context = source.streams.audio[0].codec_context
            # Where a file does not say which speakers, as many .wav, FFmpeg names only their number.
            self._layout = _LAYOUTS.get(context.channels, "stereo")
            rate = context.sample_rate
        self._rate = rate if rate in _AAC_RATES else 48000
        self._stream = cast("AudioStream", container.add_stream("aac", rate=self._rate))
        self._stream.codec_context.layout = self._layout
        channels = av.AudioLayout(self._layout).nb_channels
        self._stream.codec_context.bit_rate = _AAC_BITS_PER_SECOND * channels
        self._pieces = self._cut(sound)
        self._fed, self._rest = 0, np.zeros((channels, 0), np.float32)

    def until(self, seconds: float | Fraction, last: bool = False) -> Iterator[Packet[Any]]:
        stop = round(seconds * self._rate)
        while self._fed < stop:
            if not self._rest.shape[1]:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._rest = piece
            now = self._rest[:, : stop - self._fed]
            self._rest = self._rest[:, now.shape[1] :]
            yield from self._stream.encode(self._frame(now))
        if last:
            yield from self._stream.encode(None)

    def _frame(self, samples: np.ndarray[Any, Any]) -> AudioFrame:
        import av

        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = self._rate, self._fed, Fraction(1, self._rate)
        self._fed += samples.shape[1]
        return frame

    def _cut(self, sound: Sound) -> Iterator[np.ndarray[Any, Any]]:
        """Samples (channels, n) from the start on, silence first where the sound begins later."""
        import av

        resampler = av.AudioResampler("fltp", self._layout, self._rate)
        at = None
        with av.open(sound.path) as source:
            for frame in chain(source.decode(source.streams.audio[0]), [None]):
                for resampled in resampler.resample(frame):
                    samples = resampled.to_ndarray()
                    if at is None:
                        begin = Fraction(frame.pts or 0) * frame.time_base if frame and frame.time_base else 0
                        at = round((begin - _origin(source) - sound.start) * self._rate)
                        for silent in range(0, at, _SILENT_SAMPLES):
                            yield np.zeros((len(samples), min(_SILENT_SAMPLES, at - silent)), np.float32)
                    kept = samples[:, max(0, -at) :]
                    at += samples.shape[1]
                    if kept.shape[1]:
                        yield kept
