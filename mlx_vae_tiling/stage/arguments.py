"""What a `DecodingStage` is given: `DecodingArgs` and `DecodeBatch`, or objects of their shape."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_vae_tiling.arguments import require, told
from mlx_vae_tiling.dtypes import FLOAT_TYPES

PRECISIONS = {kind.short_name: kind.mlx for kind in FLOAT_TYPES}

Array = mx.array | npt.NDArray[Any]


@dataclass
class PipelineConfig:
    """How the VAE decodes.

    Args:
        vae_precision: "fp32", "fp16" or "bf16"; None for the dtypes of the latents and the weights.
        vae_decode_precision: The same, in its place where it is not None.
        vae_tiling: True decodes by a plan within the memory limit, False as a whole. The frames of a
            `VideoDecoder` are the same.
    """

    vae_precision: str | None = None
    vae_tiling: bool = True
    vae_decode_precision: str | None = None


@dataclass
class DecodingArgs:
    """Arguments of a `DecodingStage`, which reads any object with some of these attributes.

    Args:
        disable_autocast: True leaves the weights in the dtype they have, whatever `vae_precision`.
        pipeline_config: Precision and tiling.
        output_type: "latent" passes the latents through, in float32; anything else decodes them.
        vae_cpu_offload: True frees the VAE after `forward`, if the stage loaded it; the next one loads
            it again.
        model_loaded: Whether "vae" is loaded; by default, whether the stage has one.
        model_paths: Under "vae", what `load_decoder` loads the VAE from; under "preview", a tiny decoder
            that decodes the steps of trajectories in its place.
        enable_stage_verification: Whether calling the stage verifies its input and output.
        memory_limit: Bytes, or a string such as "8GB", for a planned decode and the frames it
            returns; by default 70 % of what is available.
        no_tune: As `decode_frames`.
    """

    disable_autocast: bool = False
    pipeline_config: Any = field(default_factory=PipelineConfig)
    output_type: str = "pil"
    vae_cpu_offload: bool = False
    model_loaded: dict[str, bool] = field(default_factory=dict)
    model_paths: dict[str, str | os.PathLike[str]] = field(default_factory=dict)
    enable_stage_verification: bool = True
    memory_limit: int | float | str | None = None
    no_tune: bool = False


@dataclass
class DecodeBatch:
    """What a `DecodingStage` decodes and where it puts the frames; any object with such attributes will do.

    Args:
        latents: (B, C, F, H, W).
        output: Set by the stage: (B, 3, F', H', W') float32 in [0, 1], or the latents.
        return_trajectory_decoded: Whether to decode the trajectory too.
        trajectory_latents: (B, steps, C, F, H, W).
        trajectory_timesteps: The timestep of each step; errors name it.
        trajectory_decoded: Set by the stage: for each step a NumPy array like `output`.
    """

    latents: Array | None = None
    output: Array | None = None
    return_trajectory_decoded: bool = False
    trajectory_latents: Array | None = None
    trajectory_timesteps: Any = None
    trajectory_decoded: list[npt.NDArray[np.float32]] | None = None


def option(owner: Any, name: str, defaults: type) -> Any:
    """An attribute, or what `defaults()` has where it is missing or None."""
    given = getattr(owner, name, None)
    return getattr(defaults(), name) if given is None else given


def precision_of(args: Any) -> mx.Dtype | None:
    """The dtype that `vae_decode_precision` or else `vae_precision` names, or None.

    Raises:
        ValueError: If it names none.
    """
    config = option(args, "pipeline_config", DecodingArgs)
    for field_name in ("vae_decode_precision", "vae_precision"):
        name = option(config, field_name, PipelineConfig)
        if name is not None:
            break
    require(field_name, name, "text or None", str, None)
    if name is not None and name not in PRECISIONS:
        raise ValueError(f"{field_name} must be one of {', '.join(PRECISIONS)} or None, got {told(name)}")
    return None if name is None else PRECISIONS[name]


def require_timesteps(timesteps: Any, steps: int) -> None:
    """Raises a `ValueError` unless there is one timestep for each of so many steps, or None for all."""
    try:
        given = steps if timesteps is None else len(timesteps)
    except TypeError as error:
        raise ValueError(f"trajectory_timesteps must be a sequence or None, got {told(timesteps)}") from error
    if given != steps:
        raise ValueError(f"trajectory_timesteps must have one entry for each of {steps} steps, got {given}")
