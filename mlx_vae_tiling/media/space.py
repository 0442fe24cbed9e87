"""The room on the disk that an output needs."""

from __future__ import annotations

import os

import numpy as np

# Bits of a pixel at quality 18, with libx264 and libx265: 0.4 of the demonstration clip, 0.1 to 1.5 of
# smooth pictures with little and with much grain. Six steps of quality halve or double it.
_BITS_PER_PIXEL = 0.5
# ProRes 422 HQ of pure noise: 6.2 for small frames, 4 for 1920x1088.
_PRORES_BITS_PER_PIXEL = 6.3
_ALLOCATION_BYTES = 4096


def disk_bytes(
    path: str | os.PathLike[str],
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic] | str = "uint8",
    *,
    codec: str | None = None,
    quality: float | None = None,
) -> int:
    """Room on the disk that frames need in the form that the path says.

    Args:
        path: As `open_video` takes it.
        shape: (frames, height, width, 3).
        dtype: uint8 or uint16.
        codec, quality: As `open_video` takes them.

    Returns:
        Bytes: exact for `.npy`; for PNG and ProRes the most they can take; for H.264 and HEVC what common
        clips need, though strong grain takes three times that. A video that is continued takes that twice.
    """
    frames, height, width, channels = shape
    itemsize = np.dtype(dtype).itemsize
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix == ".npy":
        return frames * height * width * channels * itemsize + 128
    pixels = frames * height * width
    if suffix == ".mov" and codec in (None, "prores"):
        return int(pixels * _PRORES_BITS_PER_PIXEL / 8) + _ALLOCATION_BYTES * (1 + frames)
    if suffix in (".mp4", ".mov"):
        bits = _BITS_PER_PIXEL * 2 ** ((18 - (quality or 18)) / 6)
        return int(pixels * bits / 8) + _ALLOCATION_BYTES
    # PNG: each row has one byte more; zlib stores what it cannot shrink in blocks of 16 KiB or more.
    image = height * (1 + width * channels * itemsize)
    return frames * (image + image // 1000 + _ALLOCATION_BYTES)
