"""Where a decode happens: spans of positions, windows of the output, and frames in flight.

A layer is streamed by a generator over chunks (B, frames, height, width, channels). It knows
beforehand which region of its output is wanted, and from that which region of its input it will
receive; nothing else has to be said about borders, first frames or last frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

Reach = tuple[int, int]
"""How many positions before and after its own a convolution sees."""

CENTRED: Reach = (1, 1)
CAUSAL: Reach = (2, 0)


class Span(NamedTuple):
    """Positions start to stop - 1 of an axis that has `size` positions in the whole video."""

    start: int
    stop: int
    size: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def before_convolution(self, reach: Reach) -> Span:
        """The positions that a convolution needs: beyond the borders it pads."""
        return Span(max(self.start - reach[0], 0), min(self.stop + reach[1], self.size), self.size)

    def before_upsampling(self, factor: int, dropped: int) -> Span:
        """The positions whose `factor` copies, less the first `dropped` of all, cover this span."""
        start, stop = (self.start + dropped) // factor, (self.stop - 1 + dropped) // factor + 1
        return Span(start, stop, (self.size + dropped) // factor)

    def inside(self, outer: Span) -> slice:
        """This span as a slice of an array that holds `outer`."""
        return slice(self.start - outer.start, self.stop - outer.start)


class Region(NamedTuple):
    """A box of one level of the decoder."""

    time: Span
    height: Span
    width: Span

    def before_convolution(self, reach: Reach) -> Region:
        return Region(
            self.time.before_convolution(reach),
            self.height.before_convolution(CENTRED),
            self.width.before_convolution(CENTRED),
        )

    def before_upsampling(self, stride: tuple[int, int, int]) -> Region:
        t, h, w = stride
        return Region(
            self.time.before_upsampling(t, t - 1),
            self.height.before_upsampling(h, 0),
            self.width.before_upsampling(w, 0),
        )

    @property
    def volume(self) -> int:
        return self.time.length * self.height.length * self.width.length


@dataclass
class Pace:
    """How much a stream takes in at a time; may be changed while the stream runs.

    Args:
        latent_frames: Latent frames per step.
        max_chunk_frames: Bounds the frames of a chunk in any layer below what a step gives.
    """

    latent_frames: int = 1
    max_chunk_frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("latent_frames", "max_chunk_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def limit(self, scale: int) -> int:
        """Most frames of a chunk at a level of this many frames per latent frame."""
        return min(self.latent_frames * scale, self.max_chunk_frames or self.latent_frames * scale)

    def double(self, scale: int) -> None:
        """Doubles the chunks of the last level, whose frames per latent frame are `scale`."""
        if self.max_chunk_frames is None:
            self.latent_frames *= 2
        else:
            self.max_chunk_frames = 2 * self.max_chunk_frames if 2 * self.max_chunk_frames < scale else None

    def halve(self, scale: int) -> None:
        """Halves the chunks of the last level, whose frames per latent frame are `scale`."""
        if self.latent_frames > 1:
            self.latent_frames = (self.latent_frames + 1) // 2
        else:
            self.max_chunk_frames = max(1, (self.max_chunk_frames or scale) // 2)


@dataclass(frozen=True)
class Window:
    """A part of the output: slices of frames and pixels, with any values inside it.

    Args:
        frames: Slice of output frames; None for all.
        height: Slice of pixel rows; None for all.
        width: Slice of pixel columns; None for all.

    Example:
        >>> Window(frames=slice(24, 48), width=slice(0, 640))
        Window(frames=slice(24, 48, None), height=None, width=slice(0, 640, None))
    """

    frames: slice | None = None
    height: slice | None = None
    width: slice | None = None

    def region(self, frames: int, height: int, width: int) -> Region:
        """The window as a region of an output of this size.

        Raises:
            ValueError: If a slice is empty, has a step or reaches outside of the output.
        """
        return Region(
            _resolve("frames", self.frames, frames),
            _resolve("height", self.height, height),
            _resolve("width", self.width, width),
        )


def _resolve(name: str, wanted: slice | None, size: int) -> Span:
    if wanted is None:
        return Span(0, size, size)
    start = 0 if wanted.start is None else wanted.start
    stop = size if wanted.stop is None else wanted.stop
    if wanted.step not in (None, 1) or not 0 <= start < stop <= size:
        raise ValueError(f"window {name} must be a non-empty slice inside 0:{size} of step 1, got {wanted}")
    return Span(start, stop, size)


class FrameQueue:
    """The frames that a layer still needs of its input, as they arrive.

    Positions before the first or after the last frame of the video read as replicas of it.

    Args:
        source: Frames that will be appended, in order.
        output: Frames that the layer computes from them.
        reach: Frames before and after its own that one output frame sees.
        limit: Gives the most output frames that may be handed out at a time.

    Attributes:
        next: First output frame that was not handed out.
    """

    def __init__(self, source: Span, output: Span, reach: Reach, limit: Callable[[], int]):
        self._source, self._output, self._reach, self._limit = source, output, reach, limit
        self._frames: mx.array | None = None
        self._start = source.start
        self.next = output.start

    def append(self, frames: mx.array) -> None:
        held = [] if self._frames is None else [self._frames]
        self._frames = mx.concatenate([*held, frames], axis=1) if held else frames

    def ready(self) -> tuple[int, int] | None:
        """Takes the next output frames (start, stop) that can be computed, or None."""
        if self._frames is None:
            return None
        received = self._start + self._frames.shape[1]
        known = self._output.stop if received == self._source.stop else received - self._reach[1]
        start, stop = self.next, min(known, self._output.stop, self.next + self._limit())
        if stop <= start:
            return None
        self.next = stop
        return start, stop

    def frames(self, start: int, stop: int) -> mx.array:
        """The input frames start to stop - 1."""
        assert self._frames is not None
        return self._frames[:, start - self._start : stop - self._start]

    def window(self, start: int, stop: int) -> mx.array:
        """The input frames that output frames start to stop - 1 see."""
        first, last = start - self._reach[0], stop + self._reach[1]
        inner = self.frames(max(first, 0), min(last, self._source.size))
        before, after = max(-first, 0), max(last - self._source.size, 0)
        if not before and not after:
            return inner
        return mx.concatenate([inner[:, :1]] * before + [inner] + [inner[:, -1:]] * after, axis=1)

    def release(self, wanted: int | None = None) -> mx.array | None:
        """Forgets the frames that no later output sees.

        Args:
            wanted: First frame that is still asked for with `frames`.

        Returns:
            The frames that are kept, if any.
        """
        assert self._frames is not None
        done = self.next == self._output.stop
        first = self._source.stop if done else self.next - self._reach[0]
        surplus = (first if wanted is None else min(first, wanted)) - self._start
        if surplus >= self._frames.shape[1]:
            self._frames = None
        elif surplus > 0:
            # A slice would keep the whole chunk alive; gathering copies.
            self._frames = mx.take(self._frames, mx.arange(surplus, self._frames.shape[1]), axis=1)
            self._start += surplus
        return self._frames
