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

    def after(self, received: int) -> int:
        """Channels that they make."""
        return received

    def before(self, made: int) -> int:
        """Channels that they receive."""
        return made


@dataclass(frozen=True)
class ResBlockNarrowing:
    """`res_x_y`: one residual block that makes the channels fewer.

    Attributes:
        multiplier: What it divides them by.
        widths: Channels before and after it, where no whole number says it.
    """

    multiplier: int = 2
    widths: tuple[int, int] | None = None

    @classmethod
    def between(cls, received: int, made: int) -> ResBlockNarrowing:
        """The block that makes so many channels of those it receives."""
        return cls(1, (received, made)) if received % made else cls(received // made)

    def after(self, received: int) -> int:
        """Channels that it makes."""
        return self.widths[1] if self.widths else received // self.multiplier

    def before(self, made: int) -> int:
        """Channels that it receives."""
        return self.widths[0] if self.widths else made * self.multiplier


@dataclass(frozen=True)
class Upsample:
    """`compress_*`: depth-to-space by `stride`, with the channels divided by `multiplier`."""

    stride: Stride
    multiplier: int = 1
    residual: bool = False

    def after(self, received: int) -> int:
        """Channels that it makes."""
        return received // self.multiplier

    def before(self, made: int) -> int:
        """Channels that it receives."""
        return made * self.multiplier


Block = ResBlocks | ResBlockNarrowing | Upsample
