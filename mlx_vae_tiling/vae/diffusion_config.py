"""The architecture of LTX-2.5's diffusion decoder: `DiffusionDecoderConfig`, and its published forms."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_vae_tiling.vae.config import TIMESTEP_FEATURES
from mlx_vae_tiling.vae.regions import Stride

ORIGINAL_CLASS = "CausalDiffusionVAE"
DIFFUSERS_CLASS = "LTX2VideoDiffusionDecoderModel"
_ORIGINAL_KEYS = ("stage_channels", "stage_depths", "stage_kernels", "upsamples")
MODULATIONS = 7
"""Rows of a block's table: scale and shift of attention and MLP, and three gates that nothing reads."""


@dataclass(frozen=True)
class DiffusionDecoderConfig:
    """The architecture of a diffusion decoder; the defaults are LTX-2.5's.

    Deterministic stages of neighbourhood attention upsample the latents to a context; a last stage of the
    same kind denoises pixels beside it.

    Args:
        latent_channels: Channels of the latents.
        out_channels: Channels of the frames.
        patch_size: Side in pixels of the patch that one position of the last stage becomes.
        head_dim: Channels of an attention head.
        stage_channels: Width of each stage.
        stage_depths: Blocks of each stage.
        stage_kernels: Positions of an attention window of each stage, along time, height and width.
        upsamples: After each stage but the last, the stride and what it divides the channels by.
        timestep_channels: Width of the embedded timestep.
        timestep_scale_multiplier: What a timestep between 0 and 1 is multiplied by.
        model_output_type: "x0", where the last stage predicts the frames, or "v", their velocity.
        num_inference_steps: Denoising steps of a decode.

    Raises:
        ValueError: If widths, strides and depths do not fit together.
    """

    latent_channels: int = 128
    out_channels: int = 3
    patch_size: int = 4
    head_dim: int = 64
    stage_channels: tuple[int, ...] = (2048, 1024, 512, 512, 256)
    stage_depths: tuple[int, ...] = (4, 6, 4, 2, 8)
    stage_kernels: tuple[Stride, ...] = ((3, 7, 7), (3, 7, 7), (3, 5, 5), (3, 5, 5), (11, 11, 11))
    upsamples: tuple[tuple[Stride, int], ...] = (
        ((1, 2, 2), 2),
        ((2, 1, 1), 2),
        ((2, 2, 2), 1),
        ((2, 2, 2), 2),
    )
    timestep_channels: int = 384
    timestep_scale_multiplier: float = 1000.0
    model_output_type: str = "x0"
    num_inference_steps: int = 1

    def __post_init__(self) -> None:
        stages = len(self.stage_channels)
        if not stages == len(self.stage_depths) == len(self.stage_kernels) == len(self.upsamples) + 1:
            raise ValueError(
                f"stage_depths and stage_kernels must have as many entries as stage_channels ({stages}) and "
                f"upsamples one less, got {len(self.stage_depths)}, {len(self.stage_kernels)} and "
                f"{len(self.upsamples)}"
            )
        for width in self.stage_channels:
            if width % self.head_dim:
                raise ValueError(
                    f"stage_channels must be multiples of head_dim ({self.head_dim}), got {width}"
                )
        if self.head_dim % 8:
            raise ValueError(f"head_dim must be a multiple of 8, got {self.head_dim}")
        for index, (_, divisor) in enumerate(self.upsamples):
            expected = self.stage_channels[index] // divisor
            if self.stage_channels[index + 1] != expected:
                raise ValueError(
                    f"stage_channels[{index + 1}] must be stage_channels[{index}] // {divisor} = {expected}, "
                    f"got {self.stage_channels[index + 1]}"
                )
        if self.model_output_type not in ("x0", "v"):
            raise ValueError(f"model_output_type must be 'x0' or 'v', got {self.model_output_type!r}")
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {self.num_inference_steps}")

    @classmethod
    def from_original(cls, config: Mapping[str, Any]) -> DiffusionDecoderConfig:
        """Reads the JSON of an original checkpoint, class `CausalDiffusionVAE`.

        Raises:
            ValueError: If it describes another kind of decoder.
        """
        vae = config.get("vae", config)
        if vae.get("_class_name") != ORIGINAL_CLASS:
            raise ValueError(f"the VAE must be a {ORIGINAL_CLASS}, got {vae.get('_class_name')}")
        decoder = vae.get("decoder", vae)
        missing = [name for name in _ORIGINAL_KEYS if name not in decoder]
        if missing:
            raise ValueError(
                f"the config of a diffusion decoder needs {', '.join(missing)}, got {sorted(decoder)}"
            )
        channels, kernels = decoder["stage_channels"], [tuple(k) for k in decoder["stage_kernels"]]
        if decoder.get("stage5_channels", channels[-1]) != channels[-1]:
            raise ValueError(
                f"a last stage of another width than its context ({channels[-1]}) is not supported, "
                f"got stage5_channels {decoder['stage5_channels']}"
            )
        return cls(
            latent_channels=decoder.get("in_channels", vae.get("latent_channels", 128)),
            out_channels=decoder.get("out_channels", 3),
            patch_size=decoder.get("patch_size", 4),
            head_dim=decoder.get("head_dim", decoder.get("na_head_dim", 64)),
            stage_channels=tuple(channels),
            stage_depths=tuple(decoder["stage_depths"]),
            stage_kernels=(*kernels[: len(channels) - 1], tuple(decoder.get("stage5_kernel", kernels[-1]))),
            upsamples=tuple((tuple(stride), divisor) for stride, divisor in decoder["upsamples"]),
            timestep_channels=decoder.get("t_emb_dim", 384),
            timestep_scale_multiplier=decoder.get("timestep_scale_multiplier", 1.0),
            model_output_type=vae.get("model_output_type", "v"),
            num_inference_steps=decoder.get("default_num_inference_steps", 2),
        )

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> DiffusionDecoderConfig:
        """Reads a diffusers `diffusion_decoder/config.json`; what it leaves out is LTX-2.5's.

        Raises:
            ValueError: If it describes another class.
        """
        name = config.get("_class_name", DIFFUSERS_CLASS)
        if name != DIFFUSERS_CLASS:
            raise ValueError(f"a diffusion decoder must be a {DIFFUSERS_CLASS}, got {name}")
        published = cls()

        def given(key: str, default: Any) -> Any:
            return config.get(f"decoder_{key}", default)

        kernels = given("stage_kernels", published.stage_kernels[:-1])
        strides = given("upsample_strides", [stride for stride, _ in published.upsamples])
        divisors = given("upsample_channel_reductions", [divisor for _, divisor in published.upsamples])
        last = given("stage5_kernel", published.stage_kernels[-1])
        return cls(
            latent_channels=config.get("latent_channels", published.latent_channels),
            out_channels=config.get("out_channels", published.out_channels),
            patch_size=config.get("patch_size", published.patch_size),
            head_dim=given("head_dim", published.head_dim),
            stage_channels=tuple(given("stage_channels", published.stage_channels)),
            stage_depths=tuple(given("stage_depths", published.stage_depths)),
            stage_kernels=tuple(tuple(kernel) for kernel in (*kernels[: len(strides)], last)),
            upsamples=tuple(zip((tuple(stride) for stride in strides), divisors, strict=True)),
            timestep_channels=given("t_emb_dim", published.timestep_channels),
            timestep_scale_multiplier=given("timestep_scale_multiplier", published.timestep_scale_multiplier),
            model_output_type=given("model_output_type", published.model_output_type),
            num_inference_steps=given("num_inference_steps", published.num_inference_steps),
        )

    @classmethod
    def from_shapes(cls, name_to_shape: Mapping[str, Sequence[int]]) -> DiffusionDecoderConfig:
        """Widths and depths from tensors' shapes, under our names; kernels and strides are LTX-2.5's.

        Raises:
            ValueError: If they are not those of a diffusion decoder with its strides.
        """
        published = cls()
        try:
            widths = [name_to_shape["conv_in.weight"][0]]
            for stage, (stride, _) in enumerate(published.upsamples):
                out, _ = name_to_shape[f"upsamples.{stage}.proj.weight"]
                widths.append(out // math.prod(stride))
            depths = [
                _count(name_to_shape, rf"det_stages\.{stage}\.(\d+)\.") for stage in range(len(widths) - 1)
            ]
            return cls(
                latent_channels=name_to_shape["conv_in.weight"][1],
                patch_size=math.isqrt(name_to_shape["conv_out.weight"][0] // published.out_channels),
                head_dim=name_to_shape["diff_blocks.0.attn.q_norm.weight"][0],
                stage_channels=tuple(widths),
                stage_depths=(*depths, _count(name_to_shape, r"diff_blocks\.(\d+)\.")),
                upsamples=tuple(
                    (stride, before // after)
                    for (stride, _), before, after in zip(
                        published.upsamples, widths[:-1], widths[1:], strict=True
                    )
                ),
                timestep_channels=name_to_shape["t_embedder.mlp.0.weight"][0],
            )
        except KeyError as missing:
            raise ValueError(f"a diffusion decoder needs a tensor {missing}, and there is none") from missing

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent along height and width."""
        return self.patch_size * math.prod(stride[1] for stride, _ in self.upsamples)

    @property
    def temporal_scale(self) -> int:
        """Frames per latent: F latents give temporal_scale * (F - 1) + 1 frames."""
        return math.prod(stride[0] for stride, _ in self.upsamples)

    @property
    def ghost_latent_frames(self) -> int:
        """Copies of the last latent frame behind it, which keep the border out of the frames that remain."""
        return self.stage_kernels[0][0] // 2 * 2

    @property
    def least_latents(self) -> Stride:
        """The smallest clip whose every stage is as large as its window; smaller ones are padded to it."""
        least, scale = [1, 1, 1], [1, 1, 1]
        for kernel, (stride, _) in zip(self.stage_kernels, (*self.upsamples, ((1, 1, 1), 1)), strict=True):
            least = [max(n, -(-k // s)) for n, k, s in zip(least, kernel, scale, strict=True)]
            scale = [s * factor for s, factor in zip(scale, stride, strict=True)]
        return least[0], least[1], least[2]

    @property
    def receptive_field(self) -> tuple[float, float, float]:
        """How far one output depends on latents to either side, in latents: time, height, width.

        Inside of the video: the sum over all blocks of half their windows / (the scale at which they run).
        """
        scale, reach = [1, 1, 1], [0.0, 0.0, 0.0]
        strides = [*(stride for stride, _ in self.upsamples), (1, 1, 1)]
        for kernel, depth, stride in zip(self.stage_kernels, self.stage_depths, strides, strict=True):
            reach = [r + depth * (k // 2) / s for r, k, s in zip(reach, kernel, scale, strict=True)]
            scale = [s * factor for s, factor in zip(scale, stride, strict=True)]
        return reach[0], reach[1], reach[2]

    @property
    def parameters(self) -> int:
        """Parameters of the decoder, without the per-channel statistics."""
        wide, last = self.stage_channels[0], self.stage_channels[-1]
        patch, time = self.out_channels * self.patch_size**2, self.timestep_channels
        count = (self.latent_channels + 1) * wide + (patch + 1) * last + last + (last + 1) * patch
        for width, depth, (stride, divisor) in zip(
            self.stage_channels, self.stage_depths, self.upsamples, strict=False
        ):
            count += depth * self.block_parameters(width)
            count += (width + 1) * width * math.prod(stride) // divisor
        count += self.stage_depths[-1] * (
            self.block_parameters(last) + (last + 1) * last + MODULATIONS * last
        )
        count += (TIMESTEP_FEATURES + 1) * time + (time + 1) * time
        return count + (time + 1) * MODULATIONS * last

    def block_parameters(self, width: int) -> int:
        """Parameters of one block of a deterministic stage."""
        return (
            2 * width + 4 * (width + 1) * width + 2 * self.head_dim + 3 * width * self.hidden_channels(width)
        )

    @staticmethod
    def hidden_channels(width: int) -> int:
        """Width of the inner layer of a block's MLP."""
        return (4 * width + 15) // 16 * 16


def _count(names: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})
