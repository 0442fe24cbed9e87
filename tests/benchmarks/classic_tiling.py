"""The classic way to blend tiles: a float32 video and float32 weights for every pixel, divided at the end."""

import itertools
from collections.abc import Callable

import mlx.core as mx

from mlx_vae_tiling import (
    TilingConfig,
    map_spatial_slice,
    map_temporal_slice,
    split_in_spatial,
    split_in_temporal,
)


def classic_decode(
    decoder_fn: Callable[[mx.array], mx.array], latents: mx.array, config: TilingConfig
) -> mx.array:
    """Decode with two buffers as long as the video, at the scales of LTX."""
    b, _, f, h, w = latents.shape
    space, time = config.spatial_config, config.temporal_config
    frames = split_in_temporal(time.tile_size_in_frames // 8, time.tile_overlap_in_frames // 8, f)
    size, overlap = space.tile_size_in_pixels // 32, space.tile_overlap_in_pixels // 32
    axes = [(frames, map_temporal_slice, 8)]
    axes += [(split_in_spatial(size, overlap, n), map_spatial_slice, 32) for n in (h, w)]
    video = mx.zeros((b, 3, 1 + (f - 1) * 8, h * 32, w * 32))
    total = mx.zeros((b, 1, *video.shape[2:]))
    for tile in itertools.product(*(_tiles(*axis) for axis in axes)):
        (t, h, w), outputs, (t_mask, h_mask, w_mask) = zip(*tile, strict=True)
        mask = t_mask[:, None, None] * h_mask[:, None] * w_mask
        decoded = decoder_fn(latents[:, :, t, h, w]) * mask
        where = (slice(None), slice(None), *outputs)
        video[where] = video[where] + decoded
        total[where] = total[where] + mask
        mx.eval(video, total)
        mx.clear_cache()
    video = video / mx.maximum(total, 1e-8)
    mx.eval(video)
    return video


def _tiles(intervals, map_slice, scale):
    spans = zip(intervals.starts, intervals.ends, intervals.left_ramps, intervals.right_ramps, strict=True)
    return [(slice(start, end), *map_slice(start, end, *ramps, scale)) for start, end, *ramps in spans]
