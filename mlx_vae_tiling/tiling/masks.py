"""Trapezoidal blending masks."""

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.arguments import told, whole

LARGEST_LENGTH = 2**24
"""Of an axis, in positions: far more than any video has."""


def compute_trapezoidal_mask_1d(
    length: int, ramp_left: int, ramp_right: int, left_starts_from_0: bool = False
) -> mx.array:
    """Weights of one tile along one axis: a linear fade in, ones, a linear fade out.

    With ramps of R entries, clipped to the length, the left one is i/(R+1) for i = 1..R, or i/R for
    i = 0..R-1 when it starts from 0, and the right one is (R+1-i)/(R+1) for i = 1..R. Ramps that
    overlap multiply.

    Args:
        length: Entries of the mask.
        ramp_left: Entries of the fade in.
        ramp_right: Entries of the fade out.
        left_starts_from_0: Whether the fade in begins at exactly 0, as temporal tiles do.

    Returns:
        Array of shape (length,), float32, values in [0, 1].

    Raises:
        ValueError: If the length is not positive.

    Example:
        >>> compute_trapezoidal_mask_1d(6, 2, 3, left_starts_from_0=True)
        array([0, 0.5, 1, 0.75, 0.5, 0.25], dtype=float32)
    """
    length = whole("length", length)
    ramp_left, ramp_right = whole("ramp_left", ramp_left), whole("ramp_right", ramp_right)
    if length <= 0:
        raise ValueError(f"length must be positive, got {length}")
    if length > LARGEST_LENGTH:
        raise ValueError(f"length must be at most {LARGEST_LENGTH}, got {told(length)}")
    left = max(0, min(ramp_left, length))
    right = max(0, min(ramp_right, length))
    mask = np.ones(length)
    if left_starts_from_0:
        mask[:left] *= np.arange(left) / max(left, 1)
    else:
        mask[:left] *= np.arange(1, left + 1) / (left + 1)
    mask[length - right :] *= np.arange(right, 0, -1) / (right + 1)
    return mx.array(mask, dtype=mx.float32)
