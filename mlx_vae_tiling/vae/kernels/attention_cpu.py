"""Neighbourhood attention on the CPU: NumPy's BLAS on MLX's buffers, in tiles of fixed shape.

As in `products_cpu`, a query has the same place among the same queries and keys in every chunk and window:
a tile is part of one frame, lies where it does in the video, and keys that are not there are zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.attention import window_start
from mlx_vae_tiling.vae.kernels.products_cpu import copy_numbers, numbers, share
from mlx_vae_tiling.vae.kernels.workspace import Shape, Workspace, bytes_of
from mlx_vae_tiling.vae.regions import Region, Span, Stride

TILE = (4, 8)
"""Rows and columns of queries that share their keys: 2.1 times those that an 11x11x11 window has."""


class Strip(NamedTuple):
    """Queries of a tile along one axis, and the keys that any of them sees: positions in the video.

    Attributes:
        first, last: Queries, of the whole tile as far as the video reaches.
        first_key, last_key: Keys of these.
        starts: Of each query, where its window starts among the keys.
    """

    first: int
    last: int
    first_key: int
    last_key: int
    starts: tuple[int, ...]


class Tile(NamedTuple):
    """Queries of a frame that share their keys."""

    entry: int
    frame: int
    rows: Strip
    columns: Strip


def attention_workspace(kernel: Stride, queries: Region, heads: int, channels: int, workers: int) -> int:
    """Bytes that `attention_numpy` takes of its workspace."""
    return bytes_of(*_shapes(kernel, queries, heads, channels) * workers)


def attention_numpy(
    q: mx.array,
    kv: mx.array,
    kernel: Stride,
    queries: Region,
    keys: Region,
    workspace: Workspace | None = None,
    workers: int = 1,
) -> mx.array:
    """Attends from every query to the window of keys around it.

    Args:
        q, kv, kernel, queries, keys: As `neighbourhood_attention`.
        workspace: Where to compute; by default a new one.
        workers: Threads that compute; more than one is for a BLAS with one thread.
    """
    mx.eval(q, kv)
    given, held = numbers(q), numbers(kv)
    out = mx.zeros(q.shape)
    mx.eval(out)
    result = np.array(out, copy=False)
    heads, width = q.shape[-2:]
    own = _shapes(kernel, queries, heads, heads * width)
    arrays = (workspace or Workspace()).take(*own * workers)

    def work(tiles: Sequence[Tile], scratch: Sequence[np.ndarray]) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # whoever decodes looks at the frames
            for tile in tiles:
                entry = given[tile.entry], held[tile.entry], result[tile.entry]
                _attend(*entry, tile, kernel, queries, keys, scratch)

    scratch = [arrays[start : start + len(own)] for start in range(0, len(arrays), len(own))]
    share(work, list(_tiles(len(given), kernel, queries)), scratch)
    return out.astype(q.dtype)


def _shapes(kernel: Stride, queries: Region, heads: int, channels: int) -> list[Shape]:
    """Queries, keys, values, scores and results of the largest tile."""
    strips = _strips(kernel, queries)
    count = math.prod(max(strip.last - strip.first for strip in axis) for axis in strips)
    frames = min(kernel[0], queries.time.size)
    seen = frames * math.prod(max(strip.last_key - strip.first_key for strip in axis) for axis in strips)
    sizes = count * channels, seen * channels, seen * channels, heads * count * seen, count * channels
    return [(size,) for size in sizes]


def _strips(kernel: Stride, queries: Region) -> list[list[Strip]]:
    """Of the rows and of the columns."""
    return [
        [_strip(start, side, k, span.size) for start in range(span.start // side * side, span.stop, side)]
        for span, side, k in zip(queries[1:], TILE, kernel[1:], strict=True)
    ]


def _tiles(batch: int, kernel: Stride, queries: Region) -> Iterator[Tile]:
    rows, columns = _strips(kernel, queries)
    for entry in range(batch):
        for frame in range(queries.time.start, queries.time.stop):
            yield from (Tile(entry, frame, band, strip) for band in rows for strip in columns)


@lru_cache(maxsize=4096)
def _strip(start: int, side: int, kernel: int, size: int) -> Strip:
    kernel = min(kernel, size)
    stop = min(start + side, size)
    begins = [window_start(position, kernel, size) for position in range(start, stop)]
    starts = tuple(begin - begins[0] for begin in begins)
    return Strip(start, stop, begins[0], begins[-1] + kernel, starts)


def _attend(
    q: np.ndarray,
    kv: np.ndarray,
    out: np.ndarray,
    tile: Tile,
    kernel: Stride,
    queries: Region,
    keys: Region,
    scratch: Sequence[np.ndarray],
) -> None:
    """One tile; q and out (T, H, W, heads, D), kv (T', H', W', 2, heads, D)."""
    frames = min(kernel[0], keys.time.size)
    first = window_start(tile.frame, frames, keys.time.size) - keys.time.start
    time = tile.frame - queries.time.start
    spans = [(strip.first, strip.last) for strip in tile[2:]]
    own, there = _part(spans, queries[1:])
    block = _laid(q[time][own], scratch[0], spans, there)
    spans = [(strip.first_key, strip.last_key) for strip in tile[2:]]
    held, place = _part(spans, keys[1:])
    # Keys and values apart, so that each is one matrix with heads side by side.
    during: tuple[slice, ...] = (slice(first, first + frames), *held)
    k, v = (_laid(kv[during][..., i, :, :], scratch[1 + i], spans, place) for i in range(2))
    block_q, block_k, block_v = (a.reshape(-1, *a.shape[-2:]).transpose(1, 0, 2) for a in (block, k, v))
    heads, count, width = block_q.shape
    seen = block_k.shape[1]
    scores = np.matmul(block_q, block_k.transpose(0, 2, 1), out=_first(scratch[3], (heads, count, seen)))
    sizes = (last - start for start, last in spans)
    by_frame = scores.reshape(heads, count, frames, -1)
    by_frame += _unseen(tile.rows.starts, tile.columns.starts, *sizes)[:, None]
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    attended = np.matmul(scores, block_v, out=_first(scratch[4], (heads, count, width)))
    attended /= scores.sum(axis=-1, keepdims=True)
    block_q[...] = attended
    out[time][own] = block[there]


def _laid(
    source: np.ndarray, buffer: np.ndarray, spans: Sequence[tuple[int, int]], place: tuple[slice, ...]
) -> np.ndarray:
    """What there is of a tile (..., H, W, heads, D) at its place among zeros, in float32."""
    target = _first(
        buffer, (*source.shape[:-4], *(last - start for start, last in spans), *source.shape[-2:])
    )
    index: tuple[Any, ...] = (..., *place, slice(None), slice(None))
    part = target[index]
    if part.size < target.size:
        target[...] = 0
    copy_numbers(source, part)
    return target


def _first(buffer: np.ndarray, shape: Shape) -> np.ndarray:
    """An array in the first elements of a flat one."""
    return buffer[: math.prod(shape)].reshape(shape)


def _part(
    spans: Sequence[tuple[int, int]], available: Sequence[Span]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What there is of a tile: where it lies in an array of what is available, and where in the tile."""
    common = [(max(a, s.start), min(b, s.stop)) for (a, b), s in zip(spans, available, strict=True)]
    source = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(common, available, strict=True))
    target = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, spans, strict=True))
    return source, target


@lru_cache(maxsize=64)
def _unseen(
    row_starts: tuple[int, ...], column_starts: tuple[int, ...], rows: int, columns: int
) -> np.ndarray:
    """(queries, keys of a frame): 0 where a query sees a key, minus infinity elsewhere."""
    seen = []
    for starts, count in ((row_starts, rows), (column_starts, columns)):
        begin = np.array(starts)[:, None]
        length = count - starts[-1]
        seen.append((np.arange(count) >= begin) & (np.arange(count) < begin + length))
    mask = seen[0][:, None, :, None] & seen[1][None, :, None, :]
    mask = mask.reshape(len(row_starts) * len(column_starts), -1)
    return np.where(mask, np.float32(0), np.float32(-np.inf))
