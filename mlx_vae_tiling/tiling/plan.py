"""Plans blended tiles: which latents each one takes, where its output goes, and with what weights."""

from collections.abc import Callable
from itertools import pairwise, product
from typing import NamedTuple

import mlx.core as mx

from mlx_vae_tiling.tiling.config import TilingConfig
from mlx_vae_tiling.tiling.intervals import (
    DimensionIntervals,
    map_spatial_slice,
    map_temporal_slice,
    split_in_spatial,
    split_in_temporal,
)


class AxisTile(NamedTuple):
    """One tile along one axis: its latents, its output pixels or frames, and their weights (float32)."""

    latents: slice
    output: slice
    weights: mx.array


class TilePlan(NamedTuple):
    """The tiles of each axis, in order; a tile of the video is one of each."""

    frames: list[AxisTile]
    rows: list[AxisTile]
    columns: list[AxisTile]


def plan_tiles(
    latent_shape: tuple[int, ...], config: TilingConfig, spatial_scale: int, temporal_scale: int
) -> TilePlan:
    """Split latents into tiles whose weights sum to one.

    Args:
        latent_shape: (B, C, F, H, W).
        config: Tile sizes and overlaps in output pixels and frames.
        spatial_scale: Pixels per latent.
        temporal_scale: Frames per latent frame, after the first, which gives one.

    Returns:
        The tiles of each axis.

    Raises:
        ValueError: If a tile size or overlap is not a multiple of its scale.
    """
    _, _, f, h, w = latent_shape
    for name, scale in (("spatial_scale", spatial_scale), ("temporal_scale", temporal_scale)):
        if scale < 1:
            raise ValueError(f"{name} must be at least 1, got {scale}")
    frames = split_in_temporal(f, 0, f)
    rows, columns = split_in_spatial(h, 0, h), split_in_spatial(w, 0, w)
    if (temporal := config.temporal_config) is not None:
        size = _in_latents("tile_size_in_frames", temporal.tile_size_in_frames, temporal_scale)
        overlap = _in_latents("tile_overlap_in_frames", temporal.tile_overlap_in_frames, temporal_scale)
        frames = split_in_temporal(size, overlap, f)
    if (spatial := config.spatial_config) is not None:
        size = _in_latents("tile_size_in_pixels", spatial.tile_size_in_pixels, spatial_scale)
        overlap = _in_latents("tile_overlap_in_pixels", spatial.tile_overlap_in_pixels, spatial_scale)
        rows, columns = split_in_spatial(size, overlap, h), split_in_spatial(size, overlap, w)
    return TilePlan(
        _plan_axis(frames, map_temporal_slice, temporal_scale),
        _plan_axis(rows, map_spatial_slice, spatial_scale),
        _plan_axis(columns, map_spatial_slice, spatial_scale),
    )


def blending_bytes(
    plan: TilePlan, planes: int, itemsize: int, decoding: Callable[[int, int, int], int], finishing: int
) -> int:
    """The most that `iter_decode_with_tiling`, its decoder and the consumer of a piece hold at once.

    Args:
        plan: The tiles.
        planes: Batch times channels of the output.
        itemsize: Bytes per value of the finished pieces.
        decoding: What decoding a tile of so many latents takes, by frames, height and width.
        finishing: What the consumer takes beside a piece.
    """
    frame = 4 * planes * int(plan.rows[-1].output.stop * plan.columns[-1].output.stop)
    starts = [int(tile.output.start) for tile in plan.frames] + [int(plan.frames[-1].output.stop)]
    alone = sum(map(len, plan)) == 3
    peak = carry = 0
    for time, (start, end) in zip(plan.frames, pairwise(starts), strict=True):
        frames = _length(time.output)
        group, held, unfinished = 0 if alone else frame * frames, carry, carry
        for rows, columns in product(plan.rows, plan.columns):
            plane = 4 * frames * _length(rows.output) * _length(columns.output)
            tile = planes * plane
            latents = (_length(axis.latents) for axis in (time, rows, columns))
            # The pieces of a tile are joined, added to the group and weighted in place.
            peak = max(peak, held + max(decoding(*latents), 2 * tile))
            # What is unfinished goes when the group is there, and only then come the weights.
            peak = max(peak, group + tile + max(unfinished, 0 if alone else plane))
            held, unfinished = group, 0
        carry, piece = frame * (start + frames - end), frame * (end - start)
        rounding = piece // 2 if itemsize < 4 else 0
        peak = max(peak, carry + piece + rounding + finishing)
    return peak


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _in_latents(name: str, value: int, scale: int) -> int:
    if value % scale:
        scale_name = "spatial_scale" if name.endswith("pixels") else "temporal_scale"
        raise ValueError(
            f"{name} must be divisible by {scale_name}, got {value} and {scale}; use a multiple of {scale}"
        )
    return value // scale


def _plan_axis(
    intervals: DimensionIntervals,
    map_slice: Callable[[int, int, int, int, int], tuple[slice, mx.array]],
    scale: int,
) -> list[AxisTile]:
    bounds = list(zip(intervals.starts, intervals.ends, strict=True))
    ramps = zip(intervals.left_ramps, intervals.right_ramps, strict=True)
    mapped = [map_slice(*bound, *ramp, scale) for bound, ramp in zip(bounds, ramps, strict=True)]
    total = mx.zeros(mapped[-1][0].stop)
    for output, mask in mapped:
        total = total.at[output].add(mask)
    # Divided by their sum, the weights of an axis sum to one, and so do their products over the axes.
    tiles = [
        AxisTile(slice(*bound), output, mask / total[output])
        for bound, (output, mask) in zip(bounds, mapped, strict=True)
    ]
    mx.eval([tile.weights for tile in tiles])
    return tiles
