"""The blocks that decoders are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PaddingMode = Literal["zeros", "reflect"]
Stride = tuple[int, int, int]

STRIDES: dict[str, Stride] = {
    "compress_all": (2, 2, 2),
    "compress_time": (2, 1, 1),
    "compress_space": (1, 2, 2),
}


@dataclass(frozen=True)
class ResBlocks:
    """`res_x`: residual blocks of equal width."""

    num_layers: int
    inject_noise: bool = False


@dataclass(frozen=True)
class ResBlockNarrowing:
    """`res_x_y`: one residual block that divides the channels by `multiplier`."""

    multiplier: int = 2


@dataclass(frozen=True)
class Upsample:
    """`compress_*`: depth-to-space by `stride`, with the channels divided by `multiplier`."""

    stride: Stride
    multiplier: int = 1
    residual: bool = False


Block = ResBlocks | ResBlockNarrowing | Upsample
