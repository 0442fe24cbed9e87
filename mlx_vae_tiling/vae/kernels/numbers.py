"""MLX's arrays as NumPy sees them: on the same buffers, bfloat16 by its bits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def numbers(x: mx.array) -> np.ndarray:
    """NumPy's view of an array's buffer; of bfloat16, which it does not know, the bits as uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, copy=False)


def widen(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Copies what `numbers` gave, or a part of it, into an array of float32."""
    if x.dtype == np.uint16:
        # Copied and then shifted where it lies: NumPy would shift and widen through a buffer of its own.
        bits = out.view(np.uint32)
        bits[...] = x
        np.left_shift(bits, np.uint32(16), out=bits)
    else:
        out[...] = x
    return out
