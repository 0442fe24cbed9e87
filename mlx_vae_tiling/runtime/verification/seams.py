"""Where the seams of an approximate decode are: pixels and frames in which more than one tile has a part."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.verification.compare import Mask
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.tiling.plan import plan_tiles
from mlx_vae_tiling.vae.regions import Span

Bounds = tuple[int, int]


class Seams(NamedTuple):
    """Seams along each axis of the output, as (first, end) in frames, rows and columns.

    Args:
        frames, rows, columns: Of blended tiles, where they overlap. Where they only meet, as windows do: a
            latent to each side of the cut.
        size: (frames, height, width) of the output.
    """

    frames: tuple[Bounds, ...]
    rows: tuple[Bounds, ...]
    columns: tuple[Bounds, ...]
    size: tuple[int, int, int]

    def __bool__(self) -> bool:
        return bool(self.frames or self.rows or self.columns)

    @property
    def share(self) -> float:
        """Of the pixels of all frames."""
        beside = 1.0
        for bounds, size in zip(self[:3], self.size, strict=True):
            beside *= 1 - _mask(bounds, size).mean()
        return 1 - beside

    def of_frame(self, index: int) -> Mask:
        """(height, width): where the seams of a frame are, which is everywhere in one between two tiles."""
        _, height, width = self.size
        if any(start <= index < stop for start, stop in self.frames):
            return np.ones((height, width), bool)
        rows, columns = _mask(self.rows, height), _mask(self.columns, width)
        return rows[:, None] | columns


def seams_of(plan: DecodePlan) -> Seams:
    """The seams of what a plan decodes: none of an exact one."""
    output, size = plan.output, (plan.frames, *plan.size)
    if isinstance(plan.tiling, TilingConfig):
        time, space = plan.config.temporal_scale, plan.config.spatial_scale
        tiles = plan_tiles(plan.latent_shape, plan.tiling, space, time)
        frames, rows, columns = (
            _overlaps([tile.output for tile in axis], scale)
            for axis, scale in zip(tiles, (time, space, space), strict=True)
        )
        return Seams(frames, rows, columns, size)
    if all(part.exact for part in plan.parts):
        return Seams((), (), (), size)
    rows = _cuts((part.pixels.height for part in plan.parts), output.height, plan.config.spatial_scale)
    columns = _cuts((part.pixels.width for part in plan.parts), output.width, plan.config.spatial_scale)
    return Seams((), rows, columns, size)


def _overlaps(tiles: list[slice], scale: int) -> tuple[Bounds, ...]:
    """Of tiles in order."""
    size = tiles[-1].stop
    return tuple(
        _around(before.stop, scale, size) if after.start == before.stop else (after.start, before.stop)
        for before, after in pairwise(tiles)
    )


def _cuts(spans: Iterable[Span], whole: Span, scale: int) -> tuple[Bounds, ...]:
    """Around the borders between windows, counted from the start of the output."""
    starts = sorted({span.start for span in spans} - {whole.start})
    return tuple(_around(start - whole.start, scale, whole.length) for start in starts)


def _around(cut: int, reach: int, size: int) -> Bounds:
    return max(cut - reach, 0), min(cut + reach, size)


def _mask(bounds: Iterable[Bounds], size: int) -> Mask:
    mask = np.zeros(size, bool)
    for start, stop in bounds:
        mask[start:stop] = True
    return mask
