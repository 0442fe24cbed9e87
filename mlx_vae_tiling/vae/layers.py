"""The layers of the convolutional decoder: attribute names are the original checkpoints', axes channels-last.

Each layer says what its steps are: what they read, what they compute there, and what that takes. When and
with how many frames they run is no business of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_vae_tiling.vae.backend import Taken, Where
from mlx_vae_tiling.vae.blocks import PaddingMode, ResBlocks, Upsample
from mlx_vae_tiling.vae.config import TIMESTEP_FEATURES
from mlx_vae_tiling.vae.kernels.operands import Operands
from mlx_vae_tiling.vae.operations import Activation, Padding, cut
from mlx_vae_tiling.vae.regions import Convolution, Same, Upsampling
from mlx_vae_tiling.vae.schedule import Read, Step

Inputs = Sequence[mx.array]


class Conv3d(nn.Module):
    """3x3x3 convolution; the checkpoints call its tensors `conv.weight` and `conv.bias`.

    Args:
        in_channels, out_channels: Of the kernel.
        padding: What lies beyond the borders of the frame. Beyond those of time lie replicas.
    """

    class Kernel(nn.Module):
        def __init__(self, in_channels: int, out_channels: int):
            super().__init__()
            self.weight = mx.zeros((out_channels, 3, 3, 3, in_channels))
            self.bias = mx.zeros((out_channels,))

    def __init__(self, in_channels: int, out_channels: int, padding: PaddingMode):
        super().__init__()
        self.conv = self.Kernel(in_channels, out_channels)
        self._in, self._out, self._padding = in_channels, out_channels, padding

    def __call__(
        self,
        inputs: Inputs,
        where: Where,
        need: Convolution,
        activation: Activation | None = None,
        skip: mx.array | None = None,
    ) -> mx.array:
        """Convolves the first input, after an activation and plus a skip if there are any."""
        padding = Padding.between(where.inputs[0], where.output, need.reach, self._padding)
        first = where.output.time.start
        weight, bias = self.conv.weight, self.conv.bias
        return where.backend.convolution(inputs[0], weight, bias, padding, activation, skip, first)

    def taken(self, where: Where, activated: bool = False) -> Taken:
        """What a call takes."""
        t, h, w = (span.length for span in where.output)
        padding = Padding.between(where.inputs[0], where.output, (1, 1), self._padding)
        operands = Operands(
            *(where.batch, t, h, w, self._in, self._out, where.dtype.size),
            ((0, 0), padding.rows, padding.columns),
            self._padding == "reflect",
        )
        nbytes = where.backend.convolution_bytes(operands, where.inputs[0].time.length, activated)
        return Taken(nbytes, max(operands.padded, operands.made), where.backend.workspace_bytes(operands))

    def step(self, producer: int, need: Convolution, activation: Activation | None = None) -> Step:
        """The convolution as a step of its own."""
        return Step(
            partial(self, need=need, activation=activation),
            partial(self.taken, activated=activation is not None),
            (Read(producer, need),),
            self._out,
            self.operations,
            self.kernel,
        )

    @property
    def kernel(self) -> tuple[int, int]:
        """Channels in and out."""
        return self._in, self._out

    @property
    def operations(self) -> int:
        """Multiplications and additions per position."""
        return 54 * self._in * self._out


class TimestepEmbedding(nn.Module):
    """Sinusoid, then two linear layers; `dimension` is shifts and scales together."""

    class MLP(nn.Module):
        def __init__(self, dimension: int):
            super().__init__()
            self.linear_1 = nn.Linear(TIMESTEP_FEATURES, dimension)
            self.linear_2 = nn.Linear(dimension, dimension)

    def __init__(self, dimension: int):
        super().__init__()
        self.timestep_embedder = self.MLP(dimension)

    def __call__(self, timestep: mx.array) -> mx.array:
        """(B,) scaled timesteps to (B, dimension)."""
        mlp = self.timestep_embedder
        return mlp.linear_2(nn.silu(mlp.linear_1(sinusoid(timestep).astype(mlp.linear_1.weight.dtype))))


def sinusoid(timestep: mx.array) -> mx.array:
    """(B,) scaled timesteps to (B, 256) in float32."""
    half = TIMESTEP_FEATURES // 2
    frequencies = mx.exp(-math.log(10000) * mx.arange(half) / half)
    angles = timestep.astype(mx.float32)[:, None] * frequencies
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=1)


def modulations(embedding: mx.array, table: mx.array) -> list[mx.array]:
    """Splits an embedding (B, N*C) added to a table (N, C) into N arrays (B, 1, 1, 1, C)."""
    b, (n, c) = len(embedding), table.shape
    values = (embedding.reshape(b, n, c) + table).reshape(b, n, 1, 1, 1, c)
    return [values[:, i] for i in range(n)]


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each position."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(x)


class ResnetBlock3D(nn.Module):
    """Two activated convolutions beside a skip, which is normalised and mixed where widths differ.

    Args:
        in_channels, out_channels: Of the block.
        padding: As `Conv3d`.
        timestep_conditioning: Whether norms are scaled and shifted by the timestep.
        noise: Number of the first of the two noise fields that are added, and the positions per latent of
            its level; None for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        padding: PaddingMode,
        timestep_conditioning: bool = False,
        noise: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.conv1 = Conv3d(in_channels, out_channels, padding)
        self.conv2 = Conv3d(out_channels, out_channels, padding)
        if in_channels != out_channels:
            self.norm3 = ChannelNorm(in_channels)
            self.conv_shortcut = nn.Linear(in_channels, out_channels)
        if timestep_conditioning:
            self.scale_shift_table = mx.zeros((4, in_channels))
        if noise is not None:
            self.per_channel_scale1 = mx.zeros((in_channels,))
            self.per_channel_scale2 = mx.zeros((in_channels,))
        self._in, self._out, self._noise = in_channels, out_channels, noise

    def steps(self, producer: int, need: Convolution, embedding: mx.array | None = None) -> list[Step]:
        """Both convolutions; the second reads the block's input again, for the skip."""
        first, second = Activation(), Activation()
        if embedding is not None:
            shift1, scale1, shift2, scale2 = modulations(embedding, self.scale_shift_table)
            first, second = Activation(shift1, scale1), Activation(shift2, scale2)
        return [
            Step(
                partial(self._first, need=need, activation=first),
                partial(self.conv1.taken, activated=True),
                (Read(producer, need),),
                self._out,
                self.conv1.operations,
                self.conv1.kernel,
            ),
            Step(
                partial(self._second, need=need, activation=second),
                self._second_taken,
                (Read(producer + 1, need), Read(producer, Same())),
                self._out,
                self.conv2.operations,
                self.conv2.kernel,
            ),
        ]

    def _first(self, inputs: Inputs, where: Where, need: Convolution, activation: Activation) -> mx.array:
        return self._with_noise(0, self.conv1(inputs, where, need, activation), where)

    def _second(self, inputs: Inputs, where: Where, need: Convolution, activation: Activation) -> mx.array:
        skip = self.conv_shortcut(self.norm3(inputs[1])) if "norm3" in self else inputs[1]
        if self._noise is None:
            return self.conv2(inputs, where, need, activation, skip)
        return self._with_noise(1, self.conv2(inputs, where, need, activation), where) + skip

    def _second_taken(self, where: Where) -> Taken:
        convolution, positions = self.conv2.taken(where, activated=True), where.batch * where.output.volume
        made, itemsize, shortcut = positions * self._out, where.dtype.size, 0
        if "norm3" in self:
            shortcut = where.backend.norm_bytes(positions * self._in, itemsize) + itemsize * made
        nbytes = where.backend.addition_bytes(convolution.nbytes, made, shortcut, itemsize)
        return convolution._replace(nbytes=nbytes)

    def _with_noise(self, which: int, x: mx.array, where: Where) -> mx.array:
        if self._noise is None or where.noise is None:
            return x
        first, scale = self._noise
        field = where.noise.field(first + which, where.output, scale)[..., None].astype(x.dtype)
        return x + field * (self.per_channel_scale2 if which else self.per_channel_scale1)


class UNetMidBlock3D(nn.Module):
    """`res_x`: residual blocks that share a timestep embedding."""

    def __init__(
        self,
        channels: int,
        block: ResBlocks,
        padding: PaddingMode,
        timestep_conditioning: bool,
        first_field: int,
        scale: int,
    ):
        super().__init__()
        if timestep_conditioning:
            self.time_embedder = TimestepEmbedding(4 * channels)
        fields = [
            (first_field + 2 * i, scale) if block.inject_noise else None for i in range(block.num_layers)
        ]
        self.res_blocks = [
            ResnetBlock3D(channels, channels, padding, timestep_conditioning, field) for field in fields
        ]

    def steps(self, producer: int, need: Convolution, timestep: mx.array | None) -> list[Step]:
        """Those of its residual blocks."""
        embedding = None if timestep is None else self.time_embedder(timestep)
        steps: list[Step] = []
        for block in self.res_blocks:
            steps += block.steps(producer + len(steps), need, embedding)
        return steps


class DepthToSpaceUpsample(nn.Module):
    """A convolution to more channels, which then become positions.

    The very first frame of a temporal upsampling is dropped. The residual is the input rearranged
    alike, its channels tiled (A, B, A, B, ...).
    """

    def __init__(self, in_channels: int, block: Upsample, padding: PaddingMode):
        super().__init__()
        self.stride = block.stride
        positions = math.prod(block.stride)
        self._repeats = positions // block.multiplier if block.residual else 0
        self._out = in_channels // block.multiplier
        self.conv = Conv3d(in_channels, in_channels * positions // block.multiplier, padding)

    def steps(self, producer: int, need: Convolution) -> list[Step]:
        """The convolution, then the rearrangement, which for the residual reads the input again."""
        up = Upsampling(self.stride)
        reads = (Read(producer + 1, up), Read(producer, up)) if self._repeats else (Read(producer + 1, up),)
        return [self.conv.step(producer, need), Step(self._rearranged, self._taken, reads, self._out)]

    def _rearranged(self, inputs: Inputs, where: Where) -> mx.array:
        skip = inputs[1] if self._repeats else None
        y = where.backend.upsample(inputs[0], skip, self.stride, self._repeats)
        return cut(y, Upsampling(self.stride).slices(where.inputs[0], where.output))

    def _taken(self, where: Where) -> Taken:
        made = where.batch * where.inputs[0].volume * math.prod(self.stride) * self._out
        kept = where.batch * where.output.volume * self._out
        return Taken(where.backend.upsampling_bytes(made, kept, self._repeats, where.dtype.size), made)
