"""The layers of the decoder: attribute names are the original checkpoints', axes are channels-last.

Every layer that convolves has `source(region)`, the region of its input that a region of its
output needs, and `stream(chunks, region, limit, setting)`, a generator that turns chunks of that
input into chunks of at most `limit()` frames (times its own stride) of that output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_vae_tiling.vae.backend import current_backend
from mlx_vae_tiling.vae.blocks import PaddingMode, ResBlocks, Upsample
from mlx_vae_tiling.vae.config import TIMESTEP_FEATURES
from mlx_vae_tiling.vae.convolution import ConvolutionForm, convolve
from mlx_vae_tiling.vae.operations import activate, computed, crop_spatially, depth_to_space, pad_spatially
from mlx_vae_tiling.vae.streaming import FrameQueue, Reach, Region

Chunks = Iterator[mx.array]
Limit = Callable[[], int]


@dataclass(frozen=True)
class Setting:
    """What is common to all layers of one decode.

    Args:
        reach: Frames before and after that each convolution sees.
        padding: What lies beyond the borders of the frame.
        form: The form of convolution, None for the backend's default.
        timestep: (B,) scaled timesteps, or None.
        noise: The field (height, width) of one injection, by its number in decode order.
    """

    reach: Reach
    padding: PaddingMode
    form: ConvolutionForm | None = None
    timestep: mx.array | None = None
    noise: Callable[[int, int, int], mx.array] | None = None


class Conv3d(nn.Module):
    """3x3x3 convolution; the checkpoints call its tensors `conv.weight` and `conv.bias`."""

    class Kernel(nn.Module):
        def __init__(self, in_channels: int, out_channels: int):
            super().__init__()
            self.weight = mx.zeros((out_channels, 3, 3, 3, in_channels))
            self.bias = mx.zeros((out_channels,))

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = self.Kernel(in_channels, out_channels)

    def __call__(self, x: mx.array, source: Region, output: Region, setting: Setting) -> mx.array:
        """x holds all frames that the output frames see, and the rows and columns of `source`."""
        x = pad_spatially(x, source, output, setting.padding)
        return convolve(x, self.conv.weight, self.conv.bias, setting.form)


class ConvolutionLayer(Conv3d):
    """A convolution as a layer of its own, after an optional activation."""

    def source(self, region: Region, reach: Reach) -> Region:
        return region.before_convolution(reach)

    def stream(
        self,
        chunks: Chunks,
        region: Region,
        limit: Limit,
        setting: Setting,
        before: Callable[[mx.array], mx.array] | None = None,
    ) -> Chunks:
        source = self.source(region, setting.reach)
        queue = FrameQueue(source.time, region.time, setting.reach, limit)
        for chunk in chunks:
            queue.append(chunk)
            del chunk
            while span := queue.ready():
                yield self._compute(queue, span, source, region, setting, before)

    def _compute(
        self,
        queue: FrameQueue,
        span: tuple[int, int],
        source: Region,
        region: Region,
        setting: Setting,
        before: Callable[[mx.array], mx.array] | None,
    ) -> mx.array:
        x = queue.window(*span)
        if before:
            x = before(x)
        return settle(self(x, source, region, setting), queue.release())


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
        half = TIMESTEP_FEATURES // 2
        frequencies = mx.exp(-math.log(10000) * mx.arange(half) / half)
        angles = timestep.astype(mx.float32)[:, None] * frequencies
        features = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=1)
        mlp = self.timestep_embedder
        return mlp.linear_2(nn.silu(mlp.linear_1(features.astype(mlp.linear_1.weight.dtype))))


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
    """Two activated convolutions beside a skip, which is normalised and mixed where widths differ."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        timestep_conditioning: bool = False,
        first_noise_field: int | None = None,
    ):
        super().__init__()
        self.conv1 = Conv3d(in_channels, out_channels)
        self.conv2 = Conv3d(out_channels, out_channels)
        if in_channels != out_channels:
            self.norm3 = ChannelNorm(in_channels)
            self.conv_shortcut = nn.Linear(in_channels, out_channels)
        if timestep_conditioning:
            self.scale_shift_table = mx.zeros((4, in_channels))
        if first_noise_field is not None:
            self.per_channel_scale1 = mx.zeros((in_channels,))
            self.per_channel_scale2 = mx.zeros((in_channels,))
        self._first_noise_field = first_noise_field

    def source(self, region: Region, reach: Reach) -> Region:
        return region.before_convolution(reach).before_convolution(reach)

    def stream(
        self,
        chunks: Chunks,
        region: Region,
        limit: Limit,
        setting: Setting,
        embedding: mx.array | None = None,
    ) -> Chunks:
        middle = region.before_convolution(setting.reach)
        source = middle.before_convolution(setting.reach)
        raw = FrameQueue(source.time, middle.time, setting.reach, limit)
        hidden = FrameQueue(middle.time, region.time, setting.reach, limit)
        first = second = None
        if embedding is not None:
            shift1, scale1, shift2, scale2 = modulations(embedding, self.scale_shift_table)
            first, second = (shift1, scale1), (shift2, scale2)

        def branch(span: tuple[int, int]) -> mx.array:
            x = activate(raw.window(*span), first)
            return self._with_noise(0, self.conv1(x, source, middle, setting), middle, setting)

        def output(span: tuple[int, int]) -> mx.array:
            x = activate(hidden.window(*span), second)
            y = self._with_noise(1, self.conv2(x, middle, region, setting), region, setting)
            y = y + self._shortcut(crop_spatially(raw.frames(*span), source, region))
            # The skip lags behind as far as the first convolution looks back, so that the frames
            # kept for one serve the other.
            return settle(y, hidden.release(), raw.release(hidden.next))

        for chunk in chunks:
            raw.append(chunk)
            del chunk
            while span := raw.ready():
                hidden.append(branch(span))
                while span := hidden.ready():
                    yield output(span)

    def _shortcut(self, x: mx.array) -> mx.array:
        return self.conv_shortcut(self.norm3(x)) if "norm3" in self else x

    def _with_noise(self, which: int, x: mx.array, region: Region, setting: Setting) -> mx.array:
        if self._first_noise_field is None or setting.noise is None:
            return x
        field = setting.noise(self._first_noise_field + which, region.height.size, region.width.size)
        rows, columns = region.height, region.width
        field = field[rows.start : rows.stop, columns.start : columns.stop, None].astype(x.dtype)
        return x + field * (self.per_channel_scale2 if which else self.per_channel_scale1)


class UNetMidBlock3D(nn.Module):
    """`res_x`: residual blocks that share a timestep embedding."""

    def __init__(self, channels: int, block: ResBlocks, timestep_conditioning: bool, first_noise_field: int):
        super().__init__()
        if timestep_conditioning:
            self.time_embedder = TimestepEmbedding(4 * channels)
        fields = [first_noise_field + 2 * i if block.inject_noise else None for i in range(block.num_layers)]
        self.res_blocks = [
            ResnetBlock3D(channels, channels, timestep_conditioning, field) for field in fields
        ]

    def source(self, region: Region, reach: Reach) -> Region:
        for block in self.res_blocks:
            region = block.source(region, reach)
        return region

    def stream(self, chunks: Chunks, region: Region, limit: Limit, setting: Setting) -> Chunks:
        embedding = None if setting.timestep is None else self.time_embedder(setting.timestep)
        regions = [region]
        for _ in self.res_blocks[1:]:
            regions.append(self.res_blocks[0].source(regions[-1], setting.reach))
        for block in self.res_blocks:
            chunks = block.stream(chunks, regions.pop(), limit, setting, embedding)
        return chunks


class DepthToSpaceUpsample(nn.Module):
    """A convolution to more channels, which then become positions.

    The very first frame of a temporal upsampling is dropped. The residual is the input rearranged
    alike, its channels tiled (A, B, A, B, ...).
    """

    def __init__(self, in_channels: int, block: Upsample):
        super().__init__()
        self.stride = block.stride
        self._repeats = math.prod(block.stride) // block.multiplier if block.residual else 0
        self.conv = Conv3d(in_channels, in_channels * math.prod(block.stride) // block.multiplier)

    def source(self, region: Region, reach: Reach) -> Region:
        return region.before_upsampling(self.stride).before_convolution(reach)

    def stream(self, chunks: Chunks, region: Region, limit: Limit, setting: Setting) -> Chunks:
        coarse = region.before_upsampling(self.stride)
        source = coarse.before_convolution(setting.reach)
        queue = FrameQueue(source.time, coarse.time, setting.reach, limit)
        for chunk in chunks:
            queue.append(chunk)
            del chunk
            while span := queue.ready():
                yield self._compute(queue, span, source, coarse, region, setting)

    def _compute(
        self,
        queue: FrameQueue,
        span: tuple[int, int],
        source: Region,
        coarse: Region,
        region: Region,
        setting: Setting,
    ) -> mx.array:
        y = computed(self.conv(queue.window(*span), source, coarse, setting))
        y = computed(depth_to_space(y, self.stride))
        if self._repeats:
            skip = depth_to_space(crop_spatially(queue.frames(*span), source, coarse), self.stride)
            y = y + computed(mx.concatenate([skip] * self._repeats, axis=-1))
        return settle(self._crop(y, span, coarse, region), queue.release())

    def _crop(self, y: mx.array, span: tuple[int, int], coarse: Region, region: Region) -> mx.array:
        t, h, w = self.stride
        first = span[0] * t - (t - 1)
        frames = slice(max(region.time.start - first, 0), region.time.stop - first)
        top, left = coarse.height.start * h, coarse.width.start * w
        return y[
            :,
            frames,
            region.height.start - top : region.height.stop - top,
            region.width.start - left : region.width.stop - left,
        ]


def settle(y: mx.array, *tails: mx.array | None) -> mx.array:
    """Starts the computation of a chunk and of the tails it leaves, so that its inputs can go."""
    evaluate = mx.eval if current_backend() == "cpu" else mx.async_eval
    evaluate(y, tails)
    return y
