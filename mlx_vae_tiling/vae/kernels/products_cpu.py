"""Products of a transformer's layers on the CPU: NumPy's BLAS on MLX's buffers, in tiles of fixed shape.

How BLAS adds up a row of a product depends on how many rows there are and where among them it lies. Here
tiles of positions lie where they do in the video, whatever is computed of it, and are filled up with zeros:
a position has the same place in a product of the same shape in every chunk and every window, and so the
same bytes. Half precision is multiplied in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.kernels.numbers import numbers, widen
from mlx_vae_tiling.vae.kernels.workers import share
from mlx_vae_tiling.vae.kernels.workspace import Shape, Workspace, bytes_of
from mlx_vae_tiling.vae.regions import Region, Span

Multiply = Callable[[Sequence[np.ndarray]], np.ndarray]
"""From a worker's arrays, of which the first is a tile (positions, C), to what is made of it."""

SIDE = 8
"""Rows and columns of a tile: enough rows of a product for BLAS, and few that are filled up."""

POSITIONS = SIDE * SIDE


TURNED_ELEMENTS = 2**18
"""Of weights that are copied to (C, O): BLAS multiplied tiles by those at 83 to 97 GFLOP/s, and by the others
at 74 to 77. Copying wider ones takes as long as it saves, unless frames are large."""


class Tile(NamedTuple):
    """Positions of one frame that are multiplied together.

    Attributes:
        frame: Entry of the batch, and frame of it.
        source: Rows and columns of the frame that are there.
        place: Where they lie in the tile.
    """

    frame: tuple[int, int]
    source: tuple[slice, slice]
    place: tuple[slice, slice]


def linear_workspace(inputs: int, outputs: int, itemsize: int, workers: int) -> int:
    """Bytes that `linear_numpy` takes of its workspace, for so many channels."""
    return bytes_of(*_copies(itemsize, (outputs, inputs)), *_linear_shapes(inputs, outputs) * workers)


def mlp_workspace(channels: int, hidden: int, itemsize: int, workers: int) -> int:
    """Bytes that `mlp_numpy` takes of its workspace."""
    weights = _copies(itemsize, *_mlp_weights(channels, hidden))
    return bytes_of(*weights, *_mlp_shapes(channels, hidden) * workers)


def linear_numpy(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    region: Region,
    workspace: Workspace | None = None,
    workers: int = 1,
) -> mx.array:
    """`x @ weight.T + bias`.

    Args:
        x: (B, T, H, W, C) at the positions of `region`.
        weight: (O, C).
        bias: (O,), or None.
        region: Where the positions lie in the video.
        workspace: Where to compute; by default a new one.
        workers: Threads that compute; more than one is for a BLAS with one thread.

    Returns:
        (B, T, H, W, O) in the dtype of x.
    """
    outputs, inputs = weight.shape
    own = _linear_shapes(inputs, outputs)
    (matrix,), scratch = _taken(workspace, [weight], own, workers)
    added = None if bias is None else np.array(bias.astype(mx.float32))

    def multiply(arrays: Sequence[np.ndarray]) -> np.ndarray:
        y = np.matmul(arrays[0], matrix, out=arrays[1])
        if added is not None:
            y += added
        return y

    return _by_tiles(x, multiply, outputs, region, scratch)


def mlp_numpy(
    x: mx.array,
    up: mx.array,
    gate: mx.array,
    down: mx.array,
    region: Region,
    workspace: Workspace | None = None,
    workers: int = 1,
) -> mx.array:
    """`(silu(x @ gate.T) * (x @ up.T)) @ down.T`, of which the hidden widths exist for one tile at a time.

    Args:
        x: (B, T, H, W, C) at the positions of `region`.
        up, gate: (hidden, C).
        down: (C, hidden).
        region, workspace, workers: As `linear_numpy`.

    Returns:
        (B, T, H, W, C) in the dtype of x.
    """
    own = _mlp_shapes(len(down), len(up))
    (up_matrix, gate_matrix, down_matrix), scratch = _taken(workspace, [up, gate, down], own, workers)

    def multiply(arrays: Sequence[np.ndarray]) -> np.ndarray:
        given, hidden, other, made = arrays
        np.matmul(given, gate_matrix, out=hidden)
        np.negative(hidden, out=other)
        np.exp(other, out=other)
        other += 1
        hidden /= other
        hidden *= np.matmul(given, up_matrix, out=other)
        return np.matmul(hidden, down_matrix, out=made)

    return _by_tiles(x, multiply, len(down), region, scratch)


def _linear_shapes(inputs: int, outputs: int) -> list[Shape]:
    return [(POSITIONS, inputs), (POSITIONS, outputs)]


def _mlp_shapes(channels: int, hidden: int) -> list[Shape]:
    return [(POSITIONS, channels), (POSITIONS, hidden), (POSITIONS, hidden), (POSITIONS, channels)]


def _mlp_weights(channels: int, hidden: int) -> list[Shape]:
    return [(hidden, channels), (hidden, channels), (channels, hidden)]


def _copies(itemsize: int, *weights: Shape) -> list[Shape]:
    """The shapes of the copies that there have to be of some of the weights."""
    return [shape[::-1] if _turned(shape) else shape for shape in weights if itemsize < 4 or _turned(shape)]


def _turned(weight: Shape) -> bool:
    return math.prod(weight) <= TURNED_ELEMENTS


def _taken(
    workspace: Workspace | None, weights: list[mx.array], own: list[Shape], workers: int
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """The weights (C, O) in float32, and each worker's arrays."""
    mx.eval(*weights)
    itemsize = weights[0].dtype.size
    copies, scratch = (workspace or Workspace()).share_out(
        workers, own, _copies(itemsize, *(tuple(w.shape) for w in weights))
    )
    free, matrices = iter(copies), []
    for weight in weights:
        matrix = numbers(weight).T
        if _turned(weight.shape):
            matrix = widen(matrix, next(free))
        elif itemsize < 4:
            matrix = widen(matrix.T, next(free)).T
        matrices.append(matrix)
    return matrices, scratch


def _by_tiles(
    x: mx.array, multiply: Multiply, outputs: int, region: Region, scratch: Sequence[Sequence[np.ndarray]]
) -> mx.array:
    """What `multiply` makes of the tiles of x."""
    mx.eval(x)
    source = numbers(x)
    out = mx.zeros((*x.shape[:-1], outputs))
    mx.eval(out)
    result = np.array(out, copy=False)

    def work(tiles: Sequence[Tile], arrays: Sequence[np.ndarray]) -> None:
        given = arrays[0].reshape(SIDE, SIDE, -1)
        for tile in tiles:
            part = given[tile.place]
            if part.size < given.size:
                given[...] = 0
            widen(source[tile.frame][tile.source], part)
            made = multiply(arrays).reshape(SIDE, SIDE, -1)
            result[tile.frame][tile.source] = made[tile.place]

    tiles = _tiles(region, x.shape[0])
    share(work, tiles, scratch[: len(tiles)])
    # Rounded by whoever evaluates it, when what went in is gone.
    return out.astype(x.dtype)


def _tiles(region: Region, batch: int) -> list[Tile]:
    frames = np.ndindex(batch, region.time.length)
    places = list(product(_cuts(region.height), _cuts(region.width)))
    return [
        Tile((entry, frame), (rows[0], columns[0]), (rows[1], columns[1]))
        for entry, frame in frames
        for rows, columns in places
    ]


def _cuts(span: Span) -> list[tuple[slice, slice]]:
    """The parts of a span that lie in one tile each: where in the span, and where in the tile."""
    found = []
    for start in range(span.start - span.start % SIDE, span.stop, SIDE):
        first, last = max(start, span.start), min(start + SIDE, span.stop)
        found.append((slice(first - span.start, last - span.start), slice(first - start, last - start)))
    return found
