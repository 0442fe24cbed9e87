"""Blended decoding against a dense float64 implementation, piece by piece, and what it asks of a decoder."""

import functools
import itertools
import logging
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_tiling_masks import expected_mask

from mlx_vae_tiling import (
    SpatialTilingConfig,
    TemporalTilingConfig,
    TilingConfig,
    decode_with_tiling,
    iter_decode_with_tiling,
)


def tiling(space=None, time=None):
    return TilingConfig(space and SpatialTilingConfig(*space), time and TemporalTilingConfig(*time))


# latent shape, config, spatial scale, temporal scale
CASES = {
    "one tile": ((1, 2, 3, 3, 3), tiling((128, 32), (32, 8)), 32, 8),
    "empty config": ((1, 2, 3, 3, 3), tiling(), 32, 8),
    "one frame": ((1, 2, 1, 5, 3), tiling((64, 32), (16, 8)), 32, 8),
    "odd sizes": ((1, 2, 11, 5, 7), tiling((96, 32), (32, 8)), 32, 8),
    "batch": ((3, 2, 6, 5, 3), tiling((64, 32), (24, 8)), 32, 8),
    "no overlap": ((1, 2, 9, 5, 4), tiling((64, 0), (24, 0)), 32, 8),
    "half": ((1, 2, 9, 5, 4), tiling((128, 64), (32, 16)), 32, 8),
    "three tiles meet": ((1, 2, 6, 5, 4), tiling((96, 64), (32, 24)), 32, 8),
    "many tiles meet": ((1, 2, 12, 8, 2), tiling((192, 128), (64, 48)), 32, 8),
    "last tile one longer than overlap": ((1, 2, 7, 6, 4), tiling((96, 32), (32, 16)), 32, 8),
    "space only": ((2, 2, 3, 5, 7), tiling((96, 64), None), 32, 8),
    "time only": ((2, 2, 9, 3, 2), tiling(None, (24, 16)), 32, 8),
    "scale 16 and 4": ((1, 2, 14, 9, 9), tiling((64, 32), (16, 8)), 16, 4),
    "scale 8 and 1": ((1, 2, 40, 20, 17), tiling((64, 32), (16, 8)), 8, 1),
    "scale 64 and 16": ((1, 2, 5, 3, 3), tiling((128, 64), (32, 16)), 64, 16),
    "tile of one latent": ((1, 2, 5, 3, 3), tiling((64, 0), (16, 0)), 64, 16),
}


def decode_tile(tile, spatial_scale, temporal_scale):
    """A float64 decoder whose output depends on where its tile begins, ends and on all of its latents."""
    tile = np.asarray(tile, dtype=np.float64)
    decoded = tile.repeat(temporal_scale, 2)[:, :, temporal_scale - 1 :]
    decoded = decoded.repeat(spatial_scale, 3).repeat(spatial_scale, 4)
    decoded = decoded[:, [0, 1, 0]] + tile.mean()
    t, y, x = (np.arange(n) / 50 for n in decoded.shape[2:])
    return np.sin(decoded + t[:, None, None] + 2 * y[:, None] + 3 * x)


def as_decoder_fn(spatial_scale=32, temporal_scale=8):
    return lambda tile: mx.array(decode_tile(tile, spatial_scale, temporal_scale), dtype=mx.float32)


def axis_tiles(d, size, overlap, scale, temporal):
    """Latent slice, output slice and mask of each tile, from the formulas of the design."""
    n = 1 if d <= size else math.ceil((d - overlap) / (size - overlap))
    for k in range(n):
        ramp = overlap + temporal if k else 0
        begin = k * (size - overlap) - (temporal and k > 0)
        end = d if k == n - 1 else k * (size - overlap) + size
        right = overlap * scale if k < n - 1 else 0
        if temporal:
            frames = 1 + (end - begin - 1) * scale
            mask = expected_mask(frames, 1 + (ramp - 1) * scale if k else 0, right, True)
        else:
            mask = expected_mask((end - begin) * scale, ramp * scale, right, False)
        yield slice(begin, end), slice(begin * scale, begin * scale + len(mask)), mask


def dense_decode(latents, config, spatial_scale, temporal_scale, decode=decode_tile):
    """Masked sum over all tiles, divided by the sum of the masks, in float64."""
    b, _, f, h, w = latents.shape
    space = time = (10**6, 0)
    if config.spatial_config:
        space = (config.spatial_config.tile_size_in_pixels, config.spatial_config.tile_overlap_in_pixels)
    if config.temporal_config:
        time = (config.temporal_config.tile_size_in_frames, config.temporal_config.tile_overlap_in_frames)
    axes = [axis_tiles(f, time[0] // temporal_scale, time[1] // temporal_scale, temporal_scale, True)]
    for d in (h, w):
        axes.append(axis_tiles(d, space[0] // spatial_scale, space[1] // spatial_scale, spatial_scale, False))
    total = np.zeros((b, 3, 1 + (f - 1) * temporal_scale, h * spatial_scale, w * spatial_scale))
    weight = np.zeros(total.shape[2:])
    for (lt, ot, mt), (lh, oh, mh), (lw, ow, mw) in itertools.product(*axes):
        mask = mt[:, None, None] * mh[:, None] * mw
        total[:, :, ot, oh, ow] += mask * decode(latents[:, :, lt, lh, lw], spatial_scale, temporal_scale)
        weight[ot, oh, ow] += mask
    return total / weight


@pytest.mark.parametrize("case", CASES)
def test_blend_equals_dense_float64(case):
    shape, config, *scales = CASES[case]
    latents = mx.random.uniform(-1, 1, shape)
    decoded = {}

    def decode_once(tile, *scales):
        key = tile.shape, tile.tobytes()
        if key not in decoded:
            decoded[key] = decode_tile(tile, *scales)
        return decoded[key]

    def decoder_fn(tile):
        return mx.array(decode_once(np.array(tile), *scales), dtype=mx.float32)

    expected = dense_decode(np.array(latents), config, *scales, decode=decode_once)

    video = decode_with_tiling(decoder_fn, latents, config, *scales)
    assert video.shape == expected.shape and video.dtype == mx.float32
    np.testing.assert_allclose(np.array(video), expected, rtol=0, atol=2e-6)

    pieces = list(iter_decode_with_tiling(decoder_fn, latents, config, *scales))
    np.testing.assert_array_equal(np.concatenate(pieces, axis=2), np.array(video))


def test_no_config_decodes_whole_in_one_call():
    latents = mx.random.uniform(-1, 1, (2, 2, 4, 3, 5))
    shapes = []

    def decoder_fn(tile):
        shapes.append(tile.shape)
        return as_decoder_fn()(tile)

    video = decode_with_tiling(decoder_fn, latents, None)
    assert shapes == [latents.shape]
    np.testing.assert_array_equal(np.array(video), decode_tile(latents, 32, 8).astype(np.float32))


@pytest.mark.parametrize(
    "decode", [decode_with_tiling, lambda *args, **kw: list(iter_decode_with_tiling(*args, **kw))]
)
@pytest.mark.parametrize(
    "case", ["one tile", "three tiles meet", "time only", "space only", "tile of one latent"]
)
def test_on_frames_ready_gets_finished_frames_in_order(case, decode):
    shape, config, *scales = CASES[case]
    latents = mx.random.uniform(-1, 1, shape)
    calls = []
    decode(as_decoder_fn(*scales), latents, config, *scales, on_frames_ready=lambda *call: calls.append(call))
    assert [start for _, start in calls] == [0, *np.cumsum([piece.shape[2] for piece, _ in calls])[:-1]]
    video = np.concatenate([piece for piece, _ in calls], axis=2)
    np.testing.assert_allclose(video, dense_decode(np.array(latents), config, *scales), rtol=0, atol=2e-6)


def test_frames_are_yielded_as_soon_as_no_later_tile_touches_them():
    decoded = []

    def decoder_fn(tile):
        decoded.append(tile.shape[2])
        return as_decoder_fn()(tile)

    pieces = iter_decode_with_tiling(
        decoder_fn, mx.zeros((1, 2, 10, 1, 1)), TilingConfig.temporal_only(32, 8)
    )
    steps = [(piece.shape[2], len(decoded)) for piece in pieces]
    assert decoded == [4, 5, 5]
    assert steps == [(16, 1), (24, 2), (33, 3)]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_blends_in_float32(dtype):
    config = tiling((64, 32), (16, 8))
    latents = mx.random.uniform(-1, 1, (1, 2, 5, 4, 3)).astype(dtype)

    def half(tile):
        return as_decoder_fn()(tile.astype(mx.float32)).astype(dtype)

    video = decode_with_tiling(half, latents, config)
    assert video.dtype == dtype
    exact = decode_with_tiling(lambda tile: half(tile).astype(mx.float32), latents.astype(mx.float32), config)
    assert mx.array_equal(video, exact.astype(dtype))


def test_more_than_three_channels():
    video = decode_with_tiling(
        lambda tile: mx.ones((1, 5, tile.shape[2] * 8 - 7, *(32 * n for n in tile.shape[3:]))),
        mx.zeros((1, 2, 5, 3, 3)),
        tiling((64, 32), (16, 8)),
    )
    assert video.shape == (1, 5, 33, 96, 96)
    np.testing.assert_allclose(np.array(video), 1, atol=1e-6)


class Decoder(nn.Module):
    """Records the keywords that its call takes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, latents, causal=None, timestep=None, debug=None, chunked_conv=None):
        self.seen.append((causal, timestep, debug, chunked_conv))
        return as_decoder_fn()(latents)


def record(seen, tile, /, **options):
    seen.update(options)
    return as_decoder_fn()(tile)


def only_timestep(seen, tile, *, timestep):
    return record(seen, tile, timestep=timestep)


def positional_only(seen, tile, causal="own", /, timestep=None):
    return record(seen, tile, causal=causal, timestep=timestep)


ALL = {"causal": True, "timestep": 7, "debug": True}
SIGNATURES = [
    (record, ALL),
    (only_timestep, {"timestep": 7}),
    (positional_only, {"causal": "own", "timestep": 7}),
]


@pytest.mark.parametrize(("decoder_fn", "expected"), SIGNATURES)
def test_decoder_gets_the_keywords_it_takes(decoder_fn, expected):
    seen = {}
    latents = mx.zeros((1, 2, 1, 1, 1))
    decode_with_tiling(functools.partial(decoder_fn, seen), latents, None, 32, 8, True, 7, True)
    assert seen == expected


def test_bound_keyword_of_a_partial_is_kept():
    seen = {}
    decoder_fn = functools.partial(record, seen, causal="bound")
    decode_with_tiling(decoder_fn, mx.zeros((1, 2, 1, 1, 1)), None, causal=True)
    assert seen == {"causal": "bound", "timestep": None, "debug": False}


def test_module_as_decoder():
    decoder = Decoder()
    latents = mx.zeros((1, 2, 1, 2, 2))
    decode_with_tiling(decoder, latents, None, causal=True, timestep=3)
    decode_with_tiling(decoder, latents, None, chunked_conv=True)
    assert decoder.seen == [(True, 3, False, None), (False, None, False, True)]


def test_callable_without_signature():
    latents = mx.random.uniform(-1, 1, (1, 3, 4, 3, 3))
    video = decode_with_tiling(mx.sin, latents, TilingConfig.default(), 1, 1, True)
    np.testing.assert_allclose(np.array(video), np.sin(np.array(latents)), atol=1e-6)


def test_call_of_an_mlx_video_user():
    latents = mx.random.uniform(-1, 1, (1, 2, 9, 3, 2))
    starts = []
    video = decode_with_tiling(
        decoder_fn=Decoder(),
        latents=latents,
        tiling_config=TilingConfig.temporal_only(tile_size=32, overlap=8),
        spatial_scale=32,
        temporal_scale=8,
        causal=False,
        timestep=None,
        chunked_conv=False,
        on_frames_ready=lambda frames, start: starts.append(start),
    )
    positional = decode_with_tiling(
        Decoder(),
        latents,
        TilingConfig.temporal_only(32, 8),
        32,
        8,
        False,
        None,
        False,
        lambda frames, start: None,
    )
    assert starts == [0, 16, 40]
    assert mx.array_equal(video, positional)


WRONG_SHAPES = {
    "a frame too many": lambda out: mx.concatenate([out, out[:, :, :1]], axis=2),
    "a frame too few": lambda out: out[:, :, 1:],
    "a row too few": lambda out: out[:, :, :, 1:],
    "a column too few": lambda out: out[..., 1:],
    "a batch too many": lambda out: mx.concatenate([out, out]),
    "a missing axis": lambda out: out[0],
}


@pytest.mark.parametrize("config", [None, tiling((64, 32), (16, 8))])
@pytest.mark.parametrize("wrong", WRONG_SHAPES)
def test_wrong_shape_raises(wrong, config):
    with pytest.raises(ValueError, match=r"must turn .* into shape \(1, 3, .*\), got .*check spatial_scale"):
        decode_with_tiling(
            lambda tile: WRONG_SHAPES[wrong](as_decoder_fn()(tile)), mx.zeros((1, 2, 3, 3, 3)), config
        )


def test_tiles_with_other_channels_raise():
    channels = itertools.count(1)

    def decoder_fn(tile):
        return as_decoder_fn()(tile)[:, : next(channels)]

    with pytest.raises(ValueError, match=r"into shape \(1, 1, 17, 64, 64\), got \(1, 2, 17, 64, 64\)"):
        decode_with_tiling(decoder_fn, mx.zeros((1, 2, 3, 2, 3)), TilingConfig.spatial_only(64, 32))


@pytest.mark.parametrize(
    ("config", "scales", "message"),
    [
        (tiling((96, 0)), (64, 8), "tile_size_in_pixels must be divisible by spatial_scale, got 96 and 64"),
        (
            tiling((128, 32)),
            (64, 8),
            "tile_overlap_in_pixels must be divisible by spatial_scale, got 32 and 64",
        ),
        (
            tiling(None, (24, 0)),
            (32, 16),
            "tile_size_in_frames must be divisible by temporal_scale, got 24 and 16",
        ),
        (
            tiling(None, (32, 8)),
            (32, 16),
            "tile_overlap_in_frames must be divisible by temporal_scale, got 8 and 16",
        ),
        (None, (0, 8), "spatial_scale must be at least 1, got 0"),
        (None, (32, -8), "temporal_scale must be at least 1, got -8"),
    ],
)
def test_config_that_does_not_fit_the_scale_raises_before_decoding(config, scales, message):
    with pytest.raises(ValueError, match=message):
        iter_decode_with_tiling(pytest.fail, mx.zeros((1, 2, 3, 3, 3)), config, *scales)


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (1, 2, 0, 3, 3), (1, 1, 2, 3, 3, 3)])
def test_latents_of_wrong_rank_or_empty_raise(shape):
    with pytest.raises(ValueError, match=r"latents must have a non-empty shape \(B, C, F, H, W\), got"):
        iter_decode_with_tiling(pytest.fail, mx.zeros(shape), None)


@pytest.mark.parametrize("dtype", [mx.int32, mx.bool_, mx.complex64])
def test_latents_that_cannot_hold_frames_raise(dtype):
    with pytest.raises(ValueError, match=r"latents must be floating point, .*, got mlx.core.(int|bool|comp)"):
        iter_decode_with_tiling(pytest.fail, mx.zeros((1, 2, 3, 3, 3), dtype), None)


RETURNED = {
    "nothing": lambda frames: None,
    "a tuple": lambda frames: (frames,),
    "a NumPy array": np.array,
}


@pytest.mark.parametrize("config", [None, tiling((64, 32), (16, 8))])
@pytest.mark.parametrize("returned", RETURNED)
def test_result_that_is_no_array_raises(returned, config):
    def decoder_fn(tile):
        return RETURNED[returned](as_decoder_fn()(tile))

    with pytest.raises(TypeError, match=r"decoder_fn's result must be an mx.array, .*, got (None|\(|array)"):
        decode_with_tiling(decoder_fn, mx.zeros((1, 2, 3, 3, 3)), config)


def test_what_cannot_be_called_raises_before_decoding():
    latents = mx.zeros((1, 2, 3, 3, 3))
    with pytest.raises(TypeError, match="decoder_fn must be a function of latents, got 'demo'"):
        iter_decode_with_tiling("demo", latents, None)
    with pytest.raises(TypeError, match="on_frames_ready must be a function or None, got 3"):
        iter_decode_with_tiling(pytest.fail, latents, None, on_frames_ready=3)


def test_sizes_and_scales_may_be_numpy_integers():
    latents, config = mx.random.normal((1, 2, 3, 3, 3), key=mx.random.key(0)), tiling((64, 32), (16, 8))
    given = tiling((np.int64(64), np.int16(32)), (np.int32(16), np.uint8(8)))
    assert repr(given) == repr(config)  # which a resumed decode compares
    expected = dense_decode(np.array(latents), config, 32, 8)
    video = decode_with_tiling(as_decoder_fn(), latents, given, np.int64(32), np.int32(8))
    np.testing.assert_allclose(video, expected, rtol=0, atol=2e-6)


def test_failure_and_abandoned_iterator_leave_no_state():
    config = tiling((64, 32), (16, 8))
    latents = mx.random.uniform(-1, 1, (1, 2, 7, 3, 3))
    calls = itertools.count()

    def failing(tile):
        if next(calls) == 5:
            raise RuntimeError("out of luck")
        return as_decoder_fn()(tile)

    expected = decode_with_tiling(as_decoder_fn(), latents, config)
    with pytest.raises(RuntimeError, match="out of luck"):
        decode_with_tiling(failing, latents, config)
    abandoned = iter_decode_with_tiling(as_decoder_fn(), latents, config)
    next(abandoned)
    starts = []
    again = decode_with_tiling(
        as_decoder_fn(), latents, config, on_frames_ready=lambda _, n: starts.append(n)
    )
    assert starts[0] == 0
    assert mx.array_equal(again, expected)


def test_interleaved_iterators_are_independent():
    config = tiling(None, (16, 8))
    latents = mx.random.uniform(-1, 1, (1, 2, 7, 2, 2))
    pairs = zip(*(iter_decode_with_tiling(as_decoder_fn(), latents, config) for _ in range(2)), strict=True)
    assert all(mx.array_equal(*pair) for pair in pairs)


def test_debug_logs_every_tile(caplog):
    caplog.set_level(logging.INFO, logger="mlx_vae_tiling")
    latents = mx.zeros((1, 2, 3, 3, 2))
    decode_with_tiling(as_decoder_fn(), latents, tiling((64, 32), (16, 0)))
    assert not caplog.messages
    decode_with_tiling(as_decoder_fn(), latents, tiling((64, 32), (16, 0)), debug=True)
    assert len(caplog.messages) == 4
    assert caplog.messages[1] == "decoded (1, 2, 2, 2, 2) latents to frames 0:9, rows 32:96, columns 0:64"
