"""From the latents of a sampler to those that a VAE takes: its own statistics, or its factors."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_vae_tiling.arguments import told


def denormalized(latents: mx.array, vae: Any) -> mx.array:
    """What FastVideo's stage makes of latents for a VAE, in float32 where it changes them.

    Nothing, if the VAE says that it does so itself (`handles_latent_denorm`). Else times
    `vae.config.latents_std` plus `vae.config.latents_mean`, if it has both. Else divided by
    `vae.scaling_factor` plus `vae.shift_factor`, of those that it has.

    Args:
        latents: (B, C, F, H, W).
        vae: Whose attributes are read; numbers, or one per channel.

    Raises:
        ValueError: If a factor is neither one number nor one per channel.
    """
    if getattr(vae, "handles_latent_denorm", False):
        return latents
    config, channels = getattr(vae, "config", None), latents.shape[1]
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        scaled = latents.astype(mx.float32) * _per_channel("config.latents_std", std, channels)
        return scaled + _per_channel("config.latents_mean", mean, channels)
    scaling, shift = (getattr(vae, name, None) for name in ("scaling_factor", "shift_factor"))
    if scaling is not None:
        latents = latents.astype(mx.float32) / _per_channel("scaling_factor", scaling, channels)
    if shift is not None:
        latents = latents.astype(mx.float32) + _per_channel("shift_factor", shift, channels)
    return latents


def _per_channel(name: str, factor: Any, channels: int) -> mx.array:
    rule = f"vae.{name} must be one number or one per channel ({channels})"
    try:
        values = mx.array(factor, mx.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{rule}, got {told(factor)}") from error
    if values.size not in (1, channels):
        raise ValueError(f"{rule}, got {values.size}")
    return values.reshape(1, -1, 1, 1, 1)
