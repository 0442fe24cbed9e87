"""What every decoder does with its steps: decoding whole, streamed, by window or by blended tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_vae_tiling.arguments import require
from mlx_vae_tiling.tiling import TilingConfig, iter_decode_with_tiling
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.options import DecodeOptions, GivenOptions, Noise, Timestep
from mlx_vae_tiling.vae.regions import Region, Window
from mlx_vae_tiling.vae.schedule import Pace
from mlx_vae_tiling.vae.stepped import SteppedDecoder


class StreamingDecoder(SteppedDecoder):
    """A decoder that streams its steps, of whichever kind: what `load_decoder` returns.

    It is itself a `decoder_fn` for `decode_with_tiling`.
    """

    def __call__(
        self,
        latents: mx.array,
        causal: bool | None = None,
        timestep: Timestep | None = None,
        debug: bool = False,
        chunked_conv: bool = False,
    ) -> mx.array:
        """Decodes normalised latents as a whole.

        Args:
            latents: (B, C, F, H, W), normalised per channel.
            causal: Overrides the config's.
            timestep: Overrides `decode_timestep`: a number, or an array of shape () or (B,).
            debug, chunked_conv: Accepted, as mlx-video's decoders do; nothing depends on them.

        Returns:
            (B, 3, 8(F-1)+1, 32H, 32W) in the latents' dtype, nominally in [-1, 1], unclamped.

        Raises:
            ValueError: If the latents or the timestep do not fit the decoder.
        """
        options = self._resolved(GivenOptions(causal, timestep))
        self.check(latents, options)
        return self.decode_whole(latents, options)

    def decode_whole(
        self,
        latents: mx.array,
        options: DecodeOptions,
        noise: Noise | None = None,
        backend: Backend | str | None = None,
    ) -> mx.array:
        """The stream fed with one chunk."""
        pieces = list(self.run(latents, options, None, Pace(latents.shape[2]), noise, backend))
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)

    def stream(
        self,
        latents: mx.array,
        *,
        window: Window | None = None,
        latent_frames_per_step: int = 1,
        causal: bool | None = None,
        timestep: Timestep | None = None,
        noise_scale: float | None = None,
        seed: int = 0,
        normalized: bool = True,
        noise: Noise | mx.array | None = None,
        num_inference_steps: int | None = None,
        max_chunk_frames: int | None = None,
        backend: Backend | str | None = None,
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
            seed: Of the noise, which is drawn for the whole video whatever the window.
            normalized: False for latents that were already multiplied by the channels' standard
                deviation and shifted by their mean, as diffusers' LTX-2 pipelines return them.
            noise: Replaces the noise of the seed; for a diffusion decoder also an array of the frames' shape.
            num_inference_steps: Of a diffusion decoder; None for its config's.
            max_chunk_frames: Bounds the frames of a chunk in any layer below what a step gives.
            backend: "cpu", "metal", "cuda" or a `Backend`: the policy to run by, by default that of the
                default device.

        Returns:
            An iterator of (B, 3, f, h, w) in the latents' dtype.

        Raises:
            ValueError: If latents, window or options do not fit the decoder.
        """
        given = GivenOptions(causal, timestep, noise_scale, seed, normalized, num_inference_steps)
        options = self._resolved(given)
        self.check(latents, options)
        noise = self.noise(latents.shape, options, noise)
        require("window", window, "a Window or None", Window, None)
        pixels = (window or Window()).region(*self.output_shape(latents.shape)[2:])
        pace = Pace(latent_frames_per_step, max_chunk_frames)
        return self.run(latents, options, pixels, pace, noise, backend)

    def run(
        self,
        latents: mx.array,
        options: DecodeOptions,
        pixels: Region | None,
        pace: Pace,
        noise: Noise | None = None,
        backend: Backend | str | None = None,
        output_dtype: mx.Dtype | None = None,
    ) -> Iterator[mx.array]:
        """`stream` with everything resolved and checked.

        Args:
            latents: (B, C, F, H, W).
            options: From `options`.
            pixels: The region of the output; None for all of it.
            pace: May be changed while the stream runs.
            noise: None for that of the options' seed.
            backend: None for that of the default device.
            output_dtype: Of the frames; None for that of the latents.
        """
        # A thread cannot compute what another one has only scheduled.
        mx.eval(latents, self.parameters(), [] if noise is None or noise.given is None else noise.given)
        policy = self.policy(backend)

        def pieces() -> Iterator[mx.array]:
            yield from self.open(latents, options, pixels, noise, policy, output_dtype).run(pace)

        return pieces()

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
        timestep: Timestep | None = None,
        noise_scale: float | None = None,
        seed: int = 0,
        normalized: bool = True,
        debug: bool = False,
        backend: Backend | str | None = None,
    ) -> Iterator[mx.array]:
        """Decodes by blended tiles, which see one noise.

        Args:
            latents: (B, C, F, H, W).
            tiling_config: Tiles and overlaps; None decodes whole.
            causal, timestep, noise_scale, seed, normalized, backend: As `stream`.
            debug: Reports tiles through `logging`.

        Returns:
            An iterator of finished frames (B, 3, f, H, W) in the latents' dtype.
        """
        options = self._resolved(GivenOptions(causal, timestep, noise_scale, seed, normalized))
        self.check(latents, options)
        return self.run_tiled(latents, options, tiling_config, backend, debug)

    def run_tiled(
        self,
        latents: mx.array,
        options: DecodeOptions,
        tiling_config: TilingConfig | None,
        backend: Backend | str | None = None,
        debug: bool = False,
        noise: Noise | None = None,
    ) -> Iterator[mx.array]:
        """`stream_tiled` with everything resolved and checked."""
        mx.eval(latents, self.parameters())
        whole = self.noise(latents.shape, options, noise)

        def decode(tile: mx.array, position: tuple[int, int, int]) -> mx.array:
            # In float32, in which tiles are blended.
            return self.decode_whole(tile.astype(mx.float32), options, whole.at(position), backend)

        scales = self.config.spatial_scale, self.config.temporal_scale
        return iter_decode_with_tiling(decode, latents, tiling_config, *scales, debug=debug)
