"""`DiffusionDecoder`: LTX-2.5's diffusion decoder, streamed exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_vae_tiling.dtypes import FLOATS
from mlx_vae_tiling.vae.backend import Backend, Taken, Where
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.decoder import PerChannelStatistics
from mlx_vae_tiling.vae.diffusion_config import DiffusionDecoderConfig
from mlx_vae_tiling.vae.diffusion_layers import (
    LinearStep,
    PixelShuffle,
    SharedModulation,
    TimestepEmbedder,
)
from mlx_vae_tiling.vae.needs import Appended, Padded
from mlx_vae_tiling.vae.operations import patchify
from mlx_vae_tiling.vae.options import DecodeOptions, GivenOptions, Noise
from mlx_vae_tiling.vae.regions import Region, Same, Span
from mlx_vae_tiling.vae.schedule import Read, Step
from mlx_vae_tiling.vae.transformer import EPS, DiffusionNABlock, NABlock
from mlx_vae_tiling.vae.unpatching import Unpatching

Inputs = Sequence[mx.array]


class DiffusionDecoder(StreamingDecoder):
    """LTX-2.5's diffusion decoder.

    Four stages of neighbourhood attention turn the latents into a context; the last stage predicts the frames
    from noise, beside it. All of it is local, so that it streams like a convolutional decoder: the frames are
    those of the whole decode with the same noise, which a seed or an array gives for the whole video.

    A copy of the last latent frame stands behind the clip as often as the producer's code has it there, and a
    clip smaller than a window is padded by repetition and its frames cropped.

    Args:
        config: The architecture.
    """

    config: DiffusionDecoderConfig

    def __init__(self, config: DiffusionDecoderConfig):
        super().__init__(config, DiffusionDecoderConfig)
        channels, kernels = config.stage_channels, config.stage_kernels
        patch, last = config.out_channels * config.patch_size**2, channels[-1]
        self.conv_in = nn.Linear(config.latent_channels, channels[0])
        self.det_stages = [
            [NABlock(width, kernel, config) for _ in range(depth)]
            for width, kernel, depth in zip(channels[:-1], kernels, config.stage_depths, strict=False)
        ]
        self.upsamples = [
            PixelShuffle(width, stride, divisor)
            for width, (stride, divisor) in zip(channels, config.upsamples, strict=False)
        ]
        self.t_embedder = TimestepEmbedder(config.timestep_channels)
        self.conv_in_x_t = nn.Linear(patch, last)
        self.shared_adaln = SharedModulation(config.timestep_channels, last)
        self.diff_blocks = [
            DiffusionNABlock(last, kernels[-1], config) for _ in range(config.stage_depths[-1])
        ]
        self.norm_out = nn.RMSNorm(last, EPS)
        self.conv_out = nn.Linear(last, patch)
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)
        latents, (t, h, w) = config.least_latents, (config.temporal_scale, *[config.spatial_scale] * 2)
        self._latent_padding = Padded(latents, (1, 1, 1))
        self._pixel_padding = Padded((t * (latents[0] - 1) + 1, h * latents[1], w * latents[2]), (t, h, w))

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in which the decoder computes: that of its weights."""
        return self.conv_in.weight.dtype

    def _is_kept(self, name: str) -> bool:
        return "norm" in name or name.startswith("per_channel_statistics.")

    def _resolved(self, given: GivenOptions) -> DecodeOptions:
        refused = {
            "causal": given.causal or None,
            "timestep": given.timestep,
            "noise_scale": given.noise_scale,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"a diffusion decoder takes no {name}, got {value!r}; seed, noise and "
                    "num_inference_steps are what changes its frames"
                )
        default, asked = self.config.num_inference_steps, given.num_inference_steps
        steps = default if asked is None else asked
        return DecodeOptions(False, (), 0.0, given.seed, given.normalized, steps)

    def noise(
        self, latent_shape: tuple[int, ...], options: DecodeOptions, given: Noise | mx.array | None = None
    ) -> Noise:
        """The noise of a decode: an array (B, 3, F', H', W'), or that of the options' seed.

        Where a clip is padded, an array of its own size is surrounded by noise of the seed; an array of the
        padded size is taken as it is.

        Raises:
            ValueError: If an array has neither size.
        """
        if not isinstance(given, mx.array):
            return super().noise(latent_shape, options, given)
        if given.dtype not in FLOATS:
            raise ValueError(f"noise must be float32, float16 or bfloat16, got {given.dtype}")
        drawn = Noise(options.seed, (latent_shape[3], latent_shape[4]))
        b, channels, *size = self.output_shape(latent_shape)
        added = [self._pixel_padding.added(axis, n) for axis, n in enumerate(size)]
        padded = [before + n + behind for n, (before, behind) in zip(size, added, strict=True)]
        if given.shape not in ((b, channels, *size), (b, channels, *padded)):
            raise ValueError(
                f"noise must have the shape of the frames {(b, channels, *size)}, got {given.shape}"
            )
        if given.shape != (b, channels, *padded):
            region = Region(*(Span(0, n, n) for n in padded))
            scales = self.config.temporal_scale, self.config.spatial_scale
            time, rows, columns = (
                slice(before, before + n) for n, (before, _) in zip(size, added, strict=True)
            )
            around = drawn.pixels(region, b, channels, scales)
            around[:, :, time, rows, columns] = given
            given = around
        return dataclasses.replace(drawn, given=given)

    def steps(
        self, options: DecodeOptions, output_dtype: mx.Dtype | None = None, backend: Backend | None = None
    ) -> list[Step]:
        """The decoder as steps, from the latents (B, C, F, H, W) to the frames (B, 3, F', H', W')."""
        config = self.config
        widths = config.stage_channels
        prepared = partial(self._prepared, normalized=options.normalized)
        steps = [Step(prepared, self._prepared_taken, (), config.latent_channels)]
        steps.append(LinearStep(self.conv_in, config.latent_channels, widths[0]).step(0, Same()))
        for blocks, upsample in zip(self.det_stages, self.upsamples, strict=True):
            for block in blocks:
                steps += block.steps(len(steps) - 1)
            steps.append(upsample.step(len(steps) - 1))
        context = Read(len(steps) - 1, Appended(config.ghost_latent_frames * config.temporal_scale))
        x_t: int | None = None
        again = backend is not None and backend.makes_keys_anew
        for number in range(options.inference_steps):
            steps += self._denoising(len(steps), context, x_t, number, options.inference_steps, again)
            x_t = len(steps) - 1
        dtype = output_dtype or self.dtype
        unpatching = Unpatching(config.out_channels, config.patch_size, dtype, self._pixel_padding)
        steps.append(unpatching.step(len(steps) - 1))
        return steps

    def _denoising(
        self, first: int, context: Read, x_t: int | None, number: int, count: int, again: bool
    ) -> list[Step]:
        """One pass of the last stage: from patches of noise, or of the pass before, to less noisy ones.

        Args:
            first: Number of the first of these steps.
            context: How the context is read.
            x_t: Number of the step that makes the patches; None for those of the noise.
            number, count: Which pass of how many this is.
            again: Whether its keys and values are made anew for every chunk.
        """
        config = self.config
        width, patch = config.stage_channels[-1], config.out_channels * config.patch_size**2
        time = 1 - number / count
        shared = self.shared_adaln(self.t_embedder(time * config.timestep_scale_multiplier))
        given = () if x_t is None else (Read(x_t, Same()),)
        steps = [
            Step(self._entered, self._entered_taken, (context, *given), width, 2 * width * (patch + width))
        ]
        for block, following in zip(self.diff_blocks, [*self.diff_blocks[1:], None], strict=True):
            addend = None if following is None else (context, following.context_proj)
            steps += block.steps(first + len(steps) - 1, block.modulations(shared), addend, again)
        last = Read(first + len(steps) - 1, Same())
        if number + 1 == count and config.model_output_type == "x0":
            # The last step ends at what it predicts.
            steps.append(Step(self._predicted, self._predicted_taken, (last,), patch, 2 * width * patch))
        else:
            advance = partial(self._advanced, time=time, dt=1 / count), self._advanced_taken
            steps.append(Step(*advance, (last, *given), patch, 2 * width * patch))
        return steps

    def _prepared(self, inputs: Inputs, where: Where, normalized: bool) -> mx.array:
        """Latents (B, C, F, H, W), padded, un-normalised, channels last."""
        z = inputs[0]
        for axis, span in enumerate(where.output, start=2):
            size = z.shape[axis]
            before, _ = self._latent_padding.added(axis - 2, size)
            positions = [min(max(i - before, 0), size - 1) for i in range(span.start, span.stop)]
            z = mx.take(z, mx.array(positions), axis=axis)
        z = z.astype(mx.float32)
        if normalized:
            statistics = self.per_channel_statistics
            mean, std = (a.astype(mx.float32).reshape(-1, 1, 1, 1) for a in (statistics.mean, statistics.std))
            z = z * std + mean
        return mx.contiguous(z.transpose(0, 2, 3, 4, 1).astype(self.dtype))

    def _prepared_taken(self, where: Where) -> Taken:
        made = where.batch * where.output.volume * self.config.latent_channels
        return Taken(made * (5 * 4 + where.dtype.size), made)

    def _noise(self, where: Where) -> mx.array:
        """Patches of the noise of a region of patches."""
        config, (time, *space) = self.config, where.output
        p = config.patch_size
        height, width = (Span(span.start * p, span.stop * p, span.size * p) for span in space)
        scales = config.temporal_scale, config.spatial_scale
        assert where.noise is not None
        pixels = where.noise.pixels(Region(time, height, width), where.batch, config.out_channels, scales)
        return patchify(pixels.astype(where.dtype), p)

    def _entered(self, inputs: Inputs, where: Where) -> mx.array:
        x_t = inputs[1] if len(inputs) > 1 else where.backend.computed(self._noise(where))
        made, context = (
            where.backend.linear(x, layer.weight, layer.bias, where.output)
            for layer, x in ((self.conv_in_x_t, x_t), (self.diff_blocks[0].context_proj, inputs[0]))
        )
        return made + context

    def _entered_taken(self, where: Where) -> Taken:
        positions = where.batch * where.output.volume
        patch, width = self.config.out_channels * self.config.patch_size**2, self.config.stage_channels[-1]
        drawing = Noise.pixels_bytes(where.output, where.batch * patch) * (len(where.inputs) == 1)
        mixing = positions * (patch + 3 * width) * where.dtype.size
        workspace = max(where.backend.linear_workspace(c, width, where.dtype.size) for c in (patch, width))
        return Taken(max(drawing, mixing), positions * width, workspace)

    def _predicted(self, inputs: Inputs, where: Where) -> mx.array:
        normed = where.backend.computed(self.norm_out(inputs[0]))
        return where.backend.linear(normed, self.conv_out.weight, self.conv_out.bias, where.output)

    def _predicted_taken(self, where: Where) -> Taken:
        positions = where.batch * where.output.volume
        patch, width = self.config.out_channels * self.config.patch_size**2, self.config.stage_channels[-1]
        normed = where.backend.rms_norm_bytes(positions * width, where.dtype.size)
        nbytes = max(normed, positions * (width + patch) * where.dtype.size)
        workspace = where.backend.linear_workspace(width, patch, where.dtype.size)
        return Taken(nbytes, positions * width, workspace)

    def _advanced(self, inputs: Inputs, where: Where, time: float, dt: float) -> mx.array:
        """An Euler step, in float32."""
        predicted = where.backend.computed(self._predicted(inputs, where))
        x_t = inputs[1] if len(inputs) > 1 else where.backend.computed(self._noise(where))
        x_t, velocity = x_t.astype(mx.float32), predicted.astype(mx.float32)
        if self.config.model_output_type == "x0":
            velocity = (x_t - velocity) / time
        return (x_t - dt * velocity).astype(predicted.dtype)

    def _advanced_taken(self, where: Where) -> Taken:
        patch = self.config.out_channels * self.config.patch_size**2
        made = where.batch * where.output.volume * patch
        drawing = Noise.pixels_bytes(where.output, where.batch * patch) * (len(where.inputs) == 1)
        advancing = made * where.dtype.size + max(made * (4 * 4 + where.dtype.size), drawing)
        predicting = self._predicted_taken(where)
        return predicting._replace(nbytes=max(predicting.nbytes, advancing))
