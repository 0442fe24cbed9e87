"""Grids of windows and sizes of chunks: which there are, and the fewest windows that fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from mlx_vae_tiling.runtime.planning.cost import CostModel, Part
from mlx_vae_tiling.vae.regions import Region, Span

ARRAY_ELEMENTS = 2**31
"""Kernels index with 32 bits; past it they fail without a word."""

MOST_WINDOWS = 64
"""More would repeat most of their work; who has so little memory is told what is needed."""


ChunkSize = tuple[int, int | None]
"""Latent frames per step, and the bound on the frames of a layer."""


def _cuts(span: Span, count: int, scale: int) -> list[slice]:
    """A span of pixels in `count` runs, about even, cut between latents."""
    inner = [round((span.start + span.length * i / count) / scale) * scale for i in range(1, count)]
    return [slice(*bounds) for bounds in pairwise([span.start, *inner, span.stop])]


def part_around(model: CostModel, pixels: Region, halo: int | None) -> Part:
    """A region of the output with the latents that it is decoded from: all, or `halo` of them around it."""
    scale = model.decoder.config.spatial_scale

    def around(cut: Span, latents: Span) -> Span:
        if halo is None:
            return latents
        start, stop = cut.start // scale, -(-cut.stop // scale)
        # What the decoder cannot decode by itself, such as a single row that is reflected, takes more.
        reach = max(halo, model.decoder.smallest_side - (stop - start))
        return latents._replace(start=max(start - reach, 0), stop=min(stop + reach, latents.size))

    time, *space = (Span(0, length, length) for length in model.latent_shape[2:])
    return Part(pixels, Region(time, *(around(*pair) for pair in zip(pixels[1:], space, strict=True))))


def parts_of(model: CostModel, wanted: Region, rows: int, columns: int, halo: int | None) -> tuple[Part, ...]:
    """The windows of a grid, and the latents that each sees."""
    scale = model.decoder.config.spatial_scale

    def part(height: slice, width: slice) -> Part:
        pixels = wanted._replace(
            height=wanted.height._replace(start=height.start, stop=height.stop),
            width=wanted.width._replace(start=width.start, stop=width.stop),
        )
        return part_around(model, pixels, halo)

    return tuple(
        part(height, width)
        for height in _cuts(wanted.height, rows, scale)
        for width in _cuts(wanted.width, columns, scale)
    )


def chunks(model: CostModel) -> Iterator[ChunkSize]:
    """ChunkSize sizes from the largest useful one down.

    What halves is the cap: the first layers, whose frames are small and whose kernels are large, keep
    chunks as large as the last ones'.
    """
    _, _, frames, height, width = model.latent_shape
    scale = model.decoder.config.temporal_scale
    step, cap = model.backend.useful_chunk(height * width, scale)
    step = min(step, frames)
    while cap >= 1:
        step = min(step, cap)
        yield step, cap if cap < step * scale else None
        cap = min(cap, step * scale) // 2


def grids(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Grids of windows over this many latents, the squarest windows of each number."""
    for count in range(1, min(height * width, MOST_WINDOWS) + 1):
        pairs = [(r, count // r) for r in range(1, count + 1) if count % r == 0]
        fitting = [(r, c) for r, c in pairs if r <= height and c <= width]
        if fitting:
            yield min(fitting, key=lambda grid: abs(math.log(height * grid[1] / (width * grid[0]))))


def fits(model: CostModel, part: Part, budget: int, chunk: ChunkSize | None = None) -> bool:
    """Whether a part can be decoded within a budget, with a chunk or with the smallest."""
    left = budget - model.weight_bytes
    return neediest(model, [part], chunk or list(chunks(model))[-1], left) <= left


def choose_parts(model: CostModel, wanted: Region, budget: int, halo: int | None) -> tuple[Part, ...]:
    """The fewest windows that fit with the smallest chunks; where none do, those that need least.

    Args:
        model: What they cost.
        wanted: The output.
        budget: The bytes that there are.
        halo: Latents that windows see around them; None for all in the receptive field.
    """
    left, smallest = budget - model.weight_bytes, list(chunks(model))[-1]
    scale, looked_at = model.decoder.config.spatial_scale, []
    for grid in grids(max(1, wanted.height.length // scale), max(1, wanted.width.length // scale)):
        # One window that does not fit is enough; most likely it is the one with most work.
        parts = parts_of(model, wanted, *grid, halo)
        parts_by_work = sorted(parts, key=model.operations, reverse=True)
        if left > 0 and neediest(model, parts_by_work, smallest, left) <= left:
            return parts
        looked_at.append((parts, parts_by_work))
    least, best = math.inf, looked_at[-1][0]
    # The finest grids need least, so that of the others one window tells.
    for parts, parts_by_work in reversed(looked_at):
        most = neediest(model, parts_by_work, smallest, least)
        if most <= least:
            least, best = most, parts
    return best


def neediest(model: CostModel, parts: Sequence[Part], chunk: ChunkSize, enough: float) -> float:
    """The bytes that the neediest of these windows takes, or the first that takes more than enough.

    An array that no kernel can index takes more than there is.
    """
    most = 0.0
    for part in parts:
        cost = model.cost(part, *chunk)
        most = max(most, cost.total if cost.elements < ARRAY_ELEMENTS else math.inf)
        if most > enough:
            break
    return most
