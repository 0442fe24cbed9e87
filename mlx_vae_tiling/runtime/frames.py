"""From what a decoder gives to finished frames: rounded or scaled, and looked at for faults."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

Frames = np.ndarray[Any, np.dtype[Any]]
KINDS = {8: "uint8", 16: "uint16", 32: "float32"}
"""RGB frames (f, H, W, 3) by their bits, of 32 in [0, 1]. Beside them "unit": (B, 3, f, H, W) float32."""

CONSTANT_FRAME_PIXELS = 32 * 32
"""Larger frames of one single value are taken for a failed computation."""


def finish(piece: mx.array, kind: str) -> tuple[Frames, list[tuple[int, str]]]:
    """Finishes a piece, frame by frame, so that what that takes is one frame large.

    Args:
        piece: (B, 3, f, H, W), nominally in [-1, 1]; B is 1 for RGB frames.
        kind: What to make of it: one of `KINDS`, or "unit".

    Returns:
        The frames, x/2 + 1/2 clamped to [0, 1], rounded to integers if these are asked for; and for each
        frame that is not finite, or large and of one single value, its index and which of the two it is.
    """
    large = piece.shape[3] * piece.shape[4] > CONSTANT_FRAME_PIXELS
    finished, faults = [], []
    for index in range(piece.shape[2]):
        x = piece[:, :, index].astype(mx.float32)
        finite = mx.all(mx.isfinite(x))
        varied = mx.all(mx.max(x, axis=(1, 2, 3)) > mx.min(x, axis=(1, 2, 3)))
        mx.eval(finite, varied)
        frame = mx.clip(x / 2 + 0.5, 0, 1)
        if kind in ("uint8", "uint16"):
            most, dtype = (255, mx.uint8) if kind == "uint8" else (65535, mx.uint16)
            frame = mx.round(frame * most).astype(dtype)
        if kind != "unit":
            frame = frame[0].transpose(1, 2, 0)
        mx.eval(frame)
        finished.append(np.array(frame))
        if not finite.item():
            faults.append((index, "not finite"))
        elif large and not varied.item():
            faults.append((index, "of one single value"))
    return np.stack(finished, axis=2 if kind == "unit" else 0), faults


def finishing_bytes(elements: int, itemsize: int) -> int:
    """What MLX takes to finish a frame of so many elements to 8 bits, beside the piece."""
    return (6 if itemsize == 4 else 10) * elements
