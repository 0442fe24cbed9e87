"""The architecture of the tiny LTX decoders (TAEHV): `TinyDecoderConfig`, read from shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_vae_tiling.arguments import require

LEVELS = 3
"""Times that frames, height and width are doubled."""

GROUP_CHANNELS = 64
"""Channels of a group of the wide decoder's convolutions."""


@dataclass(frozen=True)
class TinyDecoderConfig:
    """The architecture of a tiny decoder of LTX latents; the defaults are `taeltx_2`'s and `taeltx2_3`'s.

    Two-dimensional convolutions, each block of which also sees the frame before.

    Args:
        widths: Channels of each level, coarsest first, and after the last one.
        blocks: Blocks of each level.
        wide: Whether blocks alternate 1x1 and grouped 3x3 convolutions, as those of `taeltx2_3_wide`.
        latent_channels: Channels of the latents.
        out_channels: Channels of the frames.
        patch_size: Side in pixels of the patch that one position of the last level becomes.

    Raises:
        ValueError: If there are not four widths.
    """

    widths: tuple[int, ...] = (256, 128, 64, 64)
    blocks: int = 3
    wide: bool = False
    latent_channels: int = 128
    out_channels: int = 3
    patch_size: int = 4

    def __post_init__(self) -> None:
        require("widths", self.widths, f"{LEVELS + 1} positive integers", tuple)
        for width in (*self.widths, self.blocks):
            require("widths and blocks", width, "positive integers", int)
        if len(self.widths) != LEVELS + 1 or min(self.widths) < 1:
            raise ValueError(f"widths must be {LEVELS + 1} positive integers, got {self.widths}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")

    @classmethod
    def from_shapes(cls, name_to_shape: Mapping[str, Sequence[int]]) -> TinyDecoderConfig:
        """From the shapes of the tensors, kernels as (O, H, W, I), under the names of the published files.

        Raises:
            ValueError: If they are not those of a tiny decoder of LTX latents.
        """
        shapes = {tuple(name.split(".")[1:]): shape for name, shape in name_to_shape.items()}
        levels: list[tuple[int, int]] = []
        blocks: list[int] = []
        count = 0
        for number in sorted({int(name[0]) for name in shapes if name and re.fullmatch(r"\d+", name[0])}):
            grown = shapes.get((str(number), "conv", "weight"))
            count += (str(number), "conv", "0", "weight") in shapes
            if grown:
                levels.append((grown[-1], grown[0] // grown[-1]))
                blocks.append(count)
                count = 0
        last = max((int(name[0]) for name in shapes if name and name[0].isdigit()), default=0)
        first, out = shapes.get(("1", "weight")), shapes.get((str(last), "weight"))
        if (
            first is None
            or out is None
            or [growth for _, growth in levels] != [2] * LEVELS
            or len(set(blocks)) != 1
        ):
            raise ValueError("these are not the tensors of a tiny decoder of LTX latents (taeltx)")
        return cls(
            widths=(*(width for width, _ in levels), out[-1]),
            blocks=blocks[0],
            wide=("3", "conv", "6", "weight") in shapes,
            latent_channels=first[-1],
            patch_size=math.isqrt(out[0] // 3),
        )

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent along height and width."""
        return self.patch_size * 2**LEVELS

    @property
    def temporal_scale(self) -> int:
        """Frames per latent: F latents give temporal_scale * (F - 1) + 1 frames."""
        return 2**LEVELS

    @property
    def receptive_field(self) -> tuple[float, float, float]:
        """How far one output depends on latents: in the past, and to either side in height and width."""
        convolutions = self.blocks * (2 if self.wide else 3)
        scales = [2**level for level in range(LEVELS)]
        time = sum(self.blocks / scale for scale in scales)
        space = 1 + sum(convolutions / scale + 1 / (2 * scale) for scale in scales) + 1 / 2**LEVELS
        return time, space, space

    def groups(self, width: int) -> int:
        """Groups of the wide decoder's 3x3 convolutions."""
        return max(1, width // GROUP_CHANNELS)

    @property
    def parameters(self) -> int:
        """Parameters of the decoder."""
        count = 9 * self.latent_channels * self.widths[0] + self.widths[0]
        for width, following in zip(self.widths[:-1], self.widths[1:], strict=True):
            if self.wide:
                grouped = 9 * width * width // self.groups(width)
                block = 3 * width * width + 2 * grouped + 4 * width
            else:
                block = 4 * 9 * width * width + 3 * width
            count += self.blocks * block + 2 * width * width + 9 * width * following
        patch = self.out_channels * self.patch_size**2
        return count + 9 * self.widths[-1] * patch + patch
