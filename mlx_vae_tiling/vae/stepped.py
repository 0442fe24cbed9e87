"""What a decoder is, whichever it is: steps, options, noise, checks, and a stream that can be opened."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from mlx_vae_tiling.arguments import require
from mlx_vae_tiling.dtypes import FLOATS
from mlx_vae_tiling.forks import using_mlx
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.backends import backend_of
from mlx_vae_tiling.vae.config import Config
from mlx_vae_tiling.vae.convolution import ConvolutionForm
from mlx_vae_tiling.vae.options import DecodeOptions, GivenOptions, Noise, Timestep
from mlx_vae_tiling.vae.regions import Region, Window
from mlx_vae_tiling.vae.schedule import Step, regions_of
from mlx_vae_tiling.vae.stream import Stream
from mlx_vae_tiling.vae.weights import WeightedModule


class SteppedDecoder(WeightedModule):
    """A decoder as a list of steps.

    It has no weights until `load_weights`, `update` or `init_random` gave it some.

    Args:
        config: The architecture.
        kind: Of configs that the decoder is made of.

    Attributes:
        config: The architecture.
        convolution_form: Pins a form of convolution, None for the backend's choice.
    """

    config: Config

    def __init__(self, config: Config, kind: type) -> None:
        super().__init__()
        require("config", config, f"a {kind.__name__} (load_decoder takes names and files)", kind)
        self.config = config
        self.convolution_form: ConvolutionForm | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in which the decoder computes: that of its weights."""
        raise NotImplementedError

    @property
    def smallest_side(self) -> int:
        """Height and width in latents that it needs at least."""
        return 1

    def steps(
        self, options: DecodeOptions, output_dtype: mx.Dtype | None = None, backend: Backend | None = None
    ) -> list[Step]:
        """The decoder as steps, from the latents (B, C, F, H, W) to the frames (B, 3, F', H', W').

        Args:
            options: Of the decode.
            output_dtype: Of the frames; None for the decoder's own.
            backend: What will compute them; None where that does not matter.
        """
        raise NotImplementedError

    def options(
        self,
        *,
        causal: bool | None = None,
        timestep: Timestep | None = None,
        noise_scale: float | None = None,
        seed: int = 0,
        normalized: bool = True,
        num_inference_steps: int | None = None,
    ) -> DecodeOptions:
        """What `stream` was told, with this decoder's defaults for what it was not.

        Raises:
            TypeError: If a value is of no kind that the option can have.
            ValueError: If a value makes no sense, or the decoder does not have it.
        """
        return self._resolved(
            GivenOptions(causal, timestep, noise_scale, seed, normalized, num_inference_steps)
        )

    def _resolved(self, given: GivenOptions) -> DecodeOptions:
        """What was given, with this decoder's defaults; raises a `ValueError` at what it does not have."""
        raise NotImplementedError

    def check(self, latents: mx.array, options: DecodeOptions) -> None:
        """Raises a `ValueError` unless these latents can be decoded with these options."""
        using_mlx()
        self.require_weights()
        if not isinstance(latents, mx.array):
            raise ValueError(
                f"latents must be an mx.array, got {type(latents).__name__}; mx.array(x) converts"
            )
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(f"latents must have shape (B, {channels}, F, H, W), got {latents.shape}")
        if 0 in latents.shape:
            raise ValueError(f"latents must have no empty axis, got {latents.shape}")
        if min(latents.shape[3:]) < self.smallest_side:
            raise ValueError(
                "a decoder that pads by reflection needs latents at least "
                f"{self.smallest_side} high and wide, got {latents.shape}"
            )
        if latents.dtype not in FLOATS:
            raise ValueError(f"latents must be float32, float16 or bfloat16, got {latents.dtype}")
        if len(options.timestep) not in (0, 1, len(latents)):
            raise ValueError(
                f"timestep must be one number or one per batch entry ({len(latents)}), "
                f"got {len(options.timestep)}"
            )

    def noise(
        self, latent_shape: tuple[int, ...], options: DecodeOptions, given: Noise | mx.array | None = None
    ) -> Noise:
        """The noise of a decode: what is given, or that of the options' seed.

        Raises:
            ValueError: If an array is given and the decoder has no use for one.
        """
        require("noise", given, "an mx.array, a Noise or None", mx.array, Noise, None)
        if isinstance(given, mx.array):
            raise ValueError("noise as an array is for diffusion decoders; this one takes a seed")
        return given or Noise(options.seed, (latent_shape[3], latent_shape[4]))

    def output_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int, int, int]:
        """(B, 3, frames, height, width) of the decode of latents of this shape."""
        b, _, f, h, w = latent_shape
        t, s = self.config.temporal_scale, self.config.spatial_scale
        return b, self.config.out_channels, t * (f - 1) + 1, s * h, s * w

    def regions(self, pixels: Region, causal: bool | None = None) -> list[Region]:
        """What each step computes for a region of the output: first the latents, last the region itself."""
        return regions_of(self.steps(self.options(causal=causal)), pixels)

    def open(
        self,
        latents: mx.array,
        options: DecodeOptions,
        pixels: Region | None = None,
        noise: Noise | None = None,
        backend: Backend | str | None = None,
        output_dtype: mx.Dtype | None = None,
    ) -> Stream:
        """A stream that nothing was computed of yet; as `run`."""
        policy = self.policy(backend).opened()
        steps = self.steps(options, output_dtype or latents.dtype, policy)
        regions = regions_of(steps, pixels or Window().region(*self.output_shape(latents.shape)[2:]))
        noise = self.noise(latents.shape, options, noise)
        return Stream(steps, regions, latents, self.dtype, policy, noise)

    def policy(self, backend: Backend | str | None = None) -> Backend:
        """A backend with the form of convolution that is pinned, if one is."""
        chosen = backend_of(backend)
        return chosen if self.convolution_form is None else replace(chosen, form=self.convolution_form)
