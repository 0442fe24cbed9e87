"""Products of a transformer's layers on the CPU: NumPy's BLAS on MLX's buffers, in tiles of fixed shape.

How BLAS adds up a row of a product depends on how many rows there are and where among them it lies. Here
tiles of positions lie where they do in the video, whatever is computed of it, and are filled up with zeros:
a position has the same place in a product of the same shape in every chunk and every window, and so the
same bytes. Half precision is multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.regions import Region

Item = TypeVar("Item")

SIDE = 8
"""Rows and columns of a tile: enough rows of a product for BLAS, and few that are filled up."""


class Band(NamedTuple):
    """A row of tiles of one frame: the rows of it that are there, and where they lie in the tiles."""

    frame: tuple[int, int]
    rows: slice
    top: int


class Tiles:
    """The frames of a region, cut into bands of tiles.

    Args:
        region: Where they lie.
        batch: Entries of the batch.
    """

    def __init__(self, region: Region, batch: int):
        rows, columns = region.height, region.width
        self._left = columns.start % SIDE
        self._width = columns.length
        self.count = -(-(self._left + self._width) // SIDE)
        starts = range(rows.start - rows.start % SIDE, rows.stop, SIDE)
        bounds = [(max(start, rows.start), min(start + SIDE, rows.stop)) for start in starts]
        self.bands = [
            Band(frame, slice(first - rows.start, last - rows.start), first % SIDE)
            for frame in np.ndindex(batch, region.time.length)
            for first, last in bounds
        ]

    def read(self, x: np.ndarray, band: Band, canvas: np.ndarray, out: np.ndarray) -> np.ndarray:
        """A band of x (B, T, H, W, C) as (tiles, positions, C) in float32.

        Args:
            x: As `numbers` gives it.
            band: Which.
            canvas: (SIDE, tiles * SIDE, C), zero where no band has positions.
            out: (tiles, SIDE, SIDE, C), overwritten.
        """
        height = band.rows.stop - band.rows.start
        canvas[...] = 0
        copy_numbers(x[band.frame][band.rows], self._inner(canvas, band.top, height))
        out.transpose(1, 0, 2, 3)[...] = canvas.reshape(SIDE, self.count, SIDE, -1)
        return out.reshape(self.count, SIDE * SIDE, -1)

    def write(self, y: np.ndarray, band: Band, out: np.ndarray) -> None:
        """The positions that are there of y (tiles, positions, C) into out (B, T, H, W, C)."""
        rows = y.reshape(self.count, SIDE, SIDE, -1).transpose(1, 0, 2, 3)
        height = band.rows.stop - band.rows.start
        part = rows[band.top : band.top + height].reshape(height, self.count * SIDE, -1)
        out[band.frame][band.rows] = part[:, self._left : self._left + self._width]

    def _inner(self, canvas: np.ndarray, top: int, height: int) -> np.ndarray:
        return canvas[top : top + height, self._left : self._left + self._width]


def linear_numpy(
    x: mx.array, weight: mx.array, bias: mx.array | None, region: Region, workers: int = 1
) -> mx.array:
    """`x @ weight.T + bias`.

    Args:
        x: (B, T, H, W, C) at the positions of `region`.
        weight: (O, C).
        bias: (O,), or None.
        region: Where the positions lie in the video.
        workers: Threads that compute; more than one is for a BLAS with one thread.

    Returns:
        (B, T, H, W, O) in the dtype of x.
    """
    matrix = _floats(weight).T
    added = None if bias is None else _floats(bias)

    def multiply(given: np.ndarray) -> np.ndarray:
        y = np.matmul(given, matrix)
        if added is not None:
            y += added
        return y

    return _by_bands(x, multiply, len(weight), region, workers)


def mlp_numpy(
    x: mx.array, up: mx.array, gate: mx.array, down: mx.array, region: Region, workers: int = 1
) -> mx.array:
    """`(silu(x @ gate.T) * (x @ up.T)) @ down.T`, of which the hidden widths exist for one band at a time.

    Args:
        x: (B, T, H, W, C) at the positions of `region`.
        up, gate: (hidden, C).
        down: (C, hidden).
        region, workers: As `linear_numpy`.

    Returns:
        (B, T, H, W, C) in the dtype of x.
    """
    up_matrix, gate_matrix, down_matrix = (_floats(w).T for w in (up, gate, down))

    def multiply(given: np.ndarray) -> np.ndarray:
        hidden = np.matmul(given, gate_matrix)
        other = np.negative(hidden)
        np.exp(other, out=other)
        other += 1
        hidden /= other
        hidden *= np.matmul(given, up_matrix, out=other)
        return np.matmul(hidden, down_matrix)

    return _by_bands(x, multiply, len(down), region, workers)


def _by_bands(
    x: mx.array, multiply: Callable[[np.ndarray], np.ndarray], outputs: int, region: Region, workers: int
) -> mx.array:
    """What `multiply` makes of the tiles of x, band by band."""
    mx.eval(x)
    *positions, channels = x.shape
    tiles, source = Tiles(region, x.shape[0]), numbers(x)
    out = mx.zeros((*positions, outputs))
    mx.eval(out)
    result = np.array(out, copy=False)

    def work(bands: Sequence[Band]) -> None:
        canvas = np.empty((SIDE, tiles.count * SIDE, channels), np.float32)
        given = np.empty((tiles.count, SIDE, SIDE, channels), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever decodes looks at the frames
            for band in bands:
                tiles.write(multiply(tiles.read(source, band, canvas, given)), band, result)

    share(work, tiles.bands, workers)
    # Rounded by whoever evaluates it, when what went in is gone.
    return out.astype(x.dtype)


def share(work: Callable[[Sequence[Item]], None], items: Sequence[Item], workers: int) -> None:
    """Has `workers` threads do a part of the items each."""
    parts = [items[i::workers] for i in range(workers) if items[i::workers]]
    if len(parts) == 1:
        work(parts[0])
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(work, parts))


def numbers(x: mx.array) -> np.ndarray:
    """NumPy's view of an array's buffer; bfloat16 as unsigned integers, which `copy_numbers` understands."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, copy=False)


def copy_numbers(source: np.ndarray, target: np.ndarray) -> None:
    """Copies what `numbers` gave, or a part of it, into an array of float32."""
    if source.dtype == np.uint16:
        bits = target.view(np.uint32)
        bits[...] = source
        bits <<= 16
    else:
        target[...] = source


def _floats(x: mx.array) -> np.ndarray:
    """An array of weights in float32; a view where it is of that type."""
    mx.eval(x)
    if x.dtype == mx.float32:
        return np.array(x, copy=False)
    copy = np.empty(x.shape, np.float32)
    copy_numbers(numbers(x), copy)
    return copy
