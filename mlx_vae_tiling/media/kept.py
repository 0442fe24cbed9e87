"""What an interrupted .mp4 or .mov still holds: its finished frames, as packets that are not encoded again.

A file that grows is a row of fragments, each a `moof` box with an `mdat` box of packets. Any packets from the
first on can be decoded without those that follow, so a file is continued after the longest run of whole
packets that has no frame missing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from .encoders import Encoding
from .places import BEGIN_AGAIN

if TYPE_CHECKING:
    from av import Packet

_PARAMETER_SETS = {"h264": (0x1F, (7, 8)), "hevc": (0x7E, (64, 66, 68))}


@dataclass(frozen=True)
class Kept:
    """Frames that an unfinished file holds.

    Attributes:
        path: The file.
        frames: How many, from the first on.
        codec: Their codec, as FFmpeg names it.
        size: Their height and width.
        bits: Bits of a component.
        rate: Frames per second; None of a single frame.
        parameters: Parameter sets of the codec, as the file has them.
        closed: Whether it is a file that was closed, of pictures alone: it lacks nothing but frames.
    """

    path: str
    frames: int
    codec: str
    size: tuple[int, int]
    bits: int
    rate: Fraction | None
    parameters: bytes
    closed: bool

    def fits(self, encoding: Encoding) -> bool:
        """Whether what this encoding gives can follow in the same file."""
        if (self.size, self.bits) != (encoding.size, encoding.bits):
            return False
        if self.rate not in (None, encoding.rate):
            return False
        if self.codec not in _PARAMETER_SETS:
            return True
        mask, kinds = _PARAMETER_SETS[self.codec]
        units = re.split(rb"\x00\x00\x01", encoding.open().extradata or b"")
        needed = [unit.rstrip(b"\x00") for unit in units if unit and unit[0] & mask in kinds]
        return bool(needed) and all(unit in self.parameters for unit in needed)

    def packets(self) -> Iterator[Packet[Any]]:
        """The packets in the order of decoding, as an encoder gives them: times are numbers of frames."""
        import av

        for number, packet in islice(_numbered(self.path), self.frames):
            data = bytes(packet)
            same = av.Packet(_with_start_codes(data) if self.codec in _PARAMETER_SETS else data)
            same.pts, same.is_keyframe = number, packet.is_keyframe
            yield same


def read_kept(path: str) -> Kept | None:
    """What an interrupted file holds, None if no frame; what was cut off at its end is removed.

    Raises:
        ValueError: The file is damaged in another way.
    """
    import av

    end, closed = _end_of_whole_boxes(path)
    if not end:
        return None
    os.truncate(path, end)
    try:
        last, frames = -1, 0
        for count, (number, _) in enumerate(_numbered(path), 1):
            last = max(last, number)
            if last == count - 1:
                frames = count
        if not frames:
            return None
        with av.open(path) as container:
            context = container.streams.video[0].codec_context
            return Kept(
                path,
                frames,
                context.codec.canonical_name,
                (context.height, context.width),
                context.format.components[0].bits,
                _rate(path),
                context.extradata or b"",
                closed and frames == count and not container.streams.audio,
            )
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(
            f"{path} is no unfinished video that can be continued ({error}); {BEGIN_AGAIN}"
        ) from error


def _numbered(path: str) -> Iterator[tuple[int, Packet[Any]]]:
    """Packets of a file with the number of their frame."""
    step, first = _step(path)
    for packet in _demux(path):
        assert packet.pts is not None
        number, rest = divmod(packet.pts - first, step)
        if rest:
            return
        yield number, packet


def _demux(path: str) -> Iterator[Packet[Any]]:
    import av

    with av.open(path) as container:
        for packet in container.demux(container.streams.video[0]):
            if packet.size and packet.pts is not None:
                yield packet


def _step(path: str, looked_at: int = 32) -> tuple[int, int]:
    """Time between two frames and time of the first one, in units of the stream."""
    times = sorted(packet.pts or 0 for packet in islice(_demux(path), looked_at))
    steps = [after - before for before, after in pairwise(times)]
    return min(steps, default=1) or 1, times[0] if times else 0


def _rate(path: str) -> Fraction | None:
    packets = list(islice(_demux(path), 2))
    if len(packets) < 2:
        return None
    time_base = packets[0].time_base
    return 1 / (_step(path)[0] * time_base)


def _with_start_codes(data: bytes) -> bytes:
    """Units of H.264 and HEVC, which a file stores after their lengths, as an encoder gives them."""
    units, at = [], 0
    while at + 4 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        units.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return b"".join(b"\x00\x00\x00\x01" + unit for unit in units)


def _end_of_whole_boxes(path: str) -> tuple[int, bool]:
    """Where the last whole fragment ends, 0 before the first, or a file that was closed; which of the two."""
    size, at, end, described, closed = os.path.getsize(path), 0, 0, False, False
    with open(path, "rb") as file:
        while at + 8 <= size:
            file.seek(at)
            head = file.read(16)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length < 8 or at + length > size:
                break
            at += length
            if kind == b"moov" and not described:
                # That of a closed file lies behind its packets.
                described, closed = True, end > 0
                end = at if closed else 0
            elif kind == b"mdat":
                end = at
    return (end, closed) if described else (0, False)
