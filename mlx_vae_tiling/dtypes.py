"""The floating-point types of weights and latents, by every name that files and people give them."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.arguments import told


class FloatType(NamedTuple):
    """A floating-point type.

    Args:
        name: That of MLX and NumPy, such as "bfloat16".
        short_name: That of pipelines, such as "bf16".
        stored_name: That of safetensors files, such as "BF16".
        mlx: MLX's.
        numpy: NumPy's type that holds its bytes; it has no bfloat16 of its own.
        item_bytes: Its size.
    """

    name: str
    short_name: str
    stored_name: str
    mlx: mx.Dtype
    numpy: type[np.generic]
    item_bytes: int


FLOAT_TYPES = (
    FloatType("float32", "fp32", "F32", mx.float32, np.float32, 4),
    FloatType("float16", "fp16", "F16", mx.float16, np.float16, 2),
    FloatType("bfloat16", "bf16", "BF16", mx.bfloat16, np.uint16, 2),
)
"""Those in which a decoder has its weights and computes."""

FLOAT64 = FloatType("float64", "fp64", "F64", mx.float64, np.float64, 8)
"""In which latents may be stored; nothing computes in it."""

FLOATS = tuple(kind.mlx for kind in FLOAT_TYPES)
STORED = {kind.stored_name: kind for kind in (*FLOAT_TYPES, FLOAT64)}


def parse_dtype(dtype: mx.Dtype | str) -> mx.Dtype:
    """One of `FLOATS`, itself or by one of its names.

    Raises:
        ValueError: If it is none of them.
    """
    names = {kind.short_name: kind.mlx for kind in FLOAT_TYPES} | {
        kind.name: kind.mlx for kind in FLOAT_TYPES
    }
    parsed = names.get(dtype) if isinstance(dtype, str) else dtype
    if parsed is None or parsed not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(names)} or None, got {told(dtype)}")
    return parsed
