"""What depends on the device in layers other than 3x3x3 convolutions, and what they take.

The bytes were counted: on the CPU, and on MLX's Metal host code over a stub driver, on no Mac yet.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_vae_tiling.vae.convolution_frames import convolve_frames

KEY_COPY_QUERIES = 96
"""Queries whose products with a key take as long as copying it, at 13 TFLOP/s and 400 GB/s."""


class AttentionSize(NamedTuple):
    """Numbers of elements of a call of attention: scores, keys with values, and queries."""

    pairs: int
    gathered: int
    queries: int


class LayerBackend:
    """A GPU's part of a `Backend`."""

    def convolve_frames(self, x: mx.array, weight: mx.array, groups: int) -> mx.array:
        """Valid convolution of single frames (B, T, H+2, W+2, C) to (B, T, H, W, O).

        As a batch of two in three dimensions, where it can be: of MLX's kernels for Metal that takes the one
        that multiplies in float32, not Winograd's in half precision and three times the memory.
        """
        b, t, *size = x.shape
        frames = x.reshape(b * t, *size)
        if groups > 1:
            y = mx.conv2d(frames, weight, groups=groups)
        else:
            if b * t % 2:
                frames = mx.concatenate([frames, frames[-1:]])
            halves = frames.reshape(2, -1, *size)
            y = mx.conv_general(halves, weight[:, None])
            y = y.reshape(-1, *y.shape[2:])[: b * t]
        return y.reshape(b, t, *y.shape[1:])

    def frame_convolution_bytes(
        self, frames: int, padded: int, made: int, weights: int, itemsize: int
    ) -> int:
        """What `convolve_frames` takes for its padded input, its output and both at once."""
        even = (padded + made) * (frames + 1) // frames if frames % 2 else 0
        return itemsize * (padded + made + even)

    @property
    def tile_elements(self) -> int:
        """Elements of the widest array that a transformer's layers compute at once."""
        return 2**26

    @property
    def queries_per_key_copy(self) -> int:
        """Queries whose products with a key take as long as copying it for them."""
        return KEY_COPY_QUERIES

    def rms_norm_bytes(self, given: int, itemsize: int) -> int:
        """What normalising takes, its result included."""
        return itemsize * given

    def keys_bytes(self, given: int, itemsize: int) -> int:
        """What making keys and values of so many elements takes, both included."""
        return (30 if itemsize == 4 else 28) * given

    def queries_bytes(self, given: int, itemsize: int) -> int:
        """What making queries of so many elements takes, these included."""
        return (22 if itemsize == 4 else 24) * given

    def mlp_bytes(self, hidden: int, itemsize: int) -> int:
        """What an MLP with so many hidden elements takes, its result included."""
        return 5 * itemsize * hidden // 2

    def attention_bytes(self, size: AttentionSize, itemsize: int) -> int:
        """What a call of attention takes, its result included: copies of keys, but no matrix of scores."""
        return itemsize * (size.gathered + 3 * size.queries)


class CPULayerBackend:
    """The CPU's part of a `Backend`."""

    def convolve_frames(self, x: mx.array, weight: mx.array, groups: int) -> mx.array:
        return convolve_frames(x, weight, groups)

    def frame_convolution_bytes(
        self, frames: int, padded: int, made: int, weights: int, itemsize: int
    ) -> int:
        """Both in float32; in half precision the input twice, and the output when it is rounded."""
        if itemsize == 4:
            return 4 * (padded + made)
        return max(6 * padded + 4 * (weights + made), 2 * padded + 6 * made)

    @property
    def tile_elements(self) -> int:
        return 2**20

    @property
    def queries_per_key_copy(self) -> int:
        return 8

    def rms_norm_bytes(self, given: int, itemsize: int) -> int:
        return given * (8 if itemsize == 4 else 14)

    def mlp_bytes(self, hidden: int, itemsize: int) -> int:
        return hidden * (11 if itemsize == 4 else 8)

    def attention_bytes(self, size: AttentionSize, itemsize: int) -> int:
        """The CPU has no fused attention: the scores lie in memory."""
        return itemsize * (size.pairs + 2 * size.gathered + 5 * size.queries)
