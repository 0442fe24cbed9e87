"""The decoder of a config, whatever its kind."""

from __future__ import annotations

from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.diffusion import DiffusionDecoder
from mlx_vae_tiling.vae.diffusion_config import DiffusionDecoderConfig
from mlx_vae_tiling.vae.published import AnyConfig
from mlx_vae_tiling.vae.tiny import TinyDecoder
from mlx_vae_tiling.vae.tiny_config import TinyDecoderConfig


def build_decoder(config: AnyConfig) -> StreamingDecoder:
    """A decoder of this architecture, without weights.

    Raises:
        TypeError: If it is no config.
    """
    if isinstance(config, DecoderConfig):
        return VideoDecoder(config)
    if isinstance(config, DiffusionDecoderConfig):
        return DiffusionDecoder(config)
    if isinstance(config, TinyDecoderConfig):
        return TinyDecoder(config)
    raise TypeError(
        f"a decoder or the config of one is needed, got a {type(config).__name__}; load_decoder loads one"
    )
