"""`TinyDecoder`: the tiny decoders of LTX latents (TAEHV), for previews.

Attribute names are those of the published files, in which the layers are numbered in the order in which they
run; axes are channels-last.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from mlx_vae_tiling.vae.backend import Backend, Taken, Where
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.needs import Trimmed
from mlx_vae_tiling.vae.options import DecodeOptions, GivenOptions
from mlx_vae_tiling.vae.schedule import Step
from mlx_vae_tiling.vae.tiny_config import LEVELS, TinyDecoderConfig
from mlx_vae_tiling.vae.tiny_layers import (
    FrameConvolution,
    Grow,
    MemoryBlock,
    WideMemoryBlock,
    convolution_step,
)
from mlx_vae_tiling.vae.unpatching import Unpatching

Inputs = Sequence[mx.array]


class TinyDecoder(StreamingDecoder):
    """A tiny decoder of LTX latents, for previews: frames blurrier than the VAE's, many times as fast.

    It takes normalised latents, and its frames are clamped to [-1, 1]. It has no noise and no timestep: what
    is said of those does nothing.

    Args:
        config: The architecture.
    """

    config: TinyDecoderConfig

    def __init__(self, config: TinyDecoderConfig):
        super().__init__(config, TinyDecoderConfig)
        widths, patch = config.widths, config.out_channels * config.patch_size**2
        layers: list[nn.Module] = [
            nn.Identity(),
            FrameConvolution(config.latent_channels, widths[0]),
            nn.ReLU(),
        ]
        for width, following in pairwise(widths):
            for _ in range(config.blocks):
                layers.append(
                    WideMemoryBlock(width, config.groups(width)) if config.wide else MemoryBlock(width)
                )
            layers += [nn.Identity(), Grow(width), FrameConvolution(width, following, bias=False)]
        self.decoder = [*layers, nn.ReLU(), FrameConvolution(widths[-1], patch)]

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in which the decoder computes: that of its weights."""
        return self.decoder[1].weight.dtype

    def _resolved(self, given: GivenOptions) -> DecodeOptions:
        given.require_one_step()
        if not given.normalized:
            raise ValueError(
                "a tiny decoder takes normalised latents, and its file has no statistics to normalise them by"
            )
        return DecodeOptions(True, (), 0.0, given.seed, True)

    def steps(
        self, options: DecodeOptions, output_dtype: mx.Dtype | None = None, backend: Backend | None = None
    ) -> list[Step]:
        """The decoder as steps, from the latents (B, C, F, H, W) to the frames (B, 3, F', H', W')."""
        config = self.config
        steps = [Step(self._prepared, self._prepared_taken, (), config.latent_channels)]
        for layer in self.decoder[1:-1]:
            last = len(steps) - 1
            if isinstance(layer, (MemoryBlock, WideMemoryBlock)):
                steps += layer.steps(last)
            elif isinstance(layer, Grow):
                steps.append(layer.step(last))
            elif isinstance(layer, FrameConvolution):
                steps.append(convolution_step(layer, last, after=nn.relu if last == 0 else None))
        steps.append(convolution_step(self.decoder[-1], len(steps) - 1, before=nn.relu))
        dtype, trimmed = output_dtype or self.dtype, Trimmed(2**LEVELS - 1)
        # What is clipped is there beside its rearrangement.
        unpatching = Unpatching(config.out_channels, config.patch_size, dtype, trimmed, _unpatched, arrays=2)
        steps.append(unpatching.step(len(steps) - 1))
        return steps

    def _prepared(self, inputs: Inputs, where: Where) -> mx.array:
        """Latents (B, C, F, H, W), softly clamped to 3, channels last."""
        time, height, width = (span.slice for span in where.output)
        z = inputs[0][:, :, time, height, width].astype(mx.float32)
        return mx.contiguous((mx.tanh(z / 3) * 3).transpose(0, 2, 3, 4, 1).astype(self.dtype))

    def _prepared_taken(self, where: Where) -> Taken:
        made = where.batch * where.output.volume * self.config.latent_channels
        return Taken(made * (2 * 4 + where.dtype.size * (where.dtype.size < 4)), made)


def _unpatched(x: mx.array, patch_size: int) -> mx.array:
    """(B, T, H, W, C*p*p) in [0, 1] to (B, C, T, H*p, W*p) in [-1, 1]."""
    b, t, h, w, _ = x.shape
    p = patch_size
    x = mx.clip(x, 0, 1) * 2 - 1
    # Unlike the VAE's patches: channel (c, row, column) with the column fastest.
    x = x.reshape(b, t, h, w, -1, p, p).transpose(0, 4, 1, 2, 5, 3, 6)
    return x.reshape(b, -1, t, h * p, w * p)
