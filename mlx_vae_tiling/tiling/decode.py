"""Decodes planned tiles one by one, blends them, and yields frames as they finish."""

import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from mlx_vae_tiling.arguments import require, told, whole
from mlx_vae_tiling.tiling.config import TilingConfig
from mlx_vae_tiling.tiling.plan import AxisTile, TilePlan, plan_tiles

logger = logging.getLogger(__name__)

LARGEST_SCALE = 2**12
"""No decoder comes near; sizes far beyond it do not fit into 32 bits."""

OnFramesReady = Callable[[mx.array, int], object]


def iter_decode_with_tiling(
    decoder_fn: Callable[..., mx.array],
    latents: mx.array,
    tiling_config: TilingConfig | None,
    spatial_scale: int = 32,
    temporal_scale: int = 8,
    causal: bool = False,
    timestep: mx.array | None = None,
    debug: bool = False,
    on_frames_ready: OnFramesReady | None = None,
    *,
    chunked_conv: bool = False,
) -> Iterator[mx.array]:
    """Decode latents in tiles blended in float32, and yield frames as soon as no later tile changes them.

    Holds the output of one temporal tile, which includes the unfinished overlap, and never the whole video.

    Args:
        decoder_fn: Maps (B, C, f, h, w) latents to (B, C_out, 1 + (f - 1) * temporal_scale,
            h * spatial_scale, w * spatial_scale). It gets `causal`, `timestep`, `debug` and `chunked_conv`
            as keywords, each only if its signature takes it and no `functools.partial` has bound it; and
            `position`, the latent frame, row and column at which the tile begins, if that is a parameter.
        latents: Array of shape (B, C, F, H, W).
        tiling_config: Tile sizes and overlaps in output pixels and frames, or None to decode in one call.
        spatial_scale: Pixels per latent.
        temporal_scale: Frames per latent frame, after the first, which gives one.
        causal: Passed to the decoder function.
        timestep: Passed to the decoder function.
        debug: Report every tile through `logging`; also passed to the decoder function.
        on_frames_ready: Called with each piece and the index of its first frame, before it is yielded.
        chunked_conv: Passed to the decoder function, for decoders of mlx-video.

    Returns:
        Iterator over (B, C_out, f, H_out, W_out) pieces in order, in the dtype of the latents.

    Raises:
        TypeError: If an argument, or what the decoder function returns, is of another type.
        ValueError: If the latents are not of rank 5 or not floating point, a tile is not a multiple of the
            scale, or the decoder function returns another shape than expected.

    Example:
        >>> upscale = lambda tile: mx.repeat(mx.repeat(mx.repeat(tile, 8, 2)[:, :, 7:], 32, 3), 32, 4)
        >>> latents, tiling = mx.ones((1, 3, 9, 2, 2)), TilingConfig.temporal_only(32, 8)
        >>> [piece.shape for piece in iter_decode_with_tiling(upscale, latents, tiling)]
        [(1, 3, 16, 64, 64), (1, 3, 24, 64, 64), (1, 3, 25, 64, 64)]
    """
    require("decoder_fn", decoder_fn, "a function of latents", Callable)
    require("latents", latents, "an mx.array, which mx.array(x) makes", mx.array)
    require("tiling_config", tiling_config, "a TilingConfig or None", TilingConfig, None)
    require("on_frames_ready", on_frames_ready, "a function or None", Callable, None)
    for name, scale in (("spatial_scale", spatial_scale), ("temporal_scale", temporal_scale)):
        if whole(name, scale) > LARGEST_SCALE:
            raise ValueError(f"{name} must be at most {LARGEST_SCALE}, got {told(scale)}")
    if latents.ndim != 5 or 0 in latents.shape:
        raise ValueError(f"latents must have a non-empty shape (B, C, F, H, W), got {latents.shape}")
    if not mx.issubdtype(latents.dtype, mx.floating):
        raise ValueError(f"latents must be floating point, as the frames are, got {latents.dtype}")
    options = {"causal": causal, "timestep": timestep, "debug": debug}
    if chunked_conv:
        options["chunked_conv"] = True
    decode = functools.partial(decoder_fn, **_accepted(decoder_fn, options))
    plan = plan_tiles(latents.shape, tiling_config or TilingConfig(), int(spatial_scale), int(temporal_scale))
    placed = "position" in _accepted(decoder_fn, {"position": None}, by_name=True)
    decode_tile = functools.partial(_decode_tile, decode, latents, debug, placed)
    one_tile = all(len(axis) == 1 for axis in plan)
    pieces = map(decode_tile, *plan) if one_tile else _decode_groups(decode_tile, plan)
    return _finish(pieces, latents.dtype, on_frames_ready)


def decode_with_tiling(
    decoder_fn: Callable[..., mx.array],
    latents: mx.array,
    tiling_config: TilingConfig | None,
    spatial_scale: int = 32,
    temporal_scale: int = 8,
    causal: bool = False,
    timestep: mx.array | None = None,
    debug: bool = False,
    on_frames_ready: OnFramesReady | None = None,
    *,
    chunked_conv: bool = False,
) -> mx.array:
    """Decode latents in blended tiles to a whole video: the pieces of `iter_decode_with_tiling`, joined.

    Args:
        decoder_fn: See `iter_decode_with_tiling`, as for all other arguments.
        latents: Array of shape (B, C, F, H, W).
        tiling_config: Tile sizes and overlaps in output pixels and frames, or None to decode in one call.
        spatial_scale: Pixels per latent.
        temporal_scale: Frames per latent frame, after the first, which gives one.
        causal: Passed to the decoder function.
        timestep: Passed to the decoder function.
        debug: Report every tile through `logging`; also passed to the decoder function.
        on_frames_ready: Called with each finished piece and the index of its first frame, in order.
        chunked_conv: Passed to the decoder function, for decoders of mlx-video.

    Returns:
        Array of shape (B, C_out, 1 + (F - 1) * temporal_scale, H * spatial_scale, W * spatial_scale), in the
        dtype of the latents.

    Raises:
        TypeError, ValueError: As `iter_decode_with_tiling`.

    Example:
        >>> upscale = lambda tile: mx.repeat(mx.repeat(mx.repeat(tile, 8, 2)[:, :, 7:], 32, 3), 32, 4)
        >>> latents, tiling = mx.ones((1, 3, 9, 2, 2)), TilingConfig.temporal_only(32, 8)
        >>> decode_with_tiling(upscale, latents, tiling).shape
        (1, 3, 65, 64, 64)
    """
    pieces = iter_decode_with_tiling(
        decoder_fn,
        latents,
        tiling_config,
        spatial_scale,
        temporal_scale,
        causal,
        timestep,
        debug,
        on_frames_ready,
        chunked_conv=chunked_conv,
    )
    frames = 1 + (latents.shape[2] - 1) * temporal_scale
    video, start = mx.zeros(0), 0
    for piece in pieces:
        b, c, f, h, w = piece.shape
        if f == frames:
            return piece
        if start == 0:
            video = mx.zeros((b, c, frames, h, w), dtype=piece.dtype)
        video[:, :, start : start + f] = piece
        mx.eval(video)
        start += f
        del piece
    return video


def _accepted(
    decoder_fn: Callable[..., mx.array], options: dict[str, Any], by_name: bool = False
) -> dict[str, Any]:
    """The options that a function takes: by name, or also by `**`."""
    try:
        parameters = inspect.signature(decoder_fn).parameters.values()
    except (TypeError, ValueError):
        return {}
    bound = decoder_fn.keywords if isinstance(decoder_fn, functools.partial) else {}
    takes_any = not by_name and any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {k: v for k, v in options.items() if (takes_any or k in names) and k not in bound}


def _decode_groups(decode_tile: Callable[..., mx.array], plan: TilePlan) -> Iterator[mx.array]:
    carry: mx.array | None = None
    channels: int | None = None
    ends = [tile.output.start for tile in plan.frames[1:]] + [plan.frames[-1].output.stop]
    for time, end in zip(plan.frames, ends, strict=True):
        start, stop = time.output.start, time.output.stop
        group: list[mx.array] = []
        for rows, columns in itertools.product(plan.rows, plan.columns):
            tile = decode_tile(time, rows, columns, channels)
            if not group:
                b, channels = tile.shape[:2]
                shape = b, channels, stop - start, plan.rows[-1].output.stop, plan.columns[-1].output.stop
                group = _open_group(carry, shape, end - start)
                carry = None
            weights = time.weights[:, None, None] * rows.weights[:, None] * columns.weights
            tile = tile.astype(mx.float32) * weights
            _accumulate(group, tile, rows.output, columns.output)
            del tile, weights
        if end < stop:
            carry = group.pop()
        if group:
            yield group.pop()


def _open_group(carry: mx.array | None, shape: tuple[int, ...], finished: int) -> list[mx.array]:
    # Frames that finish with this group and frames that do not lie in two buffers, so neither is ever copied.
    b, c, frames, h, w = shape
    group = []
    for begin, end in ((0, finished), (finished, frames)):
        if begin == end:
            continue
        part = mx.zeros((b, c, end - begin, h, w))
        if carry is not None and begin < carry.shape[2]:
            part = part.at[:, :, : carry.shape[2] - begin].add(carry[:, :, begin:end])
        group.append(part)
    mx.eval(group)
    return group


def _accumulate(group: list[mx.array], tile: mx.array, rows: slice, columns: slice) -> None:
    # Only an array without other references is updated in place.
    begin = 0
    for i in range(len(group)):
        end = begin + group[i].shape[2]
        group[i] = group[i].at[:, :, :, rows, columns].add(tile[:, :, begin:end])
        begin = end
    mx.eval(group)


def _decode_tile(
    decode: Callable[..., mx.array],
    latents: mx.array,
    debug: bool,
    placed: bool,
    time: AxisTile,
    rows: AxisTile,
    columns: AxisTile,
    channels: int | None = None,
) -> mx.array:
    tile = latents[:, :, time.latents, rows.latents, columns.latents]
    position = tuple(axis.latents.start for axis in (time, rows, columns))
    decoded = decode(tile, position=position) if placed else decode(tile)
    require("decoder_fn's result", decoded, "an mx.array, which mx.array(x) makes", mx.array)
    if channels is None:
        channels = decoded.shape[1] if decoded.ndim == 5 else 3
    sizes = (axis.output.stop - axis.output.start for axis in (time, rows, columns))
    expected = (latents.shape[0], channels, *sizes)
    if decoded.shape != expected:
        raise ValueError(
            f"decoder_fn must turn {tile.shape} latents into shape {expected}, got {decoded.shape}; "
            "check spatial_scale and temporal_scale"
        )
    mx.eval(decoded)
    mx.clear_cache()
    if debug:
        spans = [f"{axis.output.start}:{axis.output.stop}" for axis in (time, rows, columns)]
        logger.info("decoded %s latents to frames %s, rows %s, columns %s", tile.shape, *spans)
    return decoded


def _finish(
    pieces: Iterator[mx.array], dtype: mx.Dtype, on_frames_ready: OnFramesReady | None
) -> Iterator[mx.array]:
    start = 0
    for piece in pieces:
        piece = piece.astype(dtype)
        mx.eval(piece)
        if on_frames_ready is not None:
            on_frames_ready(piece, start)
        start += piece.shape[2]
        yield piece
        del piece
