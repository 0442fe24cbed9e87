"""Splits and maps against their formulas, and the partition of unity that blending rests on."""

import math

import numpy as np
import pytest
from test_tiling_masks import expected_mask

from mlx_vae_tiling import map_spatial_slice, map_temporal_slice, split_in_spatial, split_in_temporal
from mlx_vae_tiling.tiling.config import SpatialTilingConfig, TemporalTilingConfig, TilingConfig
from mlx_vae_tiling.tiling.plan import plan_tiles

SPLITS = [(s, o, d) for s in range(1, 8) for o in range(s) for d in range(1, 24)]


@pytest.mark.parametrize("size", range(1, 8))
def test_split_in_spatial(size):
    for _, overlap, d in (split for split in SPLITS if split[0] == size):
        got = split_in_spatial(size, overlap, d)
        n = 1 if d <= size else math.ceil((d - overlap) / (size - overlap))
        assert got.starts == [i * (size - overlap) for i in range(n)]
        assert got.ends == [*(start + size for start in got.starts[:-1]), d]
        assert got.left_ramps == [0] + [overlap] * (n - 1)
        assert got.right_ramps == [overlap] * (n - 1) + [0]
        assert n == 1 or got.ends[-1] - got.starts[-1] > overlap


@pytest.mark.parametrize("size", range(1, 8))
def test_split_in_temporal_starts_one_earlier(size):
    for _, overlap, d in (split for split in SPLITS if split[0] == size):
        space, time = split_in_spatial(size, overlap, d), split_in_temporal(size, overlap, d)
        assert time.starts == [0] + [start - 1 for start in space.starts[1:]]
        assert time.left_ramps == [0] + [ramp + 1 for ramp in space.left_ramps[1:]]
        assert (time.ends, time.right_ramps) == (space.ends, space.right_ramps)


@pytest.mark.parametrize("split", [split_in_spatial, split_in_temporal])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, 9), "overlap must be at least 0 and less than size, got 4 and 4"),
        ((4, -1, 9), "overlap must be at least 0 and less than size, got -1 and 4"),
        ((4, 1, 0), "dimension_size must be positive, got 0"),
    ],
)
def test_split_raises(split, arguments, message):
    with pytest.raises(ValueError, match=message):
        split(*arguments)


@pytest.mark.parametrize("scale", [1, 4, 8, 32])
@pytest.mark.parametrize("interval", [(0, 5, 0, 2), (3, 9, 2, 0), (3, 9, 3, 5), (0, 1, 0, 0), (6, 8, 1, 0)])
def test_maps(interval, scale):
    begin, end, left, right = interval
    pixels, mask = map_spatial_slice(*interval, scale)
    assert pixels == slice(begin * scale, end * scale)
    expected = expected_mask((end - begin) * scale, left * scale, right * scale, False)
    np.testing.assert_allclose(np.array(mask), expected, rtol=1e-7)

    frames, mask = map_temporal_slice(*interval, scale)
    assert frames == slice(begin * scale, 1 + (end - 1) * scale)
    left_frames = 1 + (left - 1) * scale if left else 0
    expected = expected_mask(1 + (end - begin - 1) * scale, left_frames, right * scale, True)
    np.testing.assert_allclose(np.array(mask), expected, rtol=1e-7)


@pytest.mark.parametrize("map_slice", [map_spatial_slice, map_temporal_slice])
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3, 1, 0, 0, 32), ValueError, "end must be greater than begin, got 1 and 3"),
        ((2, 2, 0, 0, 8), ValueError, "end must be greater than begin, got 2 and 2"),
        ((-2, 2, 0, 0, 8), ValueError, "begin must be at least 0, got -2"),
        ((0, 2, -3, 0, 8), ValueError, "left_ramp must be at least 0, got -3"),
        ((0, 2, 0, 0, 0), ValueError, "scale must be at least 1, got 0"),
        ((None, 2, 0, 0, 8), TypeError, "begin must be a whole number, got None"),
        ((0, 2, 0.5, 0, 8), TypeError, "left_ramp must be a whole number, got 0.5"),
    ],
)
def test_maps_raise(map_slice, arguments, kind, message):
    with pytest.raises(kind, match=message):
        map_slice(*arguments)


@pytest.mark.parametrize("tile", [2, 3, 6])
def test_weights_sum_to_one(tile):
    for overlap in range(tile):
        for d in range(1, 20):
            config = TilingConfig(
                SpatialTilingConfig(32 * tile, 32 * overlap), TemporalTilingConfig(8 * tile, 8 * overlap)
            )
            plan = plan_tiles((1, 1, d, d, d), config, 32, 8)
            for axis, length in zip(plan, (8 * d - 7, 32 * d, 32 * d), strict=True):
                total = np.zeros(length)
                for part in axis:
                    total[part.output] += np.array(part.weights)
                np.testing.assert_allclose(total, 1, atol=3e-7)
