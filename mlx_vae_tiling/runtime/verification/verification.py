"""`Verification`: how far a video is from the exact decode, by frame and by place, and what it comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.verification.compare import Score, total
from mlx_vae_tiling.runtime.verification.seams import Seams

VISIBLE_DB = 40.0
"""PSNR below which a difference counts as visible: 2.6 levels of 255, root mean square."""

SEAM_DB = 3.0
"""By so much less than elsewhere, which is twice the squared error, seams count as seams."""


@dataclass(frozen=True)
class Verification:
    """How far a video is from the exact decode.

    Attributes:
        plan: Of the decode that was verified; of the exact one where a file was.
        compared_with: "exact", or the file.
        seams: Where the plan's tiles or windows meet.
        at_seams, elsewhere: Scores of each frame, of the pixels at the seams and of the others.
        squared_error: (height, width) float64: of each pixel, summed over channels and frames.
        peak_bytes: Measured peak of MLX's memory.
    """

    plan: DecodePlan
    compared_with: str
    seams: Seams
    at_seams: tuple[Score, ...]
    elsewhere: tuple[Score, ...]
    squared_error: npt.NDArray[np.float64]
    peak_bytes: int

    @cached_property
    def frames(self) -> tuple[Score, ...]:
        """The score of each frame."""
        return tuple(one + other for one, other in zip(self.at_seams, self.elsewhere, strict=True))

    @property
    def seam_total(self) -> Score:
        return total(self.at_seams)

    @property
    def elsewhere_total(self) -> Score:
        return total(self.elsewhere)

    @property
    def total(self) -> Score:
        return total(self.frames)

    @property
    def worst_frame(self) -> int:
        """The frame of the lowest PSNR at its seams, or of the lowest PSNR where there are none."""
        scores = self.at_seams if self.seam_total.values else self.frames
        return min(range(len(scores)), key=lambda i: (math.isnan(scores[i].psnr), scores[i].psnr))

    @property
    def seams_visible(self) -> bool:
        """Whether some frame has seams below `VISIBLE_DB` and by `SEAM_DB` below the rest of the video."""
        worst = self.at_seams[self.worst_frame]
        if not worst.values or not worst.psnr < VISIBLE_DB:
            return False
        return not self.elsewhere_total.psnr < worst.psnr + SEAM_DB

    @property
    def differs_visibly(self) -> bool:
        """Whether some frame is below `VISIBLE_DB`, at seams or elsewhere."""
        return self.seams_visible or any(score.psnr < VISIBLE_DB for score in self.frames)

    @property
    def rms(self) -> npt.NDArray[np.float64]:
        """(height, width): root mean square difference of each pixel over channels and frames, in levels."""
        return np.sqrt(self.squared_error / (3 * len(self.frames)))

    @property
    def verdict(self) -> str:
        """What it comes to, in one line."""
        count, largest = len(self.frames), self.total.largest
        if largest <= 1:
            what = "equal to rounding, no value differs by more than 1 of 255" if largest else "identical"
            return f"{what}: {count} frame{'' if count == 1 else 's'}{'' if self.seams else ', no seams'}"
        worst = self.worst_frame
        if not self.seam_total.values:
            told = f"{in_db(self.total.psnr)}, worst frame {worst} ({in_db(self.frames[worst].psnr)})"
            return f"{'visible differences' if self.differs_visibly else 'no visible difference'}: {told}"
        what = "no seams visible"
        if self.seams_visible:
            what = "seams visible"
        elif self.differs_visibly:
            what = "visible differences, at the seams no more than elsewhere"
        beside = self.elsewhere_total
        against = f" against {in_db(beside.psnr)} elsewhere" if beside.values else ", which are everywhere"
        told = f"worst frame {worst} ({in_db(self.at_seams[worst].psnr)})"
        return f"{what}: {in_db(self.seam_total.psnr)} at the seams{against}, {told}"

    def __str__(self) -> str:
        return self.verdict


def in_db(psnr: float) -> str:
    """A PSNR for people."""
    return "no difference" if math.isinf(psnr) else f"{psnr:.1f} dB"
