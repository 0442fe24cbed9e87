"""Peak memory: constant in the number of frames, and beside the classic method."""

import mlx.core as mx
import pytest
from blended_tiling import upscale
from classic_tiling import classic_decode
from common import measure

from mlx_vae_tiling import (
    SpatialTilingConfig,
    TemporalTilingConfig,
    TilingConfig,
    decode_with_tiling,
    iter_decode_with_tiling,
)
from mlx_vae_tiling.tiling.plan import blending_bytes, plan_tiles

pytestmark = pytest.mark.cpu

CONFIG = TilingConfig(SpatialTilingConfig(64, 32), TemporalTilingConfig(32, 8))


def drain(latents):
    for piece in iter_decode_with_tiling(upscale, latents, CONFIG):
        del piece


def latents(frames, dtype=mx.float32, side=3):
    array = mx.random.normal((1, 4, frames, side, side)).astype(dtype)
    mx.eval(array)
    return array


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_peak_of_the_iterator_does_not_grow_with_frames(dtype):
    short, long = latents(60, dtype), latents(240, dtype)
    peaks = [measure(lambda array=array: drain(array)).peak_bytes for array in (short, long)]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_peak_is_under_a_third_of_the_classic_method():
    short = latents(40)
    classic = measure(lambda: mx.eval(classic_decode(upscale, short, CONFIG))).peak_bytes
    assert measure(lambda: drain(short)).peak_bytes < classic / 3
    assert mx.allclose(
        decode_with_tiling(upscale, short, CONFIG), classic_decode(upscale, short, CONFIG), atol=2e-6
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_iterator_holds_the_unfinished_overlap_between_pieces(dtype):
    array = latents(60, dtype)
    mx.synchronize()
    before = mx.get_active_memory()
    frame_bytes, overlap_frames = 3 * 96 * 96 * 4, 9
    for piece in iter_decode_with_tiling(upscale, array, CONFIG):
        held = mx.get_active_memory() - before
        assert held <= piece.nbytes + overlap_frames * frame_bytes + 2**16
        del piece


def test_peak_of_a_large_overlap():
    config, array = TilingConfig.temporal_only(64, 48), latents(60)

    def run():
        for piece in iter_decode_with_tiling(upscale, array, config):
            del piece

    # One tile, the overlap it blends with, and the two buffers it is added to.
    tile_frames, overlap_frames, frame_bytes = 65, 49, 3 * 96 * 96 * 4
    assert measure(run).peak_bytes <= (2 * tile_frames + overlap_frames) * frame_bytes * 1.05


def test_whole_video_costs_its_output_once():
    array = latents(60, mx.float16)
    peak = measure(lambda: decode_with_tiling(upscale, array, CONFIG)).peak_bytes
    streamed = measure(lambda: drain(array)).peak_bytes
    assert peak <= 2 * 3 * 473 * 96 * 96 + streamed + 2**16


def test_peak_of_a_decoder_that_joins_pieces_and_takes_nothing_else():
    """The pieces of a tile are there beside the tile."""
    array = latents(20)
    pieces = [upscale(array[:, :, :10]), upscale(array[:, :, 10:])]

    def joined(tile, *position):
        made = [piece + 0 for piece in pieces]
        mx.eval(made)
        return mx.concatenate(made, axis=2)

    config = TilingConfig(SpatialTilingConfig(128, 0))
    mx.eval(pieces)
    frames, frame_bytes = pieces[0].shape[2] + pieces[1].shape[2], 3 * 96 * 96 * 4
    tiles = plan_tiles((1, 4, 1 + (frames - 1) // 8, 3, 3), config, 32, 8)
    predicted = blending_bytes(tiles, 3, 4, lambda *sizes: 0, 0)
    peak = measure(lambda: mx.eval(joined(array))).peak_bytes
    assert peak == pytest.approx(2 * frames * frame_bytes, rel=0.05)
    assert peak <= predicted * 1.05


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_peak_of_many_small_tiles_is_that_of_what_is_finished(dtype):
    """A tile is little beside its group, which in half precision is there once more while it is rounded."""
    config, array = (
        TilingConfig(SpatialTilingConfig(64, 0), TemporalTilingConfig(32, 0)),
        latents(9, dtype, 8),
    )
    tiles = plan_tiles(array.shape, config, 32, 8)
    predicted = blending_bytes(tiles, 3, dtype.size, lambda f, h, w: 0, 0)

    def run():
        for piece in iter_decode_with_tiling(upscale, array, config):
            del piece

    assert measure(run).peak_bytes == pytest.approx(predicted, rel=0.03)


@pytest.mark.parametrize("overlap", [0, 16], ids=["apart", "overlapping"])
def test_peak_of_the_first_tile_has_its_weights(overlap):
    """What was unfinished before goes when the tile's buffers are open, and the weights come."""
    config, array = TilingConfig.temporal_only(32, overlap), latents(9)
    tiles = plan_tiles(array.shape, config, 32, 8)
    predicted = blending_bytes(tiles, 3, 4, lambda f, h, w: 0, 0)

    def run():
        for piece in iter_decode_with_tiling(upscale, array, config):
            del piece

    assert measure(run).peak_bytes == pytest.approx(predicted, rel=0.03)
