"""Blended tiling over any decoder function."""

from mlx_vae_tiling.tiling.config import SpatialTilingConfig, TemporalTilingConfig, TilingConfig
from mlx_vae_tiling.tiling.decode import decode_with_tiling, iter_decode_with_tiling
from mlx_vae_tiling.tiling.intervals import (
    DimensionIntervals,
    map_spatial_slice,
    map_temporal_slice,
    split_in_spatial,
    split_in_temporal,
)
from mlx_vae_tiling.tiling.masks import compute_trapezoidal_mask_1d

__all__ = [
    "DimensionIntervals",
    "SpatialTilingConfig",
    "TemporalTilingConfig",
    "TilingConfig",
    "compute_trapezoidal_mask_1d",
    "decode_with_tiling",
    "iter_decode_with_tiling",
    "map_spatial_slice",
    "map_temporal_slice",
    "split_in_spatial",
    "split_in_temporal",
]
