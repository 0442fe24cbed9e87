"""`VideoDecoder`: the convolutional LTX video decoder, every published version of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_vae_tiling.vae.backend import Backend, Taken, Where
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.blocks import ResBlockNarrowing, ResBlocks
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.layers import (
    Conv3d,
    DepthToSpaceUpsample,
    ResnetBlock3D,
    TimestepEmbedding,
    UNetMidBlock3D,
    modulations,
)
from mlx_vae_tiling.vae.operations import Activation
from mlx_vae_tiling.vae.options import DecodeOptions, GivenOptions, timesteps_of
from mlx_vae_tiling.vae.regions import CAUSAL, CENTRED, Convolution, Same
from mlx_vae_tiling.vae.schedule import Step
from mlx_vae_tiling.vae.unpatching import Unpatching


class PerChannelStatistics(nn.Module):
    """Mean and standard deviation of each latent channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.mean = mx.zeros((channels,))
        self.std = mx.ones((channels,))


class VideoDecoder(StreamingDecoder):
    """A convolutional LTX video decoder.

    It has no weights until `load_weights`, `update` or `init_random` gave it some; `load_decoder` builds
    one from a checkpoint. It is itself a `decoder_fn` for `decode_with_tiling`.

    Args:
        config: The architecture.

    Attributes:
        decode_timestep: Default timestep of versions that are conditioned on one.
        decode_noise_scale: Default share of noise in the latents of those versions; 0 makes
            decoding them deterministic.
        convolution_form: Pins a form of convolution, None for the backend's default.
    """

    config: DecoderConfig

    def __init__(self, config: DecoderConfig):
        super().__init__(config, DecoderConfig)
        self.decode_timestep = 0.05
        self.decode_noise_scale = 0.025
        padding, conditioned = config.spatial_padding_mode, config.timestep_conditioning
        self.conv_in = Conv3d(config.latent_channels, config.bottleneck_channels, padding)
        self.up_blocks: list[UNetMidBlock3D | ResnetBlock3D | DepthToSpaceUpsample] = []
        fields, scale = 0, 1
        for block, width in config.blocks():
            if isinstance(block, ResBlocks):
                self.up_blocks.append(UNetMidBlock3D(width, block, padding, conditioned, fields, scale))
                fields += 2 * block.num_layers * block.inject_noise
            elif isinstance(block, ResBlockNarrowing):
                self.up_blocks.append(ResnetBlock3D(width, block.after(width), padding))
            else:
                self.up_blocks.append(DepthToSpaceUpsample(width, block, padding))
                scale *= block.stride[1]
        self.conv_out = Conv3d(config.base_channels, config.out_channels * config.patch_size**2, padding)
        if conditioned:
            self.timestep_scale_multiplier = mx.array(1000.0)
            self.last_time_embedder = TimestepEmbedding(2 * config.base_channels)
            self.last_scale_shift_table = mx.zeros((2, config.base_channels))
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in which the decoder computes: that of its weights."""
        return self.conv_in.conv.weight.dtype

    def _resolved(self, given: GivenOptions) -> DecodeOptions:
        given.require_one_step()
        options = DecodeOptions(
            causal=self.config.causal if given.causal is None else given.causal,
            timestep=timesteps_of(self.decode_timestep if given.timestep is None else given.timestep),
            noise_scale=self.decode_noise_scale if given.noise_scale is None else given.noise_scale,
            seed=given.seed,
            normalized=given.normalized,
        )
        conditioned = self.config.timestep_conditioning
        return options if conditioned else replace(options, timestep=(), noise_scale=0.0)

    @property
    def smallest_side(self) -> int:
        """Height and width in latents that it needs at least: a single row has nothing to reflect."""
        return 2 if self.config.spatial_padding_mode == "reflect" else 1

    def steps(
        self, options: DecodeOptions, output_dtype: mx.Dtype | None = None, backend: Backend | None = None
    ) -> list[Step]:
        """The decoder as steps, from the latents (B, C, F, H, W) to the frames (B, 3, F', H', W')."""
        need = Convolution(CAUSAL if options.causal else CENTRED)
        timestep, activation = None, Activation()
        if options.timestep:
            timestep = mx.array(options.timestep) * self.timestep_scale_multiplier.astype(mx.float32)
            embedding = self.last_time_embedder(timestep)
            activation = Activation(*modulations(embedding, self.last_scale_shift_table))
        steps = [
            Step(
                partial(self._prepared, options=options),
                partial(self._prepared_taken, options=options),
                (),
                self.config.latent_channels,
            ),
            self.conv_in.step(0, need),
        ]
        for block in self.up_blocks:
            last = len(steps) - 1
            if isinstance(block, UNetMidBlock3D):
                steps += block.steps(last, need, timestep)
            else:
                steps += block.steps(last, need)
        steps.append(self.conv_out.step(len(steps) - 1, need, activation))
        dtype = output_dtype or self.dtype
        unpatching = Unpatching(self.config.out_channels, self.config.patch_size, dtype, Same())
        steps.append(unpatching.step(len(steps) - 1))
        return steps

    def _prepared(self, inputs: Sequence[mx.array], where: Where, options: DecodeOptions) -> mx.array:
        """Latents (B, C, F, H, W) with the decode noise, where there is any, un-normalised, channels last."""
        region, statistics = where.output, self.per_channel_statistics
        z = inputs[0][:, :, region.time.slice, region.height.slice, region.width.slice].astype(mx.float32)
        mean, std = (a.astype(mx.float32).reshape(1, -1, 1, 1, 1) for a in (statistics.mean, statistics.std))
        scale = options.noise_scale
        if scale and where.noise is not None:
            z = z if options.normalized else (z - mean) / std
            noise = where.noise.latents(region, *z.shape[:2])
            z = (1 - scale) * z * std + scale * noise * std + mean
        elif options.normalized:
            z = z * std + mean
        return mx.contiguous(z.transpose(0, 2, 3, 4, 1).astype(self.dtype))

    def _prepared_taken(self, where: Where, options: DecodeOptions) -> Taken:
        made = where.batch * where.output.volume * self.config.latent_channels
        return Taken(made * (16 if options.noise_scale else 8), made)
