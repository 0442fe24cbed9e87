"""Needs of decoders that pad, lengthen or trim their clip, and of two operators in one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_vae_tiling.vae.regions import Need, Span, Stride


@dataclass(frozen=True)
class Chained(Need):
    """What `later` needs, and of that what `earlier` needs: two operators in one step."""

    later: Need
    earlier: Need

    def along(self, axis: int, span: Span) -> Span:
        return self.earlier.along(axis, self.later.along(axis, span))

    @property
    def stride(self) -> Stride:
        t, h, w = (math.prod(pair) for pair in zip(self.later.stride, self.earlier.stride, strict=True))
        return t, h, w


@dataclass(frozen=True)
class Appended(Need):
    """The same position of an input that has `frames` more frames at its end."""

    frames: int

    def along(self, axis: int, span: Span) -> Span:
        return span._replace(size=span.size + self.frames) if axis == 0 else span


@dataclass(frozen=True)
class Trimmed(Need):
    """The same position of an input of which the first `frames` frames are dropped."""

    frames: int

    def along(self, axis: int, span: Span) -> Span:
        return Span(*(n + self.frames for n in span)) if axis == 0 else span


@dataclass(frozen=True)
class Padded(Need):
    """The same position of a clip that was made larger where it was smaller than `floor`.

    Attributes:
        floor: Least sizes of the clip.
        scale: Positions per latent. In space as many latents are added before as behind, the odd one
            behind; in time all of them behind.
    """

    floor: Stride
    scale: Stride

    def added(self, axis: int, size: int) -> tuple[int, int]:
        """Positions before and behind a clip of this size."""
        lacking = max(self.floor[axis] - size, 0)
        before = 0 if axis == 0 else lacking // self.scale[axis] // 2 * self.scale[axis]
        return before, lacking - before

    def along(self, axis: int, span: Span) -> Span:
        before, behind = self.added(axis, span.size)
        return Span(span.start + before, span.stop + before, span.size + before + behind)
