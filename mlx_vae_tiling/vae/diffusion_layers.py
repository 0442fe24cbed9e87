"""What a diffusion decoder is made of beside its attention blocks: attribute names are the checkpoints'."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_vae_tiling.vae.backend import Taken, Where
from mlx_vae_tiling.vae.config import TIMESTEP_FEATURES
from mlx_vae_tiling.vae.diffusion_config import MODULATIONS
from mlx_vae_tiling.vae.layers import sinusoid
from mlx_vae_tiling.vae.operations import cut, depth_to_space
from mlx_vae_tiling.vae.regions import Need, Stride, Upsampling
from mlx_vae_tiling.vae.schedule import Read, Step

Inputs = Sequence[mx.array]


class PixelShuffle(nn.Module):
    """A linear layer to more channels, which then become positions; the first frame of all is dropped."""

    def __init__(self, channels: int, stride: Stride, divisor: int):
        super().__init__()
        self._need, self._positions = Upsampling(stride), math.prod(stride)
        self._out = channels * self._positions // divisor
        self._in, self.proj = channels, nn.Linear(channels, self._out)
        self._operations = 2 * channels * self._out // self._positions

    def step(self, producer: int) -> Step:
        return Step(
            self._shuffled,
            self._taken,
            (Read(producer, self._need),),
            self._out // self._positions,
            self._operations,
        )

    def _shuffled(self, inputs: Inputs, where: Where) -> mx.array:
        made = where.backend.linear(inputs[0], self.proj.weight, self.proj.bias, where.inputs[0])
        y = where.backend.computed(depth_to_space(where.backend.computed(made), self._need.stride))
        return cut(y, self._need.slices(where.inputs[0], where.output))

    def _taken(self, where: Where) -> Taken:
        made = where.batch * where.inputs[0].volume * self._out
        kept = where.batch * where.output.volume * self._out // self._positions
        rearranging = (2 * made + kept * (kept < made)) * where.dtype.size
        nbytes = max(where.backend.linear_bytes(made, where.dtype.size), rearranging)
        return Taken(nbytes, made, where.backend.linear_workspace(self._in, self._out, where.dtype.size))


class TimestepEmbedder(nn.Module):
    """Sinusoid, then two linear layers."""

    def __init__(self, channels: int):
        super().__init__()
        self.mlp = [nn.Linear(TIMESTEP_FEATURES, channels), nn.SiLU(), nn.Linear(channels, channels)]

    def __call__(self, timestep: float) -> mx.array:
        """A scaled timestep to (channels,)."""
        first, activation, last = self.mlp
        features = sinusoid(mx.array([timestep], mx.float32))[0].astype(first.weight.dtype)
        return last(activation(first(features)))


class SharedModulation(nn.Module):
    """The embedded timestep to seven rows of modulations, common to all blocks."""

    def __init__(self, timestep_channels: int, channels: int):
        super().__init__()
        self.proj = nn.Linear(timestep_channels, MODULATIONS * channels)

    def __call__(self, embedding: mx.array) -> mx.array:
        return self.proj(nn.silu(embedding)).reshape(MODULATIONS, -1)


class LinearStep:
    """A step that maps each position by a layer."""

    def __init__(self, layer: nn.Linear, in_channels: int, out_channels: int):
        self._layer, self._in, self._out = layer, in_channels, out_channels

    def step(self, producer: int, need: Need) -> Step:
        reads = (Read(producer, need),)
        return Step(self._compute, self._taken, reads, self._out, 2 * self._in * self._out)

    def _compute(self, inputs: Inputs, where: Where) -> mx.array:
        return where.backend.linear(inputs[0], self._layer.weight, self._layer.bias, where.output)

    def _taken(self, where: Where) -> Taken:
        positions = where.batch * where.output.volume
        made = positions * self._out
        size = where.dtype.size
        workspace = where.backend.linear_workspace(self._in, self._out, size)
        return Taken(where.backend.linear_bytes(made, size) + positions * self._in * size, made, workspace)
