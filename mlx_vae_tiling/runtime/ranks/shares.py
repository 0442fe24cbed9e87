"""Who computes what: windows for several machines, even by counted work, within the memory of each.

The output is cut along time, height and width into as many boxes as there are ranks, so that the most that
one of them has to compute, halos included, is as little as possible. Boxes that cover all frames are bands:
their frames are complete together, and nobody keeps any. Ranges of frames come one after the other, so that
those of later ranges wait on a disk; they are taken only where they save work for it.

A box that does not fit into its rank's memory becomes several windows, which repeat more work; the rank's
box then shrinks until all are busy for as long. What fits in no window leaves a rank without work.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import numpy as np

from mlx_vae_tiling.runtime.planning.cost import CostModel, Part
from mlx_vae_tiling.runtime.planning.grids import choose_parts, fits, part_around
from mlx_vae_tiling.runtime.ranks.division import Division, division_of
from mlx_vae_tiling.runtime.ranks.waiting import Room
from mlx_vae_tiling.vae.regions import Region
from mlx_vae_tiling.vae.schedule import regions_of

Grid = tuple[int, int, int]
"""In how many pieces time, height and width are cut."""

CUTS_PER_LATENT = 4
"""Between latents alone, bands of a small frame could not be even."""

KEPT = 1.05
"""Frames that are kept on a disk until it is their turn cost as much as so much more work."""

EVEN = 1.05
"""The most work of a rank over the mean, at which a division is not improved any more."""

ROUNDS, HALVINGS = 6, 18
"""Bounds of the search: boxes for ranks that need several windows; the work of a box."""


def divide(
    model: CostModel,
    wanted: Region,
    budgets: Sequence[int],
    halo: int | None = None,
    room: Room | None = None,
) -> Division:
    """Divides a decode over ranks.

    Args:
        model: What it costs.
        wanted: The region of the output.
        budgets: The memory of each rank in bytes.
        halo: As `plan_decode`'s `tiling`: how many latents windows see around them; None for all.
        room: What of rank 0's memory is for frames that wait; None for nothing.

    Raises:
        ValueError: If no rank has the memory for any window.
    """
    work = _Work(model, wanted, halo)
    best, price = None, math.inf
    for grid in sorted(_grids(len(budgets)), key=work.estimate):
        if best is not None and work.estimate(grid) >= price:
            break
        waiting = room.nbytes(grid[0]) if room is not None else 0
        left = [budgets[0] - waiting, *budgets[1:]]
        able = [work.has_window(budget) for budget in left]
        # Cut along two axes, boxes cannot be of different sizes.
        if left[0] < 0 or not (all(able) or max(grid) == len(budgets)):
            continue
        found = _divided(work, grid, left, able)
        if found is not None and (cost := found.most * (1 if found.together else KEPT)) < price:
            best, price = found, cost
    if best is None:
        raise ValueError(
            f"no window fits in the memory of any rank, of which the largest has {max(budgets)} bytes: "
            "raise the memory limit"
        )
    return best


def assign(
    model: CostModel, parts: Sequence[Part], done: Sequence[int], budgets: Sequence[int]
) -> tuple[int, ...]:
    """Gives parts that an earlier run has begun to the ranks there are now: the owner of each.

    Args:
        model: What the decode costs.
        parts: All of them.
        done: Finished frames of each.
        budgets: The memory of each rank in bytes.

    Raises:
        ValueError: If a part fits in the memory of no rank.
    """
    left = [
        model.operations(part) * (1 - finished / part.pixels.time.length)
        for part, finished in zip(parts, done, strict=True)
    ]
    owners, busy = [0] * len(parts), [0.0] * len(budgets)
    for number in sorted(range(len(parts)), key=lambda number: -left[number]):
        able = [rank for rank, budget in enumerate(budgets) if fits(model, parts[number], budget)]
        if not able:
            raise ValueError(
                f"a window that was begun fits in the memory of no rank, of which the largest has "
                f"{max(budgets)} bytes: raise the memory limit"
            )
        owners[number] = min(able, key=lambda rank: busy[rank])
        busy[owners[number]] += left[number]
    return tuple(owners)


class _Work:
    """The work of boxes: of each step, the product of its lengths along the three axes."""

    def __init__(self, model: CostModel, wanted: Region, halo: int | None):
        self.model, self.wanted, self.halo = model, wanted, halo
        self._operations = np.array([step.operations for step in model.steps], float)
        self._lengths = lru_cache(maxsize=None)(self._count)
        self.estimate = lru_cache(maxsize=None)(self._estimate)

    def has_window(self, budget: int) -> bool:
        """Whether a rank has the memory for any window: for that of a latent in the middle."""
        scale, middle = self.model.decoder.config.spatial_scale, [self.wanted.time]
        for span in self.wanted[1:]:
            start = max(span.start, (span.start + span.stop) // 2 // scale * scale)
            middle.append(span._replace(start=start, stop=min(start + scale, span.stop)))
        return fits(self.model, part_around(self.model, Region(*middle), self.halo), budget)

    def boxes(self, grid: Grid, weights: Sequence[float]) -> list[Region | None]:
        """The output in boxes, the weights along the one axis that is cut, or all alike."""
        spans = []
        for axis, count in enumerate(grid):
            along = weights if count == len(weights) else [1.0] * count
            spans.append(self._cuts(axis, along))
        found: list[Region | None] = []
        for box in product(*spans):
            span = [
                whole._replace(start=start, stop=stop)
                for whole, (start, stop) in zip(self.wanted, box, strict=True)
            ]
            found.append(Region(*span) if all(s.length for s in span) else None)
        return found

    def _estimate(self, grid: Grid) -> float:
        """The most work of a box, where memory is plenty, at its price."""
        boxes = self.boxes(grid, [1.0] * math.prod(grid))
        most = max(self._of(box) for box in boxes if box is not None)
        return most * (1 if grid[0] == 1 else KEPT)

    def _of(self, box: Region) -> float:
        lengths = [self._lengths(axis, span.start, span.stop) for axis, span in enumerate(box)]
        return float(self._operations @ math.prod(lengths[1:], start=lengths[0]))

    def _count(self, axis: int, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """How much of an axis each step computes for a span of the output."""
        spans = list(self.wanted)
        spans[axis] = spans[axis]._replace(start=start, stop=stop)
        part = part_around(self.model, Region(*spans), self.halo)
        regions = regions_of(self.model.steps, part.inside)
        return np.array([region[axis].length for region in regions], float)

    def _cuts(self, axis: int, weights: Sequence[float]) -> list[tuple[int, int]]:
        """An axis in runs of which none takes more than its weight's share of a work that is the least."""
        whole = self.wanted[axis]
        if len(weights) == 1:
            return [(whole.start, whole.stop)]
        config = self.model.decoder.config
        scale = config.temporal_scale if axis == 0 else config.spatial_scale
        step, first = max(1, scale // CUTS_PER_LATENT), 1 if axis == 0 else 0
        inner = range(whole.start + (first - whole.start) % step, whole.stop, step)
        places = sorted({whole.start, *inner, whole.stop})

        def work(start: int, stop: int) -> float:
            spans = list(self.wanted)
            spans[axis] = whole._replace(start=places[start], stop=places[stop])
            return self._of(Region(*spans))

        def run(limit: float) -> list[int]:
            ends = [0]
            for weight in weights:
                later = range(ends[-1] + 1, len(places))
                start, most = ends[-1], limit * weight
                ends.append(start + bisect_right(later, most, key=lambda stop: work(start, stop)))
            return ends

        last = len(places) - 1
        everything = work(0, last)
        low, high = everything / sum(weights), everything / max(weights)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if run(middle)[-1] == last else (middle, high)
        return [(places[start], places[stop]) for start, stop in pairwise(run(high))]


def _grids(ranks: int) -> Iterator[Grid]:
    for time, height in product(range(1, ranks + 1), repeat=2):
        if ranks % (time * height) == 0:
            yield time, height, ranks // (time * height)


def _divided(work: _Work, grid: Grid, budgets: Sequence[int], able: Sequence[bool]) -> Division | None:
    """Boxes in windows that fit, as even as they become; None if a box fits in no windows."""
    weights, best = [float(one) for one in able], None
    for _ in range(ROUNDS):
        if not any(weights):
            break
        boxes = work.boxes(grid, weights)
        shares: list[tuple[Part, ...]] = []
        for rank, (box, budget) in enumerate(zip(boxes, budgets, strict=True)):
            share = () if box is None else choose_parts(work.model, box, budget, work.halo)
            if not all(fits(work.model, part, budget) for part in share):
                weights[rank], share = 0.0, ()
            shares.append(share)
        owners = [rank for rank, share in enumerate(shares) for _ in share]
        parts = [part for share in shares for part in share]
        found = division_of(work.model, parts, owners, len(budgets))
        if all(share or box is None for share, box in zip(shares, boxes, strict=True)):
            best = found if best is None or found.most < best.most else best
            if max(map(len, shares)) == 1 or found.unevenness <= EVEN - 1:
                break
        if math.prod(grid) != max(grid):
            break
        for rank, box in enumerate(boxes):
            if shares[rank] and box is not None:
                once = work.model.operations(part_around(work.model, box, work.halo))
                weights[rank] = once / found.operations[rank]
    return best
