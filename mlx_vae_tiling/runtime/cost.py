"""What decoding costs, from the config alone: operations, and memory as counted in the layers' code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.config import DecoderConfig, Layer
from mlx_vae_tiling.vae.streaming import Reach, Region, Window


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


class _Chunk(NamedTuple):
    """Elements in a layer: of the frames it holds, sees and gives, and of what a convolution reads."""

    held: int
    seen: int
    padded: int
    made: int
    frame: int


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
        batch, size = self.latent_shape[0], self.dtype.size
        tails = 2 if step < regions[0][0].time.length else 0
        state, chunk, elements = 4 * math.prod(self.latent_shape), 0, 0
        limit = arriving = step
        layers = list(self.config.layers())
        for index, (layer, (source, computed)) in enumerate(zip(layers, regions, strict=True)):
            frames = min(limit, cap or limit, computed.time.length)
            arriving = min(max(arriving, frames), source.time.length)
            read = batch * source.height.length * source.width.length * layer.in_channels
            padded = batch * (computed.height.length + 2) * (computed.width.length + 2) * layer.in_channels
            frame = batch * computed.height.length * computed.width.length * layer.out_channels
            counted = _Chunk(frames * read, (frames + 2) * read, (frames + 2) * padded, frames * frame, frame)
            # A layer that is given more frames than it takes at a time keeps the rest.
            state += (tails + arriving - frames) * read * size
            chunk = max(chunk, self._chunk_bytes(layer, index, len(layers), counted))
            elements = max(elements, counted.padded, counted.made)
            limit, arriving = limit * layer.stride[0], frames * layer.stride[0]
        return Cost(state, chunk, elements)

    def _chunk_bytes(self, layer: Layer, index: int, layers: int, chunk: _Chunk) -> int:
        """Bytes alive while a layer computes, less the two frames kept of each of its inputs."""
        size = self.dtype.size
        held, seen, padded, made = (size * elements for elements in chunk[:4])
        activated = seen
        if index == 0 or layer.stride != (1, 1, 1):
            activated = 0
        elif index < layers - 1:
            # The block's input, for the skip, as well as what its first convolution made of it.
            held *= 2
        if self.backend != "cpu":
            # Everything between two evaluations, with a copy of input and output for the folded form.
            return held + 2 * activated + 2 * padded + 3 * made
        convolving = held + activated + padded + 4 * chunk.made
        if size < 4:
            # The CPU computes in float32, on copies of input and weights.
            convolving += 4 * chunk.padded + 4 * 27 * layer.in_channels * layer.out_channels
        rounding = held + activated + 4 * chunk.made + made * (size < 4)
        if layer.stride != (1, 1, 1):
            rounding = max(rounding, held + 3 * made)
        elif index == layers - 1:
            rounding = max(rounding, 2 * made, made + 4 * 4 * chunk.frame)
        return max(convolving, rounding)
