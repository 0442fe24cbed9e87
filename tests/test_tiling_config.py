"""Rules of the tile sizes, presets, and the automatic choice."""

import pytest

from mlx_vae_tiling import SpatialTilingConfig, TemporalTilingConfig, TilingConfig

RULES = [
    (SpatialTilingConfig, (32, 0), "tile_size_in_pixels must be at least 64, got 32"),
    (SpatialTilingConfig, (100, 0), "tile_size_in_pixels must be divisible by 32, got 100; use 96 or 128"),
    (SpatialTilingConfig, (128, 8), "tile_overlap_in_pixels must be divisible by 32, got 8; use 0 or 32"),
    (
        SpatialTilingConfig,
        (128, 128),
        "tile_overlap_in_pixels must be less than tile_size_in_pixels, got 128 and",
    ),
    (SpatialTilingConfig, (128, -32), "tile_overlap_in_pixels must be at least 0, got -32"),
    (TemporalTilingConfig, (8, 0), "tile_size_in_frames must be at least 16, got 8"),
    (TemporalTilingConfig, (20, 0), "tile_size_in_frames must be divisible by 8, got 20; use 16 or 24"),
    (TemporalTilingConfig, (32, 4), "tile_overlap_in_frames must be divisible by 8, got 4; use 0 or 8"),
    (
        TemporalTilingConfig,
        (32, 40),
        "tile_overlap_in_frames must be less than tile_size_in_frames, got 40 and 32",
    ),
    (TemporalTilingConfig, (32, -8), "tile_overlap_in_frames must be at least 0, got -8"),
]

PRESETS = [
    (TilingConfig(), None, None),
    (TilingConfig.default(), (512, 64), (64, 24)),
    (TilingConfig.spatial_only(), (512, 64), None),
    (TilingConfig.spatial_only(256, 32), (256, 32), None),
    (TilingConfig.spatial_only(tile_size=96, overlap=0), (96, 0), None),
    (TilingConfig.temporal_only(), None, (64, 24)),
    (TilingConfig.temporal_only(tile_size=16, overlap=8), None, (16, 8)),
    (TilingConfig.aggressive(), (256, 64), (32, 8)),
    (TilingConfig.conservative(), (768, 64), (96, 24)),
]

AUTO = [
    ((512, 512, 65), None, None),
    ((512, 513, 65), (384, 64), None),
    ((768, 512, 65), (384, 64), None),
    ((769, 512, 65), (512, 64), None),
    ((512, 1024, 65), (512, 64), None),
    ((512, 1025, 65), (384, 64), None),
    ((512, 512, 66), None, (64, 24)),
    ((512, 512, 100), None, (64, 24)),
    ((512, 512, 101), None, (48, 16)),
    ((512, 512, 200), None, (48, 16)),
    ((512, 512, 201), None, (32, 8)),
    ((768, 1024, 101), (512, 64), (48, 16)),
    ((800, 1024, 101), (256, 64), (32, 8)),
    ((800, 1024, 100), (512, 64), (64, 24)),
    ((512, 512, 682), None, (32, 8)),
    ((512, 512, 683), (256, 64), (32, 8)),
    ((2176, 3840, 21), (384, 64), None),
    ((2176, 3840, 22), (256, 64), (32, 8)),
    ((512, 512, 65, 256, 16), (384, 64), (64, 24)),
    ((600, 600, 90, 600, 90), None, None),
]


def sizes(config):
    space, time = config.spatial_config, config.temporal_config
    return (
        space and (space.tile_size_in_pixels, space.tile_overlap_in_pixels),
        time and (time.tile_size_in_frames, time.tile_overlap_in_frames),
    )


@pytest.mark.parametrize(("config", "arguments", "message"), RULES)
def test_broken_rule_raises(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        config(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((512,), "spatial_config must be a SpatialTilingConfig or None, got 512"),
        ((TemporalTilingConfig(16),), "spatial_config must be a SpatialTilingConfig or None, got Temporal"),
        ((None, SpatialTilingConfig(64)), "temporal_config must be a TemporalTilingConfig or None, got Spat"),
    ],
)
def test_config_of_another_axis_raises(arguments, message):
    with pytest.raises(TypeError, match=message):
        TilingConfig(*arguments)


@pytest.mark.parametrize("number", range(5))
def test_auto_wants_whole_numbers(number):
    names = ("height", "width", "num_frames", "spatial_threshold", "temporal_threshold")
    arguments = {name: 600 for name in names} | {names[number]: None}
    with pytest.raises(TypeError, match=f"{names[number]} must be a whole number, got None"):
        TilingConfig.auto(**arguments)


def test_smallest_tiles():
    config = TilingConfig(SpatialTilingConfig(64), TemporalTilingConfig(16))
    assert sizes(config) == ((64, 0), (16, 0))


@pytest.mark.parametrize(("config", "space", "time"), PRESETS)
def test_preset(config, space, time):
    assert sizes(config) == (space, time)


@pytest.mark.parametrize(("arguments", "space", "time"), AUTO)
def test_auto(arguments, space, time):
    config = TilingConfig.auto(*arguments)
    assert (sizes(config) if config else (None, None)) == (space, time)


def test_configs_are_frozen():
    with pytest.raises(AttributeError):
        TilingConfig.default().spatial_config.tile_size_in_pixels = 64
