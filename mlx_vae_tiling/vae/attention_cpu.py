"""Neighbourhood attention on the CPU: NumPy's BLAS on MLX's buffers, in tiles of fixed shape.

As in `products_cpu`, a query has the same place among the same queries and keys in every chunk and window:
a tile is part of one frame, lies where it does in the video, and keys that are not there are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.attention import window_start
from mlx_vae_tiling.vae.products_cpu import copy_numbers, numbers, share
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


def attention_numpy(
    q: mx.array, kv: mx.array, kernel: Stride, queries: Region, keys: Region, workers: int = 1
) -> mx.array:
    """Attends from every query to the window of keys around it; arguments as `neighbourhood_attention`."""
    mx.eval(q, kv)
    given, held = numbers(q), numbers(kv)
    out = mx.zeros(q.shape)
    mx.eval(out)
    result = np.array(out, copy=False)

    def work(tiles: Sequence[Tile]) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # whoever decodes looks at the frames
            for tile in tiles:
                _attend(given[tile.entry], held[tile.entry], result[tile.entry], tile, kernel, queries, keys)

    share(work, list(_tiles(len(given), kernel, queries)), workers)
    return out.astype(q.dtype)


def _tiles(batch: int, kernel: Stride, queries: Region) -> Iterator[Tile]:
    rows, columns = (
        [_strip(start, side, k, span.size) for start in range(span.start // side * side, span.stop, side)]
        for span, side, k in zip(queries[1:], TILE, kernel[1:], strict=True)
    )
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
) -> None:
    """One tile; q and out (T, H, W, heads, D), kv (T', H', W', 2, heads, D)."""
    heads, width = q.shape[-2:]
    frames = min(kernel[0], keys.time.size)
    first = window_start(tile.frame, frames, keys.time.size) - keys.time.start
    during = slice(first, first + frames)
    spans = [(strip.first, strip.last) for strip in tile[2:]]
    own, there = _part(spans, queries[1:])
    block = np.zeros((*(last - start for start, last in spans), heads, width), np.float32)
    time = tile.frame - queries.time.start
    copy_numbers(q[time][own], block[there])
    spans = [(strip.first_key, strip.last_key) for strip in tile[2:]]
    held, place = _part(spans, keys[1:])
    gathered = np.zeros((2, frames, *(last - start for start, last in spans), heads, width), np.float32)
    # Keys and values apart, so that each is one matrix with heads side by side.
    for which in range(2):
        source: tuple[slice | int, ...] = (during, *held, which)
        target: tuple[slice | int, ...] = (which, slice(None), *place)
        copy_numbers(kv[source], gathered[target])
    block_q, block_k, block_v = (
        a.reshape(-1, heads, width).transpose(1, 0, 2) for a in (block, gathered[0], gathered[1])
    )
    scores = np.matmul(block_q, block_k.transpose(0, 2, 1))
    unseen = _unseen(tile.rows.starts, tile.columns.starts, *(last - start for start, last in spans), frames)
    scores += unseen
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    attended = np.matmul(scores, block_v)
    attended /= scores.sum(axis=-1, keepdims=True)
    out[time][own] = attended.transpose(1, 0, 2).reshape(block.shape)[there]


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
    row_starts: tuple[int, ...], column_starts: tuple[int, ...], rows: int, columns: int, frames: int
) -> np.ndarray:
    """(queries, keys): 0 where a query sees a key, minus infinity elsewhere."""
    seen = []
    for starts, count in ((row_starts, rows), (column_starts, columns)):
        begin = np.array(starts)[:, None]
        length = count - starts[-1]
        seen.append((np.arange(count) >= begin) & (np.arange(count) < begin + length))
    mask = seen[0][:, None, None, :, None] & seen[1][:, None, None, :]
    shape = (len(row_starts), len(column_starts), frames, rows, columns)
    mask = np.broadcast_to(mask, shape).reshape(len(row_starts) * len(column_starts), -1)
    return np.where(mask, np.float32(0), np.float32(-np.inf))
