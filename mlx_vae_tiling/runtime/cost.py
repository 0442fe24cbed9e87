"""What decoding costs, from the config alone: operations, and memory as counted in the layers' code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.config import DecoderConfig, Layer
from mlx_vae_tiling.vae.streaming import Reach, Region, Span, Window


@dataclass(frozen=True)
class Part:
    """A window of the output and the latents that it is decoded from.

    Args:
        window: The part of the output.
        latents: Rows and columns of the latents that are decoded as if there were no others; None
            for all of them, of which only those in the receptive field are used: an exact window.
    """

    window: Window
    latents: tuple[slice, slice] | None = None

    def within(self, scale: int) -> Window:
        """The window, counted from the corner of the latents it is decoded from."""
        if self.latents is None:
            return self.window
        height, width = (
            span and slice(span.start - cut.start * scale, span.stop - cut.start * scale)
            for span, cut in zip((self.window.height, self.window.width), self.latents, strict=True)
        )
        return replace(self.window, height=height, width=width)


class Cost(NamedTuple):
    """Bytes that last from chunk to chunk, bytes that one chunk adds, and elements of the largest array."""

    state: int
    chunk: int
    elements: int

    @property
    def total(self) -> int:
        return self.state + self.chunk


@dataclass(frozen=True)
class CostModel:
    """What decoding latents of one shape costs.

    Args:
        config: The architecture.
        latent_shape: (B, C, F, H, W).
        dtype: Of weights and latents.
        backend: Where it runs.
        reach: Frames before and after that each convolution sees.
    """

    config: DecoderConfig
    latent_shape: tuple[int, ...]
    dtype: mx.Dtype
    backend: Backend
    reach: Reach

    @property
    def weight_bytes(self) -> int:
        return self.config.parameters * self.dtype.size

    def pixels(self, window: Window) -> Region:
        t, s = self.config.temporal_scale, self.config.spatial_scale
        return window.region(
            t * (self.latent_shape[2] - 1) + 1, s * self.latent_shape[3], s * self.latent_shape[4]
        )

    def regions(self, pixels: Region) -> list[tuple[Region, Region]]:
        """Of each layer, the regions that its convolution reads and computes."""
        p = self.config.patch_size
        region = Region(
            pixels.time, pixels.height.before_upsampling(p, 0), pixels.width.before_upsampling(p, 0)
        )
        found = []
        for layer in reversed(list(self.config.layers())):
            computed = region.before_upsampling(layer.stride)
            region = computed.before_convolution(self.reach)
            found.append((region, computed))
        return found[::-1]

    def part_regions(self, part: Part) -> list[tuple[Region, Region]]:
        model = self
        if part.latents is not None:
            size = (cut.stop - cut.start for cut in part.latents)
            model = replace(self, latent_shape=(*self.latent_shape[:3], *size))
        return model.regions(model.pixels(part.within(self.config.spatial_scale)))

    def operations(self, part: Part) -> int:
        """Multiplications and additions of all convolutions."""
        return self.latent_shape[0] * sum(
            54 * layer.in_channels * layer.out_channels * computed.volume
            for layer, (_, computed) in zip(self.config.layers(), self.part_regions(part), strict=True)
        )

    def cost(self, part: Part, step: int, cap: int | None) -> Cost:
        """Memory of a stream besides the weights.

        Args:
            part: What is decoded.
            step: Latent frames per step.
            cap: Most frames of a chunk in any layer; None for no bound.
        """
        regions = self.part_regions(part)
        layers = tuple(self.config.layers())
        played = play(layers, tuple((read.time, made.time) for read, made in regions), self.reach, step, cap)
        size = self.dtype.size * self.latent_shape[0]
        kept = np.array(
            [
                size * layer.in_channels * source.height.length * source.width.length
                for layer, (source, _) in zip(layers, regions, strict=True)
            ]
        )
        chunks = {chunk: self._chunk(chunk, layers, regions) for chunk in set(played.chunks)}
        used = played.held @ kept + [chunks[chunk][0] for chunk in played.chunks]
        state = int((played.between @ kept).max())
        latents = 4 * math.prod(self.latent_shape)
        elements = max(elements for _, elements in chunks.values())
        return Cost(state + latents, int(used.max()) - state, elements)

    def _chunk(
        self, chunk: tuple[int, int], layers: tuple[Layer, ...], regions: list[tuple[Region, Region]]
    ) -> tuple[int, int]:
        """Bytes that computing a chunk takes besides its input, and elements of the largest array."""
        (index, frames), batch, size = chunk, self.latent_shape[0], self.dtype.size
        layer, (source, computed) = layers[index], regions[index]
        height, width = computed.height.length, computed.width.length
        seen = batch * (frames + 2) * layer.in_channels
        activated = seen * source.height.length * source.width.length
        if index == 0 or layer.stride != (1, 1, 1):
            activated = 0
        padded = seen * (height + 2) * (width + 2)
        made = batch * frames * height * width * layer.out_channels
        if self.backend != "cpu":
            # Everything between two evaluations, with copies of input and output for the folded form.
            return size * (2 * activated + 2 * padded + 3 * made), max(padded, made)
        convolving = size * (activated + padded) + 4 * made
        settling = size * activated + 4 * made
        if size < 4:
            # The CPU computes in float32, on copies of input and weights.
            convolving += 4 * padded + 4 * 27 * layer.in_channels * layer.out_channels
            settling += size * made
        if layer.stride != (1, 1, 1):
            settling = max(settling, 3 * size * made)
        elif index == len(layers) - 1:
            # Its input gone, it is unpatchified, then checked and rounded frame by frame in float32.
            gone = size * batch * frames * layer.in_channels * source.height.length * source.width.length
            settling = max(settling, size * made + max(size * made, 10 * made // frames) - gone)
        return max(convolving, settling), max(padded, made)


class Played(NamedTuple):
    """What a stream holds: frames by layer as each chunk is computed (layer, frames), and between pieces."""

    chunks: tuple[tuple[int, int], ...]
    held: np.ndarray[Any, np.dtype[Any]]
    between: np.ndarray[Any, np.dtype[Any]]


@lru_cache(maxsize=256)
def play(
    layers: tuple[Layer, ...], times: tuple[tuple[Span, Span], ...], reach: Reach, step: int, cap: int | None
) -> Played:
    """Plays the queues of a stream with numbers of frames in place of frames.

    Args:
        layers: The convolutions.
        times: Frames that each of them reads and computes.
        reach: Frames before and after that each of them sees.
        step, cap: As `CostModel.cost`.
    """
    count = len(layers)
    scales = np.cumprod([1, *(layer.stride[0] for layer in layers)]).tolist()
    limits = [min(step * scale, cap or step * scale) for scale in scales]
    plain = [0 < i < count - 1 and layer.stride == (1, 1, 1) for i, layer in enumerate(layers)]
    # Of a residual block's two convolutions, the first one's input is kept for the skip of the second.
    second = [plain[i] and sum(plain[:i]) % 2 == 1 for i in range(count)]
    held, start, following = [0] * count, [read.start for read, _ in times], [made.start for _, made in times]
    chunks, between = set(), set()

    def release(i: int, wanted: int) -> None:
        read, made = times[i]
        first = read.stop if following[i] == made.stop else following[i] - reach[0]
        surplus = min(max(min(first, wanted) - start[i], 0), held[i])
        held[i] -= surplus
        start[i] += surplus

    def append(i: int, frames: int) -> None:
        held[i] += frames
        read, made = times[i]
        received = start[i] + held[i]
        known = made.stop if received == read.stop else min(received - reach[1], made.stop)
        while (begin := following[i]) < known:
            end = following[i] = min(known, begin + limits[i])
            chunks.add(((i, end - begin), tuple(held)))
            if second[i] or not plain[i]:
                release(i, end)
            if second[i]:
                release(i - 1, end)
            if i + 1 == count:
                between.add(tuple(held))
                continue
            stride, following_read = layers[i].stride[0], times[i + 1][0]
            bounds = (stride * x - stride + 1 for x in (begin, end))
            low, high = (min(max(x, following_read.start), following_read.stop) for x in bounds)
            if high > low:
                append(i + 1, high - low)

    read = times[0][0]
    for begin in range(read.start, read.stop, step):
        append(0, min(step, read.stop - begin))
    ordered = list(chunks)
    return Played(
        tuple(chunk for chunk, _ in ordered), np.array([h for _, h in ordered]), np.array(list(between))
    )
