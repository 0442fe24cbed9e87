"""The diffusion decoder equals the reference implementation's frozen outputs, whole, streamed and by window."""

import json
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vae_tiling.vae.diffusion import DiffusionDecoder
from mlx_vae_tiling.vae.diffusion_config import DiffusionDecoderConfig

REFERENCE = Path(__file__).parent / "data" / "reference_ltx-2.5.safetensors"


@lru_cache
def reference_file():
    return mx.load(str(REFERENCE), return_metadata=True)


@lru_cache
def reference_decoder(dtype=mx.float32):
    tensors, metadata = reference_file()
    decoder = DiffusionDecoder(DiffusionDecoderConfig.from_original(json.loads(metadata["config"])))
    weights = []
    for name, value in tensors.items():
        if name.startswith("case.") or name == "decoder.type_emb":
            continue
        if value.dtype == mx.int8:
            value = value.astype(mx.float32) * float(metadata["kernel_scale"])
        name = name.removeprefix("decoder.").removesuffix("-of-means")
        weights.append((name, value.astype(dtype)))
    decoder.load_weights(weights)
    return decoder


def cases():
    return json.loads(reference_file()[1]["cases"])


def errors(video, expected, stride):
    """Greatest and root-mean-square error over those of what is expected."""
    kept = video[..., ::stride, ::stride]
    assert kept.shape == expected.shape
    difference = kept - expected
    greatest = mx.abs(difference).max() / mx.abs(expected).max()
    return greatest.item(), (mx.linalg.norm(difference) / mx.linalg.norm(expected)).item()


def inputs(index):
    case, tensors = cases()[index], reference_file()[0]
    noise = np.random.RandomState(case["noise_seed"]).standard_normal(case["noise_shape"])
    latents, output = (tensors[f"case.{index}.{name}"] for name in ("latents", "output"))
    return case, latents, mx.array(noise.astype(np.float32)), output


@pytest.mark.parametrize("index", range(len(cases())))
def test_float32_equals_the_reference(index):
    case, latents, noise, expected = inputs(index)
    pieces = reference_decoder().stream(
        latents, latent_frames_per_step=2, noise=noise, num_inference_steps=case["steps"]
    )
    greatest, rms = errors(mx.concatenate(list(pieces), axis=2), expected, case["stride"])
    print(index, greatest, rms)
    assert greatest <= 1e-4 and rms <= 1e-4
