"""What the package offers; `mlx_vae_tiling` imports it when the first of it is asked for."""

from mlx_vae_tiling.checkpoints.configs import CheckpointWarning
from mlx_vae_tiling.checkpoints.fetch import fetch_vae
from mlx_vae_tiling.checkpoints.load import load_decoder
from mlx_vae_tiling.media.latents import load_latents
from mlx_vae_tiling.runtime.planning.memory import memory_limits
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.planning.planner import plan_decode
from mlx_vae_tiling.runtime.report import DecodeReport
from mlx_vae_tiling.runtime.run import decode_frames, decode_to_file
from mlx_vae_tiling.runtime.verification.verification import Verification
from mlx_vae_tiling.runtime.verification.verify import verify_decode
from mlx_vae_tiling.stage.arguments import DecodeBatch, DecodingArgs
from mlx_vae_tiling.stage.decoding import DecodingStage
from mlx_vae_tiling.stage.verification import VerificationResult
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
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.diffusion import DiffusionDecoder
from mlx_vae_tiling.vae.diffusion_config import DiffusionDecoderConfig
from mlx_vae_tiling.vae.regions import Window
from mlx_vae_tiling.vae.tiny import TinyDecoder
from mlx_vae_tiling.vae.tiny_config import TinyDecoderConfig

__all__ = [
    "CheckpointWarning",
    "DecodeBatch",
    "DecodePlan",
    "DecodeReport",
    "DecoderConfig",
    "DecodingArgs",
    "DecodingStage",
    "DiffusionDecoder",
    "DiffusionDecoderConfig",
    "DimensionIntervals",
    "SpatialTilingConfig",
    "StreamingDecoder",
    "TemporalTilingConfig",
    "TilingConfig",
    "TinyDecoder",
    "TinyDecoderConfig",
    "Verification",
    "VerificationResult",
    "VideoDecoder",
    "Window",
    "compute_trapezoidal_mask_1d",
    "decode_frames",
    "decode_to_file",
    "decode_with_tiling",
    "fetch_vae",
    "iter_decode_with_tiling",
    "load_decoder",
    "load_latents",
    "map_spatial_slice",
    "map_temporal_slice",
    "memory_limits",
    "plan_decode",
    "split_in_spatial",
    "split_in_temporal",
    "verify_decode",
]
