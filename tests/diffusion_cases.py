"""The small diffusion decoder of the frozen cases, and decoders of its kind with random weights."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.diffusion import DiffusionDecoder
from mlx_vae_tiling.vae.diffusion_config import DiffusionDecoderConfig

REFERENCE = Path(__file__).parent / "data" / "reference_ltx-2.5.safetensors"


@lru_cache
def reference_file():
    return mx.load(str(REFERENCE), return_metadata=True)


def reference_cases():
    return json.loads(reference_file()[1]["cases"])


def original_tensors(dtype=mx.float32):
    """The decoder's tensors as an original file has them."""
    tensors, metadata = reference_file()
    scale = float(metadata["kernel_scale"])
    return {
        name: (value.astype(mx.float32) * (scale if value.dtype == mx.int8 else 1.0)).astype(dtype)
        for name, value in tensors.items()
        if not name.startswith("case.")
    }


@lru_cache
def reference_decoder(dtype=mx.float32):
    metadata = reference_file()[1]
    decoder = DiffusionDecoder(DiffusionDecoderConfig.from_original(json.loads(metadata["config"])))
    decoder.load_weights(
        [
            (name.removeprefix("decoder.").removesuffix("-of-means"), value)
            for name, value in original_tensors(dtype).items()
            if name != "decoder.type_emb"
        ]
    )
    return decoder


def case_inputs(index):
    """A frozen case: its description, latents, noise and what the reference made of them."""
    case, tensors = reference_cases()[index], reference_file()[0]
    noise = np.random.RandomState(case["noise_seed"]).standard_normal(case["noise_shape"])
    latents, output = (tensors[f"case.{index}.{name}"] for name in ("latents", "output"))
    return case, latents, mx.array(noise.astype(np.float32)), output


SMALL = DiffusionDecoderConfig(
    latent_channels=8,
    head_dim=8,
    stage_channels=(32, 16, 8, 8, 8),
    stage_depths=(1, 1, 1, 1, 2),
    stage_kernels=((3, 3, 3), (3, 3, 3), (3, 3, 5), (3, 5, 3), (5, 5, 5)),
    upsamples=(((1, 2, 2), 2), ((2, 1, 1), 2), ((2, 2, 2), 1), ((2, 2, 2), 1)),
    timestep_channels=16,
)
"""Smaller windows than the published ones, so that small clips have an interior."""


@lru_cache
def small_decoder(**changes):
    return DiffusionDecoder(replace(SMALL, **changes)).init_random(seed=1)
