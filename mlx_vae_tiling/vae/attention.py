"""Neighbourhood attention over a region of a grid, in blocks of queries.

The window of a position is centred on it and keeps its size: at a border of the grid it is shifted inward.
Neighbouring queries share most of their keys, so that a block of queries attends to all the keys that any of
them sees, through one masked `mx.fast.scaled_dot_product_attention`. What that computes in excess is what
larger blocks cost; what smaller ones cost is copying keys more often. `block_for` weighs the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, pairwise, product
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.regions import Region, Span, Stride, window_start

BLOCK_QUERIES = 512
"""Most queries of a block."""


class Blocks(NamedTuple):
    """Consecutive blocks of an axis that differ by their position alone.

    Attributes:
        first: First query of the first of them.
        first_key: First key of the first of them.
        repeats: How many there are.
        queries, keys: Positions of each.
        starts: Of each query of a block, where its window starts among the block's keys.
    """

    first: int
    first_key: int
    repeats: int
    queries: int
    keys: int
    starts: tuple[int, ...]

    def part(self, start: int, stop: int) -> Blocks:
        """The blocks start to stop - 1 of these."""
        offset = start * self.queries
        return self._replace(
            first=self.first + offset, first_key=self.first_key + offset, repeats=stop - start
        )


@lru_cache(maxsize=4096)
def blocks_of(span: Span, kernel: int, block: int, aligned: bool) -> tuple[Blocks, ...]:
    """Cuts the queries of an axis into blocks of at most `block`, in order, equal ones together.

    Args:
        span: The queries.
        kernel: Positions of a window.
        block: Most queries of a block.
        aligned: Whether to cut at multiples of `block`, whatever the span.
    """
    kernel = min(kernel, span.size)
    first_cut = span.start - span.start % block + block if aligned else span.start + block
    cuts = [span.start, *range(first_cut, span.stop, block), span.stop]
    found = []
    for start, stop in pairwise(cuts):
        begins = [window_start(position, kernel, span.size) for position in range(start, stop)]
        starts = tuple(begin - begins[0] for begin in begins)
        found.append(Blocks(start, begins[0], 1, stop - start, starts[-1] + kernel, starts))
    # Blocks of which the next one's keys lie as far on as its queries can be one strided view.
    merged: list[Blocks] = []
    for _, alike in groupby(found, key=lambda b: (b.queries, b.starts, b.first_key - b.first)):
        group = list(alike)
        merged.append(group[0]._replace(repeats=len(group)))
    return tuple(merged)


@lru_cache(maxsize=1024)
def block_for(kernel: Stride, queries: Stride, copying: int) -> Stride:
    """The size of a block that is expected to be fastest.

    Args:
        kernel: Positions of a window.
        queries: How many there are along each axis.
        copying: Queries whose products with a key take as long as copying the key for their block.
    """
    options = [sorted({min(size, length) for size in (1, 2, 4, 8, 16)}) for length in queries]

    def cost(block: Stride) -> float:
        count = math.prod(block)
        keys = math.prod(b + k - 1 for b, k in zip(block, kernel, strict=True))
        return keys * (count + copying) / count if count <= BLOCK_QUERIES else math.inf

    blocks: list[Stride] = [(t, h, w) for t, h, w in product(*options)]
    return min(blocks, key=lambda block: (cost(block), block))


def _axes(kernel: Stride, queries: Region, block: Stride) -> list[tuple[Blocks, ...]]:
    # In time chunks begin anywhere; in space aligned blocks are the same in every window.
    return [blocks_of(queries[axis], kernel[axis], block[axis], aligned=axis > 0) for axis in range(3)]


def attention_calls(
    kernel: Stride, queries: Region, block: Stride, repeated: int, pairs: int
) -> Iterator[tuple[int, int, int]]:
    """Of each kind of call of `neighbourhood_attention`, products, keys and queries of all its blocks.

    Args:
        kernel, queries, block, pairs: As there.
        repeated: Heads times batch entries.
    """
    for time, band, strip in product(*_axes(kernel, queries, block)):
        count = math.prod(g.queries for g in (time, band, strip))
        keys = math.prod(g.keys for g in (time, band, strip))
        blocks = max(1, pairs // (count * keys * repeated))
        if blocks >= strip.repeats:
            blocks = min(blocks // strip.repeats, band.repeats) * strip.repeats
        yield blocks * count * keys, blocks * keys, blocks * count


def neighbourhood_attention(
    q: mx.array,
    kv: mx.array,
    kernel: Stride,
    queries: Region,
    keys: Region,
    block: Stride,
    pairs: int = 2**26,
) -> mx.array:
    """Attends from every query to the window of keys around it.

    Args:
        q: (B, T, H, W, heads, D) at the positions of `queries`, already scaled.
        kv: (B, T', H', W', 2, heads, D), keys and values at the positions of `keys`.
        kernel: Positions of a window along time, height and width. Where the grid is smaller, all of it.
        queries: Where the queries lie in the grid.
        keys: Where the keys lie; at least all that the queries' windows reach.
        block: Most queries of a block along each axis.
        pairs: Bounds the products of queries and keys of one call, and so the memory that it takes.

    Returns:
        (B, T, H, W, heads, D) in the dtype of q.
    """
    b, *_, heads, width = q.shape
    if b > 1:
        # Frames of one video are contiguous; those of several would be copied for every call.
        kv = mx.contiguous(kv)
    times, rows, columns = _axes(kernel, queries, block)
    frames = []
    for time in (t.part(i, i + 1) for t in times for i in range(t.repeats)):
        bands = []
        for band in rows:
            strips = []
            for strip in columns:
                mask = _mask(time, band, strip)
                per_block = heads * b * math.prod((g.queries * g.keys) for g in (time, band, strip))
                parts = [
                    _attend(q, kv, mask, (time, *part), queries, keys)
                    for part in _portions(band, strip, max(1, pairs // per_block))
                ]
                shape = b, time.queries, -1, strip.repeats * strip.queries, heads, width
                strips.append(_joined(parts, band, strip, shape))
            bands.append(mx.concatenate(strips, axis=3) if len(strips) > 1 else strips[0])
        frames.append(mx.concatenate(bands, axis=2) if len(bands) > 1 else bands[0])
        mx.eval(frames[-1])
    return mx.concatenate(frames, axis=1) if len(frames) > 1 else frames[0]


def _portions(band: Blocks, strip: Blocks, most: int) -> Iterator[tuple[Blocks, Blocks]]:
    """Parts of a grid of blocks with at most so many blocks each: whole rows of it, or parts of a row."""
    if most >= strip.repeats:
        rows = most // strip.repeats
        for start in range(0, band.repeats, rows):
            yield band.part(start, min(start + rows, band.repeats)), strip
        return
    for row in range(band.repeats):
        for start in range(0, strip.repeats, most):
            yield band.part(row, row + 1), strip.part(start, min(start + most, strip.repeats))


def _joined(parts: list[mx.array], band: Blocks, strip: Blocks, shape: tuple[int, ...]) -> mx.array:
    """Portions as `_portions` cut them, of shape (B, t, rows, columns, heads, D), side by side."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].shape[3] == shape[3]:
        return mx.concatenate(parts, axis=2)
    each = len(parts) // band.repeats
    rows = [mx.concatenate(parts[i : i + each], axis=3) for i in range(0, len(parts), each)]
    return mx.concatenate(rows, axis=2)


def _attend(
    q: mx.array,
    kv: mx.array,
    mask: mx.array | None,
    blocks: tuple[Blocks, Blocks, Blocks],
    queries: Region,
    keys: Region,
) -> mx.array:
    """Computes a grid of equal blocks; evaluated, so that the copies of their keys can go."""
    b, *_, heads, width = q.shape
    counts = [g.repeats for g in blocks[1:]]
    sizes = [g.queries for g in blocks]
    block_q = _gathered(q, [(g.first, g.repeats, g.queries, g.queries) for g in blocks], queries)
    gathered = _gathered(kv, [(g.first_key, g.repeats, g.queries, g.keys) for g in blocks], keys)
    block_k, block_v = gathered[:, :, 0], gathered[:, :, 1]
    out = mx.fast.scaled_dot_product_attention(
        *(x.transpose(0, 2, 1, 3) for x in (block_q, block_k, block_v)), scale=1.0, mask=mask
    )
    out = out.reshape(b, *counts, heads, *sizes, width).transpose(0, 4, 1, 5, 2, 6, 3, 7)
    out = out.reshape(b, sizes[0], counts[0] * sizes[1], counts[1] * sizes[2], heads, width)
    mx.eval(out)
    return out


def _gathered(x: mx.array, axes: list[tuple[int, int, int, int]], region: Region) -> mx.array:
    """Blocks of x (B, T, H, W, ...) as (B * rows * columns of blocks, positions, ...).

    Args:
        x: Contiguous; at the positions of `region`.
        axes: Along time, height and width: the first position, the number of blocks, how far one lies from
            the next, and positions of each. Along time there is one block.
        region: Where x lies.
    """
    b, t, h, w, *rest = x.shape
    inner = math.prod(rest)
    strides = [h * w * inner, w * inner, inner]
    offset = sum((first - span.start) * s for (first, *_), span, s in zip(axes, region, strides, strict=True))
    _, (_, rows, row_step, _), (_, columns, column_step, _) = axes
    sizes = [size for *_, size in axes]
    inner_strides = [math.prod(rest[i + 1 :]) for i in range(len(rest))]
    view = mx.as_strided(
        x,
        (b, rows, columns, *sizes, *rest),
        (t * strides[0], row_step * strides[1], column_step * strides[2], *strides, *inner_strides),
        offset,
    )
    return view.reshape(b * rows * columns, math.prod(sizes), *rest)


def _mask(time: Blocks, band: Blocks, strip: Blocks) -> mx.array | None:
    """(queries, keys) booleans: which keys of a block each of its queries sees; None for all of them."""
    axes = tuple((g.starts, g.keys) for g in (time, band, strip))
    if all(not any(starts) for starts, _ in axes):
        return None
    return mx.array(_mask_values(axes))


@lru_cache(maxsize=64)
def _mask_values(axes: tuple[tuple[tuple[int, ...], int], ...]) -> np.ndarray:
    t, h, w = (seen_of_block(starts, keys) for starts, keys in axes)
    mask = t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
    return mask.reshape(math.prod(mask.shape[:3]), -1)


def seen_of_block(starts: tuple[int, ...], keys: int) -> np.ndarray:
    """(queries, keys) booleans along an axis: which keys are in the window of each query of a block.

    Args:
        starts: Of each query, where its window starts among the keys; the last window ends with them.
        keys: How many there are.
    """
    begin, length = np.array(starts)[:, None], keys - starts[-1]
    return (np.arange(keys) >= begin) & (np.arange(keys) < begin + length)
