"""Decode LTX video latents with MLX: exact, streamed, within a memory budget."""

from mlx_vae_tiling.tiling import (
    DimensionIntervals,
    SpatialTilingConfig,
    TemporalTilingConfig,
    TilingConfig,
    compute_trapezoidal_mask_1d,
    decode_with_tiling,
    iter_decode_with_tiling,
    map_spatial_slice,
    map_temporal_slice,
    split_in_spatial,
    split_in_temporal,
)

__version__ = "0.1.0"

__all__ = [
    "DimensionIntervals",
    "SpatialTilingConfig",
    "TemporalTilingConfig",
    "TilingConfig",
    "__version__",
    "compute_trapezoidal_mask_1d",
    "decode_with_tiling",
    "iter_decode_with_tiling",
    "map_spatial_slice",
    "map_temporal_slice",
    "split_in_spatial",
    "split_in_temporal",
]
