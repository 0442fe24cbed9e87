"""The tiny decoders equal the reference implementation's frozen outputs, whole, streamed and by window."""

import json
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_vae_tiling.vae.tiny import TinyDecoder
from mlx_vae_tiling.vae.tiny_config import TinyDecoderConfig

NAMES = ("taeltx2_3", "taeltx2_3_wide")


@lru_cache
def reference_file(name):
    return mx.load(str(Path(__file__).parent / "data" / f"reference_{name}.safetensors"), return_metadata=True)


@lru_cache
def reference_decoder(name):
    tensors, metadata = reference_file(name)
    tensors = {n: value for n, value in tensors.items() if n.startswith("decoder.")}
    decoder = TinyDecoder(TinyDecoderConfig.from_shapes({n: value.shape for n, value in tensors.items()}))
    weights = []
    for n, value in tensors.items():
        value = value.astype(mx.float32) * float(metadata["kernel_scale"])
        weights.append((n, value.transpose(0, 2, 3, 1) if value.ndim == 4 else value))
    decoder.load_weights(weights)
    return decoder


CASES = [(name, index) for name in NAMES for index in range(4)]


@pytest.mark.parametrize("step", [1, 2, 8])
@pytest.mark.parametrize(("name", "index"), CASES)
def test_float32_equals_the_reference(name, index, step):
    tensors, metadata = reference_file(name)
    stride = json.loads(metadata["cases"])[index]["stride"]
    latents, expected = (tensors[f"case.{index}.{part}"] for part in ("latents", "output"))
    pieces = reference_decoder(name).stream(latents, latent_frames_per_step=step)
    video = mx.concatenate(list(pieces), axis=2)[..., ::stride, ::stride]
    assert video.shape == expected.shape
    error = (mx.abs((video + 1) / 2 - expected).max() / mx.abs(expected).max()).item()
    print(error)
    assert error <= 1e-5
