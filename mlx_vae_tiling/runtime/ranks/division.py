"""A division of a decode over ranks: its parts, and who decodes which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_vae_tiling.runtime.planning.cost import CostModel, Part
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.regions import Region, Window


@dataclass(frozen=True)
class Division:
    """The parts of a decode, and the ranks that decode them.

    Attributes:
        parts: All of them; together they are the output.
        owners: Of each part, the rank that decodes it.
        operations: Of each rank, the multiplications and additions of all its parts.
    """

    parts: tuple[Part, ...]
    owners: tuple[int, ...]
    operations: tuple[int, ...]

    @property
    def together(self) -> bool:
        """Whether all frames are complete at the same time: each rank has one window of all of them."""
        times = {part.pixels.time for part in self.parts}
        return len(times) == 1 and len(set(self.owners)) == len(self.owners)

    @property
    def most(self) -> int:
        """Operations of the rank that has most."""
        return max(self.operations)

    @property
    def unevenness(self) -> float:
        """The most work of a rank over the mean of those that have any, less one."""
        busy = [count for count in self.operations if count]
        return max(busy) * len(busy) / sum(busy) - 1

    def of(self, rank: int) -> list[int]:
        """The numbers of a rank's parts."""
        return [number for number, owner in enumerate(self.owners) if owner == rank]

    def windows(self, rank: int) -> list[Window]:
        """What a rank decodes one after the other."""
        return [self.parts[number].pixels.window for number in self.of(rank)]

    def __str__(self) -> str:
        """A line for each rank."""
        total, lines = sum(self.operations), []
        for rank, operations in enumerate(self.operations):
            boxes = [_box_text(self.parts[number].pixels) for number in self.of(rank)]
            share = f"{operations / 1e12:.3g} TFLOP, {operations / total:.0%}: " if boxes else ""
            lines.append(f"rank {rank}   {share}{'; '.join(boxes) or 'no work'}")
        return "\n".join(lines)


def division_of(model: CostModel, parts: Sequence[Part], owners: Sequence[int], ranks: int) -> Division:
    """The division of these parts to these owners, counted."""
    operations = [0] * ranks
    for part, owner in zip(parts, owners, strict=True):
        operations[owner] += model.operations(part)
    return Division(tuple(parts), tuple(owners), tuple(operations))


def halo_of(tiling: TilingConfig | int | None) -> int | None:
    """How many latents windows see around them; None for all.

    Raises:
        ValueError: If tiles are blended, which one machine decodes.
    """
    if isinstance(tiling, TilingConfig):
        raise ValueError("blended tiles are decoded by one machine; several take windows: tiling=None")
    return tiling


def _box_text(box: Region) -> str:
    whole = [
        f"{name} {span.start}:{span.stop}"
        for name, span in zip(("frames", "rows", "columns"), box, strict=True)
        if span.length < span.size
    ]
    return ", ".join(whole) or "everything"
