"""`VideoDecoder`: latents to frames, whole, streamed, by window or by blended tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_vae_tiling.dtypes import FLOATS
from mlx_vae_tiling.tiling import TilingConfig, iter_decode_with_tiling
from mlx_vae_tiling.vae.backend import current_backend
from mlx_vae_tiling.vae.blocks import ResBlockNarrowing, ResBlocks
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.convolution import ConvolutionForm
from mlx_vae_tiling.vae.layers import (
    ConvolutionLayer,
    DepthToSpaceUpsample,
    ResnetBlock3D,
    Setting,
    TimestepEmbedding,
    UNetMidBlock3D,
    modulations,
    settle,
)
from mlx_vae_tiling.vae.operations import activate, unpatchify
from mlx_vae_tiling.vae.streaming import CAUSAL, CENTRED, Pace, Region, Window


class PerChannelStatistics(nn.Module):
    """Mean and standard deviation of each latent channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.mean = mx.zeros((channels,))
        self.std = mx.ones((channels,))


class VideoDecoder(nn.Module):
    """A convolutional LTX video decoder.

    It has no weights until `load_weights` or `init_random` gave it some; `load_decoder` builds one
    from a checkpoint. It is itself a `decoder_fn` for `decode_with_tiling`.

    Args:
        config: The architecture.

    Attributes:
        decode_timestep: Default timestep of versions that are conditioned on one.
        decode_noise_scale: Default share of noise in the latents of those versions; 0 makes
            decoding them deterministic.
        convolution_form: Pins a form of convolution, None for the backend's default.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.decode_timestep = 0.05
        self.decode_noise_scale = 0.025
        self.convolution_form: ConvolutionForm | None = None
        self._has_weights = False
        self.conv_in = ConvolutionLayer(config.latent_channels, config.bottleneck_channels)
        self.up_blocks: list[Any] = []
        fields = 0
        for block, width in config.blocks():
            if isinstance(block, ResBlocks):
                self.up_blocks.append(UNetMidBlock3D(width, block, config.timestep_conditioning, fields))
                fields += 2 * block.num_layers * block.inject_noise
            elif isinstance(block, ResBlockNarrowing):
                self.up_blocks.append(ResnetBlock3D(width, width // block.multiplier))
            else:
                self.up_blocks.append(DepthToSpaceUpsample(width, block))
        self._noise_fields = fields
        self.conv_out = ConvolutionLayer(config.base_channels, config.out_channels * config.patch_size**2)
        if config.timestep_conditioning:
            self.timestep_scale_multiplier = mx.array(1000.0)
            self.last_time_embedder = TimestepEmbedding(2 * config.base_channels)
            self.last_scale_shift_table = mx.zeros((2, config.base_channels))
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in which the decoder computes: that of its weights."""
        return self.conv_in.conv.weight.dtype

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> nn.Module:
        """As `nn.Module.load_weights`."""
        super().load_weights(file_or_weights, strict)
        self._has_weights = True
        return self

    def init_random(self, seed: int = 0) -> VideoDecoder:
        """Fills all parameters with seeded noise that keeps activations near unit variance.

        For tests and benchmarks: the frames show nothing.
        """
        key = mx.random.key(seed)
        weights = []
        for name, value in dict(tree_flatten(self.parameters())).items():
            key, own = mx.random.split(key)
            fan_in = value.size // value.shape[0] if value.ndim > 1 else 100
            weights.append((name, mx.random.normal(value.shape, value.dtype, key=own) / math.sqrt(fan_in)))
        kept = {"per_channel_statistics.std", "timestep_scale_multiplier"}
        self.load_weights([(name, value) for name, value in weights if name not in kept], strict=False)
        return self

    def __call__(
        self, latents: mx.array, causal: bool | None = None, timestep: Any = None, debug: bool = False
    ) -> mx.array:
        """Decodes normalised latents as a whole.

        Args:
            latents: (B, C, F, H, W), normalised per channel.
            causal: Overrides the config's.
            timestep: Overrides `decode_timestep`: a number, or an array of shape () or (B,).
            debug: Accepted for compatibility; nothing depends on it.

        Returns:
            (B, 3, 8(F-1)+1, 32H, 32W) in the latents' dtype, nominally in [-1, 1], unclamped.

        Raises:
            ValueError: If the latents or the timestep do not fit the decoder.
        """
        self._check(latents)
        step = latents.shape[2]
        pieces = list(self.stream(latents, latent_frames_per_step=step, causal=causal, timestep=timestep))
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)

    def decode_tiled(
        self, latents: mx.array, tiling_config: TilingConfig | None = None, **options: Any
    ) -> mx.array:
        """Decodes by blended tiles to a whole video: the pieces of `stream_tiled`, joined.

        Args:
            latents: (B, C, F, H, W).
            tiling_config: Tiles and overlaps; None decodes whole.
            **options: As `stream_tiled`.
        """
        return mx.concatenate(list(self.stream_tiled(latents, tiling_config, **options)), axis=2)

    def stream_tiled(
        self,
        latents: mx.array,
        tiling_config: TilingConfig | None = None,
        *,
        causal: bool | None = None,
        timestep: Any = None,
        noise_scale: float | None = None,
        seed: int = 0,
        normalized: bool = True,
        debug: bool = False,
    ) -> Iterator[mx.array]:
        """Decodes by blended tiles, which see one noise field.

        Args:
            latents: (B, C, F, H, W).
            tiling_config: Tiles and overlaps; None decodes whole.
            causal, timestep, noise_scale, seed, normalized: As `stream`.
            debug: Reports tiles through `logging`.

        Returns:
            An iterator of finished frames (B, 3, f, H, W) in the latents' dtype.
        """
        self._check(latents)
        prepared = self.prepare_latents(latents, noise_scale=noise_scale, seed=seed, normalized=normalized)

        def decode(tile: mx.array) -> mx.array:
            step = tile.shape[2]
            options: dict[str, Any] = {"causal": causal, "timestep": timestep, "seed": seed}
            pieces = self.stream(
                tile, latent_frames_per_step=step, noise_scale=0.0, normalized=False, **options
            )
            return next(pieces)

        scales = self.config.spatial_scale, self.config.temporal_scale
        pieces = iter_decode_with_tiling(decode, prepared, tiling_config, *scales, debug=debug)
        # Not a generator expression, which would keep each piece while the next is computed.
        return map(lambda piece: piece.astype(latents.dtype), pieces)

    def prepare_latents(
        self,
        latents: mx.array,
        *,
        noise_scale: float | None = None,
        seed: int = 0,
        normalized: bool = True,
    ) -> mx.array:
        """Mixes in the decode noise, where the version has it, and un-normalises.

        Args:
            latents: (B, C, F, H, W).
            noise_scale, seed, normalized: As `stream`.

        Returns:
            Latents in float32 that decode with `normalized=False` and `noise_scale=0`.

        Raises:
            ValueError: If noise_scale does not lie between 0 and 1.
        """
        scale = self._mixing_scale(noise_scale)
        shape = (1, -1, 1, 1, 1)
        statistics = self.per_channel_statistics
        mean, std = (a.astype(mx.float32).reshape(shape) for a in (statistics.mean, statistics.std))
        z = latents.astype(mx.float32)
        if scale:
            z = z if normalized else (z - mean) / std
            noise = self._latent_noise(seed, z.shape)
            return (1 - scale) * z * std + scale * noise * std + mean
        return z * std + mean if normalized else z

    def output_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int, int, int]:
        """(B, 3, frames, height, width) of the decode of latents of this shape."""
        b, _, f, h, w = latent_shape
        t, s = self.config.temporal_scale, self.config.spatial_scale
        return b, self.config.out_channels, t * (f - 1) + 1, s * h, s * w

    def stream(
        self,
        latents: mx.array,
        *,
        window: Window | None = None,
        latent_frames_per_step: int = 1,
        causal: bool | None = None,
        timestep: Any = None,
        noise_scale: float | None = None,
        seed: int = 0,
        normalized: bool = True,
        max_chunk_frames: int | None = None,
        pace: Pace | None = None,
    ) -> Iterator[mx.array]:
        """Decodes piece by piece; the concatenation along time is exactly the whole decode.

        Memory does not grow with the number of frames. Arguments are checked at once, before the
        first piece is asked for.

        Args:
            latents: (B, C, F, H, W).
            window: The part of the output to decode; None for all of it.
            latent_frames_per_step: Latent frames taken in at a time. Larger steps use more memory.
            causal: Overrides the config's.
            timestep: Overrides `decode_timestep`: a number, or an array of shape () or (B,).
            noise_scale: Overrides `decode_noise_scale`.
            seed: Of the noise fields, which are drawn for the whole video whatever the window.
            normalized: False for latents that were already multiplied by the channels' standard
                deviation and shifted by their mean, as diffusers' LTX-2 pipelines return them.
            max_chunk_frames: Bounds the frames of a chunk in any layer below what a step gives.
            pace: Both of these in one, which may be changed while the stream runs.

        Returns:
            An iterator of (B, 3, f, h, w) in the latents' dtype.

        Raises:
            ValueError: If latents, window or options do not fit the decoder.
        """
        self._check(latents)
        pace = pace or Pace(latent_frames_per_step, max_chunk_frames)
        b, _, *size = self.output_shape(latents.shape)
        pixels = (window or Window()).region(*size)
        if self.config.timestep_conditioning:
            timestep = self._scaled_timestep(self.decode_timestep if timestep is None else timestep, b)
        setting = Setting(
            reach=CAUSAL if (self.config.causal if causal is None else causal) else CENTRED,
            padding=self.config.spatial_padding_mode,
            form=self.convolution_form,
            timestep=timestep if self.config.timestep_conditioning else None,
            noise=self._noise_field(seed),
        )
        dtype = latents.dtype
        # A noise field belongs to the latents as a whole; all else is prepared by the chunk.
        if self._mixing_scale(noise_scale):
            latents = self.prepare_latents(latents, noise_scale=noise_scale, seed=seed, normalized=normalized)
            normalized = False
        prepare = partial(self.prepare_latents, noise_scale=0.0, normalized=normalized)
        return self._pieces(latents, prepare, pixels, pace, setting, dtype)

    def regions(self, pixels: Region, causal: bool | None = None) -> list[Region]:
        """The latents that a region of the output needs, then what each layer makes of them."""
        reach = CAUSAL if (self.config.causal if causal is None else causal) else CENTRED
        p = self.config.patch_size
        height, width = pixels.height.before_upsampling(p, 0), pixels.width.before_upsampling(p, 0)
        regions = [Region(pixels.time, height, width)]
        for layer in reversed(self._layers()):
            regions.append(layer.source(regions[-1], reach))
        return regions[::-1]

    def _layers(self) -> list[Any]:
        return [self.conv_in, *self.up_blocks, self.conv_out]

    def _pieces(
        self,
        latents: mx.array,
        prepare: Callable[[mx.array], mx.array],
        pixels: Region,
        pace: Pace,
        setting: Setting,
        dtype: mx.Dtype,
    ) -> Iterator[mx.array]:
        source, *regions = self.regions(pixels, setting.reach == CAUSAL)
        prepared = map(prepare, _latent_chunks(latents, source, pace))
        chunks = (chunk.transpose(0, 2, 3, 4, 1).astype(self.dtype) for chunk in prepared)
        options: dict[str, Any] = {}
        scale = 1
        for layer, region in zip(self._layers(), regions, strict=True):
            if layer is self.conv_out:
                options["before"] = partial(activate, modulation=self._last_modulation(setting))
            chunks = layer.stream(chunks, region, partial(pace.limit, scale), setting, **options)
            if isinstance(layer, DepthToSpaceUpsample):
                scale *= layer.stride[0]
        return self._finish(chunks, regions[-1], pixels, dtype)

    def _finish(
        self, chunks: Iterator[mx.array], patches: Region, pixels: Region, dtype: mx.Dtype
    ) -> Iterator[mx.array]:
        """Unpatchifies, one piece ahead of the consumer where evaluation is asynchronous."""
        p = self.config.patch_size
        top, left = patches.height.start * p, patches.width.start * p
        rows = slice(pixels.height.start - top, pixels.height.stop - top)
        columns = slice(pixels.width.start - left, pixels.width.stop - left)
        ahead = current_backend() != "cpu"
        waiting: list[mx.array] = []
        for chunk in chunks:
            waiting.append(unpatchify(chunk, p)[..., rows, columns].astype(dtype))
            del chunk
            settle(waiting[-1])
            if len(waiting) > ahead:
                yield waiting.pop(0)
        yield from waiting

    def _mixing_scale(self, noise_scale: float | None) -> float:
        """The share of noise that is mixed into the latents: 0 in versions without a timestep."""
        scale = self.decode_noise_scale if noise_scale is None else noise_scale
        if not 0 <= scale <= 1:
            raise ValueError(f"noise_scale must lie between 0 and 1, got {scale}")
        return scale if self.config.timestep_conditioning else 0.0

    def _latent_noise(self, seed: int, shape: tuple[int, ...]) -> mx.array:
        return mx.random.normal(shape, key=mx.random.split(mx.random.key(seed))[0])

    def _noise_field(self, seed: int) -> Callable[[int, int, int], mx.array]:
        keys = mx.random.split(mx.random.split(mx.random.key(seed))[1], max(self._noise_fields, 1))
        return lambda index, height, width: mx.random.normal((height, width), key=keys[index])

    def _scaled_timestep(self, timestep: Any, batch: int) -> mx.array:
        given = mx.array(timestep, mx.float32).reshape(-1)
        if given.size not in (1, batch):
            raise ValueError(
                f"timestep must be one number or one per batch entry ({batch}), got {given.size}"
            )
        return mx.broadcast_to(given * self.timestep_scale_multiplier.astype(mx.float32), (batch,))

    def _last_modulation(self, setting: Setting) -> tuple[mx.array, mx.array] | None:
        if setting.timestep is None:
            return None
        shift, scale = modulations(self.last_time_embedder(setting.timestep), self.last_scale_shift_table)
        return shift, scale

    def _check(self, latents: mx.array) -> None:
        if not self._has_weights:
            raise ValueError(
                "the decoder has no weights; use load_decoder(source), decoder.load_weights(...) "
                "or, to run on noise, decoder.init_random()"
            )
        if not isinstance(latents, mx.array):
            raise ValueError(
                f"latents must be an mx.array, got {type(latents).__name__}; mx.array(x) converts"
            )
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(f"latents must have shape (B, {channels}, F, H, W), got {latents.shape}")
        if 0 in latents.shape:
            raise ValueError(f"latents must have no empty axis, got {latents.shape}")
        if latents.dtype not in FLOATS:
            raise ValueError(f"latents must be float32, float16 or bfloat16, got {latents.dtype}")
        if self.config.spatial_padding_mode == "reflect" and min(latents.shape[3:]) < 2:
            raise ValueError(
                "a decoder that pads by reflection needs latents at least 2 high and wide, "
                f"got {latents.shape}"
            )


def _latent_chunks(latents: mx.array, source: Region, pace: Pace) -> Iterator[mx.array]:
    """The latents of a region, step by step."""
    rows, columns = (slice(span.start, span.stop) for span in (source.height, source.width))
    start = source.time.start
    while start < source.time.stop:
        stop = min(start + pace.latent_frames, source.time.stop)
        yield latents[:, :, start:stop, rows, columns]
        start = stop
