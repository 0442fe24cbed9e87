"""What a decode will take, before anything runs: `plan_decode` and `DecodePlan`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import mlx.core as mx

from mlx_vae_tiling.runtime.cost import Cost, CostModel, Part
from mlx_vae_tiling.runtime.memory import format_bytes, memory_budget
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.tiling.plan import plan_tiles
from mlx_vae_tiling.vae.backend import Backend, current_backend
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.streaming import CAUSAL, CENTRED, Region, Span, Window

ARRAY_ELEMENTS = 2**31
"""Kernels index with 32 bits; past it they fail without a word."""

MEMORY = "the memory limit"
"""What limits the chunks where memory does."""

SATURATING_POSITIONS = 1024
"""Latent positions per step beyond which a larger chunk is not expected to be faster."""


@dataclass(frozen=True)
class DecodePlan:
    """How latents of one shape will be decoded, and what that costs.

    Attributes:
        latent_shape: (B, C, F, H, W).
        output: The window of the output that is decoded.
        parts: What is decoded one after the other, each over all frames.
        latent_frames_per_step: Latent frames taken in at a time.
        max_chunk_frames: Bound of the frames of a chunk in any layer; None for none.
        tiling: None for exact windows, blended tiles, or how many latents around them windows see.
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
    tiling: TilingConfig | int | None
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
    def lasting_bytes(self) -> int:
        """What does not depend on the size of chunks: weights and state."""
        return self.weight_bytes + self.state_bytes

    @property
    def chunk_bytes(self) -> int:
        return self.peak_bytes - self.lasting_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.memory_limit

    def require_fit(self) -> None:
        """Raises a `ValueError` that says what is needed, unless the prediction is within the budget."""
        if not self.fits:
            raise ValueError(
                f"no plan fits in {format_bytes(self.memory_limit)}; the smallest needs "
                f"{format_bytes(self.peak_bytes)}, in {len(self.parts)} windows: raise the memory limit"
            )

    def __str__(self) -> str:
        height, width = self.size
        step = f"{self.latent_frames_per_step} latent frames"
        if self.max_chunk_frames:
            step += f", at most {self.max_chunk_frames} frames in a layer"
        kind = "exact"
        if isinstance(self.tiling, TilingConfig):
            kind = "blended tiles"
        elif any(part.latents for part in self.parts):
            kind = f"approximate: windows see {self.tiling} latents around them"
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
    parts: tuple[Part, ...] | None = None,
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
        parts: Those of an earlier plan for the same window, to be kept.

    Returns:
        The plan. Where nothing fits, the smallest there is, with `fits` False.

    Raises:
        ValueError: If the shape or the limit makes no sense.
    """
    config = decoder if isinstance(decoder, DecoderConfig) else decoder.config
    if len(latent_shape) != 5 or latent_shape[1] != config.latent_channels or min(latent_shape) < 1:
        raise ValueError(
            f"latent_shape must be (B, {config.latent_channels}, F, H, W) without empty axes, "
            f"got {latent_shape}"
        )
    if dtype is None:
        dtype = mx.bfloat16 if isinstance(decoder, DecoderConfig) else decoder.dtype
    model = CostModel(
        config,
        tuple(latent_shape),
        dtype,
        backend or current_backend(),
        CAUSAL if (config.causal if causal is None else causal) else CENTRED,
    )
    budget = memory_budget(memory_limit)
    wanted = model.pixels(window or Window())
    if isinstance(tiling, TilingConfig):
        if window is not None:
            raise ValueError(
                f"blended tiles decode all of the output, got the window {window}; crop its frames"
            )
        return _plan_blended(model, tiling, budget)
    if tiling is not None and tiling < 0:
        raise ValueError(f"tiling as a halo must be a number of latents from 0 on, got {tiling}")
    return _plan_chunks(model, wanted, budget, tiling, parts or _choose_parts(model, wanted, budget, tiling))


def _length(span: slice | None) -> int:
    assert span is not None
    return int(span.stop - span.start)


def _steps(model: CostModel) -> Iterator[tuple[int, int | None]]:
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
    inner = [round((span.start + span.length * i / count) / scale) * scale for i in range(1, count)]
    return [slice(*bounds) for bounds in pairwise([span.start, *inner, span.stop])]


def _parts(model: CostModel, wanted: Region, rows: int, columns: int, halo: int | None) -> tuple[Part, ...]:
    scale = model.config.spatial_scale
    frames = slice(wanted.time.start, wanted.time.stop)

    def around(cut: slice, length: int) -> slice:
        start, stop = cut.start // scale, -(-cut.stop // scale)
        # A frame that is one latent high cannot be padded by reflection.
        reach = max(halo or 0, model.config.spatial_padding_mode == "reflect" and stop - start == 1)
        return slice(max(start - reach, 0), min(stop + reach, length))

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


def _choose_parts(model: CostModel, wanted: Region, budget: int, halo: int | None) -> tuple[Part, ...]:
    """The fewest windows that fit with the smallest chunks; where none do, those that need least."""
    scale, smallest = model.config.spatial_scale, list(_steps(model))[-1]
    candidates = []
    for grid in _grids(max(1, wanted.height.length // scale), max(1, wanted.width.length // scale)):
        parts = _parts(model, wanted, *grid, halo)
        costs = [model.cost(part, *smallest) for part in parts]
        most = max(cost.total for cost in costs)
        if model.weight_bytes + most <= budget and max(c.elements for c in costs) < ARRAY_ELEMENTS:
            return parts
        candidates.append((most, parts))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _plan_chunks(
    model: CostModel, wanted: Region, budget: int, halo: int | None, parts: tuple[Part, ...]
) -> DecodePlan:
    """The largest useful chunk with which these windows fit."""
    steps = list(_steps(model))
    limited_by = "the number of latent frames" if steps[0][0] >= model.latent_shape[2] else "what is useful"
    for step, cap in steps:
        costs = [model.cost(part, step, cap) for part in parts]
        largest = max(costs, key=lambda cost: cost.total)
        if max(cost.elements for cost in costs) >= ARRAY_ELEMENTS:
            limited_by = "2**31 elements per array"
        elif model.weight_bytes + largest.total > budget:
            limited_by = MEMORY
        else:
            break
    return _assemble(model, wanted, parts, step, cap, halo, budget, largest, limited_by)


def _plan_blended(model: CostModel, tiling: TilingConfig, budget: int) -> DecodePlan:
    """Blended tiles: each decoded whole, beside the float32 buffers that it is added to."""
    config, (batch, channels) = model.config, model.latent_shape[:2]
    axes = plan_tiles(model.latent_shape, tiling, config.spatial_scale, config.temporal_scale)
    times, heights, widths = ([len(range(*tile.latents.indices(10**9))) for tile in axis] for axis in axes)
    shape = (batch, channels, max(times), max(heights), max(widths))
    whole = Part(Window())
    cost = replace(model, latent_shape=shape).cost(whole, shape[2], None)
    frame_bytes = 4 * batch * config.out_channels * config.spatial_scale**2
    frames = config.temporal_scale * (shape[2] - 1) + 1
    tile, group = (frame_bytes * frames * h * w for h, w in (shape[3:], model.latent_shape[3:]))
    shared = [max(one.output.stop - two.output.start, 0) for one, two in pairwise(axes.frames)]
    carry = group // frames * max(shared, default=0)
    waiting = group if len(heights) * len(widths) > 1 else carry
    # In half precision a tile is there twice before it is converted to float32.
    decoding = max(cost.total, 2 * tile)
    blending = group + carry + tile if sum(map(len, axes)) > 3 else 0
    starts = [*(one.output.start for one in axes.frames), axes.frames[-1].output.stop]
    piece = group // frames * max(stop - start for start, stop in pairwise(starts))
    converting = piece + piece // 2 * (model.dtype.size < 4) + carry + 3 * group // frames
    largest = cost._replace(chunk=max(waiting + decoding, blending, converting) - cost.state)
    largest = largest._replace(state=cost.state + 4 * math.prod(model.latent_shape))
    operations = sum(
        replace(model, latent_shape=(batch, channels, t, h, w)).operations(whole)
        for t in times
        for h in heights
        for w in widths
    )
    everything = model.pixels(whole.window)
    plan = _assemble(
        model,
        everything,
        _parts(model, everything, 1, 1, None),
        shape[2],
        None,
        tiling,
        budget,
        largest,
        "the tile size",
    )
    return replace(plan, operations=operations, recompute=operations / plan.operations)


def _assemble(
    model: CostModel,
    wanted: Region,
    parts: tuple[Part, ...],
    step: int,
    cap: int | None,
    tiling: TilingConfig | int | None,
    budget: int,
    largest: Cost,
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
        peak_bytes=model.weight_bytes + largest.total,
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
