"""The small tiny decoders of the frozen cases."""

import json
from functools import lru_cache
from pathlib import Path

import mlx.core as mx

from mlx_vae_tiling.vae.tiny import TinyDecoder
from mlx_vae_tiling.vae.tiny_config import TinyDecoderConfig

NAMES = ("taeltx2_3", "taeltx2_3_wide")


@lru_cache
def reference_file(name):
    path = Path(__file__).parent / "data" / f"reference_{name}.safetensors"
    return mx.load(str(path), return_metadata=True)


def reference_cases(name):
    return json.loads(reference_file(name)[1]["cases"])


def stored_tensors(name):
    """The decoder's tensors as a published file has them."""
    tensors, metadata = reference_file(name)
    scale = float(metadata["kernel_scale"])
    return {n: v.astype(mx.float32) * scale for n, v in tensors.items() if n.startswith("decoder.")}


@lru_cache
def reference_decoder(name, dtype=mx.float32):
    tensors = stored_tensors(name)
    moved = {n: value.transpose(0, 2, 3, 1) if value.ndim == 4 else value for n, value in tensors.items()}
    decoder = TinyDecoder(TinyDecoderConfig.from_shapes({n: value.shape for n, value in moved.items()}))
    decoder.load_weights([(n, value.astype(dtype)) for n, value in moved.items()])
    return decoder
