"""Counted work of LTX-2.5's diffusion decoder: our plans beside the tiles that others cut for it.

    python tests/benchmarks/reference_tiles.py --latent-frames 16 --height 34 --width 60 --memory 32GB 16GB

Others run the first three stages on the whole video, and the last two on tiles that overlap and are blended:
what they make differs from the untiled decode. Tiles are cut on the grid of stage 4, whose cells are 2 frames
of 8x8 pixels; the last of them in time takes the ghost frames with it.

- diffusers 0.42.1: of `LTX2VideoDiffusionDecoderModel` the attributes `tile_sample_min_num_frames`,
  `tile_sample_min_height` and `tile_sample_min_width` are 80, 768 and 768, `tile_sample_stride_num_frames`,
  `tile_sample_stride_height` and `tile_sample_stride_width` 56, 704 and 704; a rest below the largest window
  joins the tile before it (`_tile_intervals`).
- The producer's `recommended_decode_tiling_config` (ltx-core): 40 frames and 160 pixels of overlap, which is
  how far stage 5 sees to one side, and of the tiles that fit into the memory by its own estimate those that
  hold fewest pixels in all.

Operations are those of our steps at each position, whoever computes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product

from mlx_vae_tiling import DiffusionDecoder, DiffusionDecoderConfig, plan_decode
from mlx_vae_tiling.runtime.planning.memory import parse_bytes
from mlx_vae_tiling.tiling import split_in_spatial
from mlx_vae_tiling.vae.schedule import Step

CONFIG = DiffusionDecoderConfig()
CELL = 2, 8, 8
LEAST_CELLS = 6
"""Into which every window of stages 4 and 5 fits along each axis."""

GHOST_CELLS = 8
DIFFUSERS_TILES, DIFFUSERS_STRIDES = (80, 768, 768), (56, 704, 704)
OVERLAP = 40, 160, 160
STAGE_5_COPIES = 5
"""Arrays as wide as stage 5 that the producer counts for its eager mode."""

Tiles = list[tuple[int, int]]
"""Along one axis: where each starts and stops, in cells."""


def diffusers_tiles(cells: Sequence[int]) -> list[Tiles]:
    """Its default tiles of a grid of stage 4, along each axis."""
    axes = []
    for length, pixels, step, scale in zip(cells, DIFFUSERS_TILES, DIFFUSERS_STRIDES, CELL, strict=True):
        size, stride = pixels // scale, step // scale
        starts = list(range(0, length, stride)) if length > size else [0]
        while len(starts) > 1 and length - starts[-1] < LEAST_CELLS:
            starts.pop()
        axes.append([*((start, start + size) for start in starts[:-1]), (starts[-1], length)])
    return axes


def producers_tiles(cells: Sequence[int], budget: int) -> list[Tiles] | None:
    """Those of ltx-core for a budget; None where it finds none."""
    _, rows, columns = (n * scale for n, scale in zip(cells, CELL, strict=True))
    frames = cells[0] * CELL[0] - 1
    features = (cells[0] + GHOST_CELLS) * cells[1] * cells[2] * CONFIG.stage_channels[3] * 2
    usable = budget - max(2 * CONFIG.parameters, 2**30) - 2**30 - features
    sizes = [
        range(2 * overlap, -(-length // step) * step + step, step)
        for length, overlap, step in zip((frames, rows, columns), OVERLAP, (8, 32, 32), strict=True)
    ]
    found = []
    for tile in product(*sizes):
        t, h, w = tile
        tokens = t * (h // CONFIG.patch_size) * (w // CONFIG.patch_size)
        taken = 2 * t * rows * columns * 3 * 2 + tokens * CONFIG.stage_channels[4] * 2 * STAGE_5_COPIES
        if taken <= usable:
            counts = (
                len(split_in_spatial(size, overlap, length).starts)
                for size, overlap, length in zip(tile, OVERLAP, (frames, rows, columns), strict=True)
            )
            n_t, n_h, n_w = counts
            found.append((n_t * n_h * n_w * t * h * w, -t * h * w, tile))
    if not found:
        return None
    axes = []
    for size, overlap, scale, length in zip(min(found)[2], OVERLAP, CELL, cells, strict=True):
        intervals = split_in_spatial(size // scale, overlap // scale, length)
        *first, (start, stop) = zip(intervals.starts, intervals.ends, strict=True)
        axes.append([*first, (min(start, stop - LEAST_CELLS), stop) if first else (start, stop)])
    return axes


def walked(
    steps: Sequence[Step], size: Sequence[int], drops: bool = True
) -> tuple[int, tuple[int, int, int]]:
    """Operations of steps, one after the other, and the size of what comes out.

    Args:
        steps: Of a stage, to its upsampling.
        size: Frames, rows and columns of what goes in.
        drops: Whether upsampling drops the first frame, as where the first frame of all is in it.
    """
    t, h, w = size
    operations = 0
    for step in steps:
        stride = step.reads[0].need.stride if step.reads else (1, 1, 1)
        t, h, w = t * stride[0] - (stride[0] - 1) * drops, h * stride[1], w * stride[2]
        operations += step.operations * t * h * w
    return operations, (t, h, w)


def split_steps() -> Iterator[list[Step]]:
    """The steps of the first three stages, of stage 4 and of stage 5."""
    decoder = DiffusionDecoder(CONFIG)
    steps, start = decoder.steps(decoder.options()), 0
    before = 2 + sum(2 * depth + 1 for depth in CONFIG.stage_depths[:3])
    for stop in (before, before + 2 * CONFIG.stage_depths[3] + 1, len(steps) - 1):
        yield steps[start:stop]
        start = stop


def tiled_operations(latents: Sequence[int], axes: list[Tiles]) -> int:
    """Of a decode that computes the first three stages of the whole video, the others by tiles."""
    early, fourth, fifth = split_steps()
    frames, *space = latents
    operations, (cells, *_) = walked(early, (frames + CONFIG.ghost_latent_frames, *space))
    for (start, stop), rows, columns in product(*axes):
        ghosts = GHOST_CELLS if stop == cells - GHOST_CELLS else 0
        size = stop - start + ghosts, rows[1] - rows[0], columns[1] - columns[0]
        work, (t, h, w) = walked(fourth, size, drops=start == 0)
        operations += work + walked(fifth, (t - CELL[0] * ghosts, h, w))[0]
    return operations


def print_row(name: str, budget: str, axes: list[Tiles] | None, operations: int, whole: float) -> None:
    tiles = "no tiles that fit"
    if axes is not None:
        counts = (str(len(axis)) for axis in axes)
        sizes = (
            f"{max(stop - start for start, stop in axis) * scale}"
            for axis, scale in zip(axes, CELL, strict=True)
        )
        tiles = f"{'x'.join(counts)} tiles of at most {'x'.join(sizes)}"
    print(f"| {name} | {budget} | {tiles} | {operations / 1e12:.0f} | {operations / whole:.2f} |")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent-frames", type=int, default=16)
    parser.add_argument("--height", type=int, default=34, help="in latents")
    parser.add_argument("--width", type=int, default=60, help="in latents")
    parser.add_argument("--memory", nargs="+", default=["32GB", "16GB"])
    arguments = parser.parse_args()
    latents = arguments.latent_frames, arguments.height, arguments.width
    plans = {
        budget: plan_decode(
            CONFIG, (1, CONFIG.latent_channels, *latents), memory_limit=budget, backend="metal"
        )
        for budget in arguments.memory
    }
    any_plan = next(iter(plans.values()))
    whole = any_plan.operations / any_plan.recompute
    cells = (8 * (latents[0] - 1) + 2) // CELL[0], 4 * latents[1], 4 * latents[2]
    print("| decode | budget | cut into | TFLOP | of the whole |\n|---|---|---|---|---|")
    for budget, plan in plans.items():
        windows = f"{len(plan.parts)} windows, peak {plan.peak_bytes / 1e9:.1f} GB"
        print(
            f"| this package | {budget} | {windows if plan.fits else 'nothing fits'} | "
            f"{plan.operations / 1e12:.0f} | {plan.recompute:.2f} |"
        )
        axes = producers_tiles(cells, parse_bytes(budget))
        work = tiled_operations(latents, axes) if axes else 0
        print_row("the producer's tiles", budget, axes, work, whole)
    axes = diffusers_tiles(cells)
    print_row("diffusers' default tiles", "-", axes, tiled_operations(latents, axes), whole)
    untiled: list[Tiles] = [[(0, length)] for length in cells]
    print_row("either, untiled", "-", untiled, tiled_operations(latents, untiled), whole)


if __name__ == "__main__":
    main()
