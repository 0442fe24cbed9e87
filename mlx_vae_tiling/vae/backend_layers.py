"""What depends on the device in layers other than 3x3x3 convolutions, and what they take.

The bytes were counted: on the CPU, and on MLX's Metal host code over a stub driver, on no Mac yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_vae_tiling.vae.attention import neighbourhood_attention
from mlx_vae_tiling.vae.kernels.attention_cpu import attention_numpy, attention_workspace
from mlx_vae_tiling.vae.kernels.convolution_frames import convolve_frames
from mlx_vae_tiling.vae.kernels.products_cpu import linear_numpy, linear_workspace, mlp_numpy, mlp_workspace
from mlx_vae_tiling.vae.kernels.workers import default_workers
from mlx_vae_tiling.vae.kernels.workspace import Workspace
from mlx_vae_tiling.vae.regions import Region, Stride

KEY_COPY_QUERIES = 96
"""Queries whose products with a key take as long as copying it, at 13 TFLOP/s and 400 GB/s."""


class AttentionSize(NamedTuple):
    """Numbers of elements of a call of attention: keys with values, and queries."""

    gathered: int
    queries: int


class MLPWeights(NamedTuple):
    """Of a gated MLP: (hidden, C) twice, and (C, hidden)."""

    up: mx.array
    gate: mx.array
    down: mx.array


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

    def linear(self, x: mx.array, weight: mx.array, bias: mx.array | None, region: Region) -> mx.array:
        """`x @ weight.T + bias` of x (B, T, H, W, C) at the positions of a region."""
        return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)

    def mlp(
        self, x: mx.array, prepare: Callable[[mx.array], mx.array], weights: MLPWeights, region: Region
    ) -> mx.array:
        """x (B, T, H, W, C) and the MLP of what `prepare` makes of it.

        By tiles of positions, of which alone the hidden widths are alive.
        """
        positions = x.reshape(-1, x.shape[-1])
        tile = max(1, self.tile_elements // len(weights.up))
        done = []
        for start in range(0, len(positions), tile):
            part = positions[start : start + tile]
            given = prepare(part)
            hidden = nn.silu(given @ weights.gate.T) * (given @ weights.up.T)
            done.append(part + hidden @ weights.down.T)
            mx.eval(done[-1])
        return (mx.concatenate(done) if len(done) > 1 else done[0]).reshape(x.shape)

    def attention(
        self, q: mx.array, kv: mx.array, kernel: Stride, queries: Region, keys: Region, block: Stride
    ) -> mx.array:
        """Neighbourhood attention, of which the arguments are those of `neighbourhood_attention`."""
        return neighbourhood_attention(q, kv, kernel, queries, keys, block, self.tile_elements)

    def linear_bytes(self, made: int, itemsize: int) -> int:
        """What the result of `linear` takes."""
        return itemsize * made

    def rms_norm_bytes(self, given: int, itemsize: int) -> int:
        """What normalising takes, its result included."""
        return itemsize * given

    def keys_bytes(self, given: int, itemsize: int) -> int:
        """What making keys and values of so many elements takes, both included."""
        return (30 if itemsize == 4 else 28) * given

    def queries_bytes(self, given: int, itemsize: int) -> int:
        """What making queries of so many elements takes, these included."""
        return (22 if itemsize == 4 else 24) * given

    def mlp_bytes(self, positions: int, channels: int, hidden: int, itemsize: int) -> int:
        """What an MLP and its input take, the result included, with so many hidden channels."""
        tile = min(positions, max(1, self.tile_elements // hidden))
        return itemsize * (2 * positions * channels + 5 * tile * hidden // 2)

    def attention_bytes(self, calls: Iterable[AttentionSize], made: int, itemsize: int) -> int:
        """What attention takes beside queries and result: copies of keys, but no matrix of scores.

        Args:
            calls: Of these, which come one after the other.
            made: Elements of the result.
            itemsize: Bytes of an element.
        """
        return itemsize * max(size.gathered + 3 * size.queries for size in calls)

    def linear_workspace(self, inputs: int, outputs: int, itemsize: int) -> int:
        """What `linear` computes in outside MLX, for so many channels."""
        return 0

    def mlp_workspace(self, channels: int, hidden: int, itemsize: int) -> int:
        """What `mlp` computes in outside MLX, for so many channels."""
        return 0

    def attention_workspace(self, kernel: Stride, queries: Region, heads: int, channels: int) -> int:
        """What `attention` computes in outside MLX, for queries of so many channels in all heads."""
        return 0


class CPULayerBackend:
    """The CPU's part of a `Backend`."""

    workspace: Workspace | None
    workers: int

    @property
    def threads(self) -> int:
        """Threads that share an operation."""
        return self.workers or default_workers()

    def linear(self, x: mx.array, weight: mx.array, bias: mx.array | None, region: Region) -> mx.array:
        return linear_numpy(x, weight, bias, region, self.workspace, self.threads)

    def mlp(
        self, x: mx.array, prepare: Callable[[mx.array], mx.array], weights: MLPWeights, region: Region
    ) -> mx.array:
        given = prepare(x)
        mx.eval(given)
        return x + mlp_numpy(given, *weights, region, self.workspace, self.threads)

    def attention(
        self, q: mx.array, kv: mx.array, kernel: Stride, queries: Region, keys: Region, block: Stride
    ) -> mx.array:
        return attention_numpy(q, kv, kernel, queries, keys, self.workspace, self.threads)

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

    def linear_bytes(self, made: int, itemsize: int) -> int:
        """In half precision there is also what is rounded."""
        return made * (4 if itemsize == 4 else 6)

    def rms_norm_bytes(self, given: int, itemsize: int) -> int:
        return given * (8 if itemsize == 4 else 14)

    def mlp_bytes(self, positions: int, channels: int, hidden: int, itemsize: int) -> int:
        """Hidden channels exist outside of MLX."""
        return positions * channels * (16 if itemsize == 4 else 18)

    def attention_bytes(self, calls: Iterable[AttentionSize], made: int, itemsize: int) -> int:
        """Keys and scores exist outside of MLX; in half precision the result is rounded."""
        return 0 if itemsize == 4 else 4 * made

    def linear_workspace(self, inputs: int, outputs: int, itemsize: int) -> int:
        return linear_workspace(inputs, outputs, itemsize, self.threads)

    def mlp_workspace(self, channels: int, hidden: int, itemsize: int) -> int:
        return mlp_workspace(channels, hidden, itemsize, self.threads)

    def attention_workspace(self, kernel: Stride, queries: Region, heads: int, channels: int) -> int:
        return attention_workspace(kernel, queries, heads, channels, self.threads)
