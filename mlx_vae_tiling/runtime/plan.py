"""What a decode will take, before anything runs: `plan_decode` and `DecodePlan`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_vae_tiling.runtime.memory import format_bytes, memory_budget
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.tiling.plan import plan_tiles
from mlx_vae_tiling.vae.backend import Backend, current_backend
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.streaming import CAUSAL, CENTRED, Reach, Region, Span, Window

ARRAY_ELEMENTS = 2**31
"""Kernels index with 32 bits; past it they fail without a word."""

SATURATING_POSITIONS = 1024
"""Latent positions per step beyond which a larger chunk is not expected to be faster."""


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


@dataclass(frozen=True)
class DecodePlan:
    """How latents of one shape will be decoded, and what that costs.

    Attributes:
        latent_shape: (B, C, F, H, W).
        output: The window of the output that is decoded.
        parts: What is decoded one after the other, each over all frames.
        latent_frames_per_step: Latent frames taken in at a time.
        max_chunk_frames: Bound of the frames of a chunk in any layer; None for none.
        tiling: Blended tiles in place of exact parts.
        peak_bytes: Predicted peak of MLX's memory, weights included.
        weight_bytes, state_bytes, chunk_bytes: Of these, the weights, the frames that the layers
            keep between chunks, and the rest.
        memory_limit: The budget in bytes.
        operations: Multiplications and additions of all convolutions.
        recompute: Operations over those of the whole decode: 1.0 means that none is repeated.
        limited_by: What keeps the chunks from being larger, or "nothing".
        latents_to_first_frame: Latent frames that the first frame depends on.
        fits: Whether the prediction is within the budget.
    """

    latent_shape: tuple[int, ...]
    output: Window
    parts: tuple[Part, ...]
    latent_frames_per_step: int
    max_chunk_frames: int | None
    tiling: TilingConfig | None
    peak_bytes: int
    weight_bytes: int
    state_bytes: int
    memory_limit: int
    operations: int
    recompute: float
    limited_by: str
    latents_to_first_frame: int
    dtype: str
    backend: Backend

    @property
    def frames(self) -> int:
        """Frames that come out."""
        return _length(self.output.frames)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the frames that come out."""
        return _length(self.output.height), _length(self.output.width)

    @property
    def windows(self) -> tuple[Window, ...]:
        return tuple(part.window for part in self.parts)

    @property
    def chunk_bytes(self) -> int:
        return self.peak_bytes - self.weight_bytes - self.state_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.memory_limit

    def __str__(self) -> str:
        height, width = self.size
        step = f"{self.latent_frames_per_step} latent frames"
        if self.max_chunk_frames:
            step += f", at most {self.max_chunk_frames} frames in a layer"
        kind = "exact"
        if self.tiling is not None:
            kind = "blended tiles"
        elif any(part.latents for part in self.parts):
            kind = "approximate: windows with less than the receptive field"
        rows = {
            "output": f"{self.frames} frames of {width}x{height}, from latents {self.latent_shape}",
            "method": f"{kind}, {len(self.parts)} {'window' if len(self.parts) == 1 else 'windows'}",
            "chunk": f"{step} (limited by {self.limited_by})",
            "peak": f"{format_bytes(self.peak_bytes)} of {format_bytes(self.memory_limit)}: "
            f"weights {format_bytes(self.weight_bytes)}, state {format_bytes(self.state_bytes)}, "
            f"chunk {format_bytes(self.chunk_bytes)}",
            "work": f"{self.operations / 1e12:.3g} TFLOP, {self.recompute:.2f}x the whole decode",
            "first": f"frame after {self.latents_to_first_frame} of {self.latent_shape[2]} latent frames",
            "runs in": f"{self.dtype} on {self.backend}",
        }
        return "\n".join(f"{name:<8} {text}" for name, text in rows.items())


def plan_decode(
    decoder: VideoDecoder | DecoderConfig,
    latent_shape: tuple[int, ...],
    *,
    memory_limit: int | float | str | None = None,
    dtype: mx.Dtype | None = None,
    backend: Backend | None = None,
    tiling: TilingConfig | int | None = None,
    window: Window | None = None,
    causal: bool | None = None,
) -> DecodePlan:
    """Plans a decode: the fewest windows whose smallest chunk fits, then the largest useful chunk.

    Args:
        decoder: A decoder, or the config of one.
        latent_shape: (B, C, F, H, W).
        memory_limit: Bytes, or a string such as "8GB"; by default 70 % of what is available.
        dtype: Of the weights; by default the decoder's, or bfloat16 for a config.
        backend: "cpu", "metal" or "cuda"; by default that of the default device.
        tiling: None for an exact decode; a `TilingConfig` for blended tiles; an integer below the
            receptive field for windows that see this many latents around them, and no more.
        window: The part of the output that is wanted; None for all of it.
        causal: Overrides the config's.

    Returns:
        The plan. Where nothing fits, the smallest there is, with `fits` False.

    Raises:
        ValueError: If the shape or the limit makes no sense.
    """
    config = decoder if isinstance(decoder, DecoderConfig) else decoder.config
    if len(latent_shape) != 5 or latent_shape[1] != config.latent_channels or min(latent_shape) < 1:
        raise ValueError(
            f"latent_shape must be (B, {config.latent_channels}, F, H, W) without empty axes, got {latent_shape}"
        )
    if dtype is None:
        dtype = mx.bfloat16 if isinstance(decoder, DecoderConfig) else decoder.dtype
    model = _Model(
        config,
        tuple(latent_shape),
        dtype,
        backend or current_backend(),
        CAUSAL if (config.causal if causal is None else causal) else CENTRED,
    )
    budget = memory_budget(memory_limit)
    wanted = model.pixels(window or Window(), model.latent_shape)
    if isinstance(tiling, TilingConfig):
        if window is not None:
            raise ValueError(f"blended tiles decode all of the output, got the window {window}; crop its frames")
        return _plan_blended(model, tiling, budget)
    if tiling is not None and tiling < 0:
        raise ValueError(f"tiling as a halo must be a number of latents from 0 on, got {tiling}")
    return _plan_windows(model, wanted, budget, tiling)


class _Cost(NamedTuple):
    state: int
    chunk: int
    elements: int


@dataclass(frozen=True)
class _Model:
    """What decoding costs, from the config alone."""

    config: DecoderConfig
    latent_shape: tuple[int, ...]
    dtype: mx.Dtype
    backend: Backend
    reach: Reach

    @property
    def weight_bytes(self) -> int:
        return self.config.parameters * self.dtype.size

    def pixels(self, window: Window, shape: tuple[int, ...]) -> Region:
        t, s = self.config.temporal_scale, self.config.spatial_scale
        return window.region(t * (shape[2] - 1) + 1, s * shape[3], s * shape[4])

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

    def operations(self, part: Part) -> int:
        batch = self.latent_shape[0]
        regions = self.regions(self.pixels(*self.local(part)))
        layers = self.config.layers()
        return batch * sum(
            54 * layer.in_channels * layer.out_channels * computed.volume
            for layer, (_, computed) in zip(layers, regions, strict=True)
        )

    def local(self, part: Part) -> tuple[Window, tuple[int, ...]]:
        """The window within the latents it is decoded from, and their shape."""
        if part.latents is None:
            return part.window, self.latent_shape
        s, (rows, columns) = self.config.spatial_scale, part.latents
        window = replace(
            part.window,
            height=_shift(part.window.height, rows.start * s),
            width=_shift(part.window.width, columns.start * s),
        )
        shape = (*self.latent_shape[:3], rows.stop - rows.start, columns.stop - columns.start)
        return window, shape

    def cost(self, part: Part, step: int, cap: int | None) -> _Cost:
        """Memory of a stream: the tails of all layers, and the most that one chunk adds."""
        regions = self.regions(self.pixels(*self.local(part)))
        batch, size = self.latent_shape[0], self.dtype.size
        streamed = step < regions[0][0].time.length
        state = chunk = elements = 0
        limit = step
        for layer, (source, computed) in zip(self.config.layers(), regions, strict=True):
            frames = min(limit, cap or limit, computed.time.length)
            read = batch * source.height.length * source.width.length * layer.in_channels
            made = batch * computed.height.length * computed.width.length * layer.out_channels
            limit *= layer.stride[0]
            state += 2 * read * size * streamed
            elements = max(elements, (frames + 2) * read, frames * made)
            chunk = max(chunk, self._chunk_bytes(layer, frames, read, made))
        latents = 2 * math.prod(self.latent_shape) * 4 if self.config.timestep_conditioning else 0
        return _Cost(state, chunk + latents, elements)

    def _chunk_bytes(self, layer: Any, frames: int, read: int, made: int) -> int:
        """Arrays alive while a convolution runs and its output is rearranged, as counted on the CPU.

        The CPU computes in float32 whatever the dtype, on copies of input and weights.
        """
        half_on_cpu = self.backend == "cpu" and self.dtype.size < 4
        size = 4 if self.backend == "cpu" else self.dtype.size
        read, made = (frames + 2) * read * size, frames * made * size
        weights = 4 * 27 * layer.in_channels * layer.out_channels if half_on_cpu else 0
        if layer.stride != (1, 1, 1):
            return weights + max(2 * read + made, int(1.5 * read) + 3 * made)
        if layer.in_channels == layer.out_channels:
            return weights + int((6.8 if half_on_cpu else 6.3) * read)
        return weights + max(int(5.5 * read) + made, read + 2 * made)


def _length(span: slice | None) -> int:
    assert span is not None
    return int(span.stop - span.start)


def _shift(span: slice | None, by: int) -> slice:
    assert span is not None
    return slice(span.start - by, span.stop - by)


def _steps(model: _Model) -> Iterator[tuple[int, int | None]]:
    """Chunk sizes from the largest useful one down: (latent frames per step, cap on frames)."""
    _, _, frames, height, width = model.latent_shape
    useful = max(1, math.ceil(SATURATING_POSITIONS / (height * width)))
    step = 2 ** math.ceil(math.log2(useful))
    if step >= frames:
        yield frames, None
    while step >= 1:
        if step < frames:
            yield step, None
        step //= 2
    cap = model.config.temporal_scale // 2
    while cap >= 1:
        yield 1, cap
        cap //= 2


def _cuts(span: Span, count: int, scale: int) -> list[slice]:
    """A span of pixels in `count` runs, about even, cut between latents."""
    bounds = [span.start + round(span.length * i / count / scale) * scale for i in range(count)]
    return [slice(start, stop) for start, stop in zip(bounds, [*bounds[1:], span.stop], strict=True)]


def _parts(model: _Model, wanted: Region, rows: int, columns: int, halo: int | None) -> tuple[Part, ...]:
    scale = model.config.spatial_scale
    frames = slice(wanted.time.start, wanted.time.stop)

    def around(cut: slice, length: int) -> slice:
        return slice(max(cut.start // scale - (halo or 0), 0), min(-(-cut.stop // scale) + (halo or 0), length))

    def part(height: slice, width: slice) -> Part:
        h, w = model.latent_shape[3:]
        latents = around(height, h), around(width, w)
        exact = halo is None or latents == (slice(0, h), slice(0, w))
        return Part(Window(frames, height, width), None if exact else latents)

    return tuple(
        part(height, width)
        for height in _cuts(wanted.height, rows, scale)
        for width in _cuts(wanted.width, columns, scale)
    )


def _grids(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Grids of at most 64 windows over this many latents, the squarest windows of each number."""
    for count in range(1, min(height * width, 64) + 1):
        pairs = [(r, count // r) for r in range(1, count + 1) if count % r == 0]
        fitting = [(r, c) for r, c in pairs if r <= height and c <= width]
        if fitting:
            yield min(fitting, key=lambda grid: abs(math.log(height * grid[1] / (width * grid[0]))))


def _plan_windows(model: _Model, wanted: Region, budget: int, halo: int | None) -> DecodePlan:
    steps = list(_steps(model))
    scale = model.config.spatial_scale
    candidates = []
    for grid in _grids(max(1, wanted.height.length // scale), max(1, wanted.width.length // scale)):
        parts = _parts(model, wanted, *grid, halo)
        costs = [model.cost(part, *steps[-1]) for part in parts]
        candidates.append((max(c.state + c.chunk for c in costs), parts))
        if model.weight_bytes + candidates[-1][0] <= budget and max(c.elements for c in costs) < ARRAY_ELEMENTS:
            break
    else:
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)
    parts = candidates[-1][1]
    limited_by = "the number of latent frames" if steps[0][0] >= model.latent_shape[2] else "what is useful"
    for step, cap in steps:
        costs = [model.cost(part, step, cap) for part in parts]
        largest = max(costs, key=lambda c: c.state + c.chunk)
        if max(c.elements for c in costs) >= ARRAY_ELEMENTS:
            limited_by = "2**31 elements per array"
        elif model.weight_bytes + largest.state + largest.chunk > budget:
            limited_by = "the memory limit"
        else:
            break
    return _assemble(model, wanted, parts, step, cap, None, budget, largest, limited_by)


def _plan_blended(model: _Model, tiling: TilingConfig, budget: int) -> DecodePlan:
    """Blended tiles: each decoded whole, plus the float32 buffers of one temporal group."""
    config = model.config
    axes = plan_tiles(model.latent_shape, tiling, config.spatial_scale, config.temporal_scale)
    times, heights, widths = ([len(range(*tile.latents.indices(10**9))) for tile in axis] for axis in axes)
    batch, channels = model.latent_shape[:2]
    shape = (batch, channels, max(times), max(heights), max(widths))
    tile = replace(model, latent_shape=shape)
    whole = Part(Window())
    cost = tile.cost(whole, shape[2], None)
    pixels = batch * 3 * model.latent_shape[3] * model.latent_shape[4] * config.spatial_scale**2
    buffers = 2 * 4 * pixels * (config.temporal_scale * (shape[2] - 1) + 1)
    operations = sum(
        replace(model, latent_shape=(batch, channels, t, h, w)).operations(whole)
        for t in times
        for h in heights
        for w in widths
    )
    largest = cost._replace(chunk=cost.chunk + buffers)
    everything = model.pixels(whole.window, model.latent_shape)
    plan = _assemble(model, everything, _parts(model, everything, 1, 1, None), shape[2], None, tiling, budget, largest, "the tile size")
    return replace(plan, operations=operations, recompute=operations / plan.operations)


def _assemble(
    model: _Model,
    wanted: Region,
    parts: tuple[Part, ...],
    step: int,
    cap: int | None,
    tiling: TilingConfig | None,
    budget: int,
    largest: _Cost,
    limited_by: str,
) -> DecodePlan:
    operations = sum(model.operations(part) for part in parts)
    first = Span(wanted.time.start, wanted.time.start + 1, wanted.time.size)
    latents = model.regions(wanted._replace(time=first))[0][0].time
    return DecodePlan(
        latent_shape=model.latent_shape,
        output=Window(*(slice(span.start, span.stop) for span in wanted)),
        parts=parts,
        latent_frames_per_step=step,
        max_chunk_frames=cap,
        tiling=tiling,
        peak_bytes=model.weight_bytes + largest.state + largest.chunk,
        weight_bytes=model.weight_bytes,
        state_bytes=largest.state,
        memory_limit=budget,
        operations=operations,
        recompute=operations / model.operations(Part(Window(*(slice(s.start, s.stop) for s in wanted)))),
        limited_by=limited_by,
        latents_to_first_frame=latents.length,
        dtype=str(model.dtype).removeprefix("mlx.core."),
        backend=model.backend,
    )
