"""Splits an axis of the latents into overlapping intervals and maps them to output pixels or frames."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_vae_tiling.arguments import told, whole
from mlx_vae_tiling.tiling.masks import LARGEST_LENGTH, compute_trapezoidal_mask_1d


@dataclass(frozen=True)
class DimensionIntervals:
    """Overlapping intervals of one axis, in latents: one entry per tile, in order.

    Attributes:
        starts: First latent of each tile.
        ends: One past the last latent of each tile.
        left_ramps: Latents each tile shares with its predecessor, 0 for the first tile.
        right_ramps: Latents each tile shares with its successor, 0 for the last tile.
    """

    starts: list[int]
    ends: list[int]
    left_ramps: list[int]
    right_ramps: list[int]


def split_in_spatial(size: int, overlap: int, dimension_size: int) -> DimensionIntervals:
    """Split height or width into tiles of stride size - overlap, the last one ending at the border.

    Args:
        size: Latents per tile.
        overlap: Latents that neighbouring tiles share, below the size.
        dimension_size: Latents of the axis.

    Returns:
        One interval if the axis fits into a tile, else ceil((dimension_size - overlap) / (size - overlap)).

    Raises:
        ValueError: If the overlap is not in [0, size) or the axis is empty.

    Example:
        >>> split_in_spatial(4, 1, 9)
        DimensionIntervals(starts=[0, 3, 6], ends=[4, 7, 9], left_ramps=[0, 1, 1], right_ramps=[1, 1, 0])
    """
    size, overlap = whole("size", size), whole("overlap", overlap)
    dimension_size = whole("dimension_size", dimension_size)
    if not 0 <= overlap < size:
        raise ValueError(f"overlap must be at least 0 and less than size, got {overlap} and {size}")
    if dimension_size <= 0:
        raise ValueError(f"dimension_size must be positive, got {dimension_size}")
    if dimension_size > LARGEST_LENGTH:
        raise ValueError(f"dimension_size must be at most {LARGEST_LENGTH}, got {told(dimension_size)}")
    if dimension_size <= size:
        return DimensionIntervals([0], [dimension_size], [0], [0])
    stride = size - overlap
    starts = list(range(0, dimension_size - overlap, stride))
    shared = [overlap] * (len(starts) - 1)
    ends = [start + size for start in starts[:-1]] + [dimension_size]
    return DimensionIntervals(starts, ends, [0, *shared], [*shared, 0])


def split_in_temporal(size: int, overlap: int, dimension_size: int) -> DimensionIntervals:
    """Split latent frames as `split_in_spatial` does, with every tile but the first starting one earlier.

    The first latent of a tile decodes to one frame instead of `temporal_scale`, so a later tile takes one
    latent more, and its left ramp is one longer.

    Args:
        size: Latent frames per tile.
        overlap: Latent frames that neighbouring tiles share, below the size.
        dimension_size: Latent frames of the video.

    Returns:
        The intervals.

    Raises:
        ValueError: If the overlap is not in [0, size) or the axis is empty.

    Example:
        >>> split_in_temporal(4, 1, 9)
        DimensionIntervals(starts=[0, 2, 5], ends=[4, 7, 9], left_ramps=[0, 2, 2], right_ramps=[1, 1, 0])
    """
    intervals = split_in_spatial(size, overlap, dimension_size)
    starts = [0] + [start - 1 for start in intervals.starts[1:]]
    left_ramps = [0] + [ramp + 1 for ramp in intervals.left_ramps[1:]]
    return DimensionIntervals(starts, intervals.ends, left_ramps, intervals.right_ramps)


def map_spatial_slice(
    begin: int, end: int, left_ramp: int, right_ramp: int, scale: int
) -> tuple[slice, mx.array]:
    """Map an interval of latents to pixels.

    Args:
        begin: First latent.
        end: One past the last latent.
        left_ramp: Latents of the fade in.
        right_ramp: Latents of the fade out.
        scale: Pixels per latent.

    Returns:
        The slice of pixels, and its mask of shape (pixels,), float32.

    Raises:
        ValueError: If the interval is empty, or a number has no meaning.

    Example:
        >>> map_spatial_slice(1, 3, 1, 0, 2)
        (slice(2, 6, None), array([0.333333, 0.666667, 1, 1], dtype=float32))
    """
    begin, end, left_ramp, right_ramp, scale = _whole_interval(begin, end, left_ramp, right_ramp, scale)
    pixels = slice(begin * scale, end * scale)
    mask = compute_trapezoidal_mask_1d(pixels.stop - pixels.start, left_ramp * scale, right_ramp * scale)
    return pixels, mask


def map_temporal_slice(
    begin: int, end: int, left_ramp: int, right_ramp: int, scale: int
) -> tuple[slice, mx.array]:
    """Map an interval of latent frames to frames: its first latent gives one frame, the others `scale` each.

    Args:
        begin: First latent frame.
        end: One past the last latent frame.
        left_ramp: Latent frames of the fade in.
        right_ramp: Latent frames of the fade out.
        scale: Frames per latent frame.

    Returns:
        The slice of frames, and its mask of shape (frames,), float32.

    Raises:
        ValueError: If the interval is empty, or a number has no meaning.

    Example:
        >>> map_temporal_slice(1, 3, 2, 0, 4)
        (slice(4, 9, None), array([0, 0.2, 0.4, 0.6, 0.8], dtype=float32))
    """
    begin, end, left_ramp, right_ramp, scale = _whole_interval(begin, end, left_ramp, right_ramp, scale)
    frames = slice(begin * scale, 1 + (end - 1) * scale)
    left = 1 + (left_ramp - 1) * scale if left_ramp > 0 else 0
    mask = compute_trapezoidal_mask_1d(
        frames.stop - frames.start, left, right_ramp * scale, left_starts_from_0=True
    )
    return frames, mask


def _whole_interval(
    begin: int, end: int, left_ramp: int, right_ramp: int, scale: int
) -> tuple[int, int, int, int, int]:
    begin, end, scale = whole("begin", begin), whole("end", end), whole("scale", scale)
    left_ramp, right_ramp = whole("left_ramp", left_ramp), whole("right_ramp", right_ramp)
    for name, value in (("begin", begin), ("left_ramp", left_ramp), ("right_ramp", right_ramp)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {told(value)}")
    if end <= begin:
        raise ValueError(f"end must be greater than begin, got {told(end)} and {told(begin)}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {told(scale)}")
    return begin, end, left_ramp, right_ramp, scale
