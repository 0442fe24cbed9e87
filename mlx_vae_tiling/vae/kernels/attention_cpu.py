"""Neighbourhood attention on the CPU: NumPy's BLAS on MLX's buffers, in tiles of fixed shape.

As in `products_cpu`, a query has the same place among the same queries and keys in every chunk and window:
a tile lies where it does in the video, keys that are not there are zeros, and the keys of a frame stand where
its number among all frames says. So those of a tile are copied once, of however many frames it has queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.attention import seen_of_block
from mlx_vae_tiling.vae.kernels.numbers import numbers, widen
from mlx_vae_tiling.vae.kernels.workers import share
from mlx_vae_tiling.vae.kernels.workspace import Shape, Workspace, bytes_of, part_of
from mlx_vae_tiling.vae.regions import Region, Span, Stride, window_start

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
    """Queries of a part of all frames, of which those of one frame share their keys."""

    entry: int
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
    _, scratch = (workspace or Workspace()).share_out(workers, own)

    def work(tiles: Sequence[Tile], scratch: Sequence[np.ndarray]) -> None:
        for tile in tiles:
            entry = given[tile.entry], held[tile.entry], result[tile.entry]
            _attend(*entry, tile, kernel, queries, keys, scratch)

    tiles = list(_tiles(len(given), kernel, queries))
    share(work, tiles, scratch[: len(tiles)])
    return out.astype(q.dtype)


def _shapes(kernel: Stride, queries: Region, heads: int, channels: int) -> list[Shape]:
    """Queries, keys and values of the largest tile, and the scores and results of one head."""
    strips = _strips(kernel, queries)
    count = math.prod(max(strip.last - strip.first for strip in axis) for axis in strips)
    frames = min(kernel[0], queries.time.size)
    seen = frames * math.prod(max(strip.last_key - strip.first_key for strip in axis) for axis in strips)
    sizes = count * channels, seen * channels, seen * channels, count * seen, count * channels // heads
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
        yield from (Tile(entry, band, strip) for band in rows for strip in columns)


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
    """One tile, frame by frame; q and out (T, H, W, heads, D), kv (T', H', W', 2, heads, D)."""
    heads, width = q.shape[-2:]
    frames = min(kernel[0], keys.time.size)
    asked, seen = (
        [(getattr(strip, first), getattr(strip, last)) for strip in tile[1:]]
        for first, last in (("first", "last"), ("first_key", "last_key"))
    )
    (own, there), (held, place) = _part(asked, queries[1:]), _part(seen, keys[1:])
    sides, key_sides = ([last - first for first, last in spans] for spans in (asked, seen))
    block = part_of(scratch[0], (heads, *sides, width))
    both = [part_of(buffer, (heads, frames, *key_sides, width)) for buffer in scratch[1:3]]
    flat_q, flat_k, flat_v = (a.reshape(heads, -1, width) for a in (block, *both))
    unseen = _unseen(tile.rows.starts, tile.columns.starts, *key_sides)
    laid = 0
    for frame in range(queries.time.start, queries.time.stop):
        first = window_start(frame, frames, keys.time.size)
        for number in range(max(first, laid), first + frames):
            source = kv[number - keys.time.start][held]
            for i, target in enumerate(both):
                _lay(source[..., i, :, :], target[:, number % frames], place)
        laid = first + frames
        time = frame - queries.time.start
        _lay(q[time][own], block, there)
        for head in range(heads):
            made = _attended(flat_q[head], flat_k[head], flat_v[head], unseen, frames, scratch[3:])
            out[time][own][..., head, :] = made.reshape(*sides, width)[there]


def _attended(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    unseen: np.ndarray,
    frames: int,
    scratch: Sequence[np.ndarray],
) -> np.ndarray:
    """Attention of one head: q (queries, D), k and v (keys, D), and `unseen` for the keys of each frame."""
    scores = np.matmul(q, k.T, out=part_of(scratch[0], (len(q), len(k))))
    by_frame = scores.reshape(len(q), frames, -1)
    by_frame += unseen[:, None]
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    made = np.matmul(scores, v, out=part_of(scratch[1], q.shape))
    made /= scores.sum(axis=-1, keepdims=True)
    return made


def _lay(source: np.ndarray, target: np.ndarray, place: tuple[slice, ...]) -> None:
    """Copies what there is of a tile (H, W, heads, D) to its place among zeros (heads, H, W, D)."""
    rows, columns = place
    part = target[:, rows, columns]
    if part.size < target.size:
        target[...] = 0
    widen(source.transpose(2, 0, 1, 3), part)


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
    mask = seen_of_block(row_starts, rows)[:, None, :, None] & seen_of_block(column_starts, columns)[:, None]
    mask = mask.reshape(len(row_starts) * len(column_starts), -1)
    return np.where(mask, np.float32(0), np.float32(-np.inf))
