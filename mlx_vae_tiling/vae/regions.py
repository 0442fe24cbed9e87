"""Where a decode happens: spans of positions, regions of a level, windows of the output, and needs.

A need says which positions of its input an output depends on. It pads nothing: beyond the borders of the
video there are no positions, and whoever computes there pads, shifts or replicates as its operator asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import NamedTuple

Slice = slice

Stride = tuple[int, int, int]
"""Positions of the output per position of the input: time, height, width."""

Reach = tuple[int, int]
"""How many frames before and after its own a convolution sees."""

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

    @property
    def slice(self) -> Slice:
        return Slice(self.start, self.stop)

    def inside(self, outer: Span) -> Slice:
        """This span as a slice of an array that holds `outer`."""
        return Slice(self.start - outer.start, self.stop - outer.start)

    def joined(self, other: Span) -> Span:
        """The shortest span that holds both."""
        return Span(min(self.start, other.start), max(self.stop, other.stop), self.size)


class Region(NamedTuple):
    """A box of one level of the decoder."""

    time: Span
    height: Span
    width: Span

    @property
    def volume(self) -> int:
        return self.time.length * self.area

    @property
    def area(self) -> int:
        """Positions of one frame."""
        return self.height.length * self.width.length

    @property
    def window(self) -> Window:
        """The same as slices."""
        return Window(*(span.slice for span in self))

    def over(self, start: int, stop: int) -> Region:
        """The same rows and columns of the frames start to stop - 1."""
        return self._replace(time=self.time._replace(start=start, stop=stop))


class Need:
    """Which positions of its input an output depends on, along each axis (0 is time)."""

    def along(self, axis: int, span: Span) -> Span:
        """The input's span that a span of the output needs."""
        raise NotImplementedError

    def before(self, region: Region) -> Region:
        """The input's region that a region of the output needs."""
        return Region(*(self.along(axis, span) for axis, span in enumerate(region)))

    @property
    def stride(self) -> Stride:
        return (1, 1, 1)


@dataclass(frozen=True)
class Same(Need):
    """The same position: skips, contexts."""

    def along(self, axis: int, span: Span) -> Span:
        return span


@dataclass(frozen=True)
class Convolution(Need):
    """The neighbours that a kernel of three positions sees; in time as far as `reach` says."""

    reach: Reach = CENTRED

    def along(self, axis: int, span: Span) -> Span:
        before, after = self.reach if axis == 0 else CENTRED
        return Span(max(span.start - before, 0), min(span.stop + after, span.size), span.size)


@dataclass(frozen=True)
class Upsampling(Need):
    """The position that becomes `factors` positions.

    Attributes:
        factors: Along time, height and width.
        drops_first: Whether the first frame becomes one only, the last of its `factors[0]`.
    """

    factors: Stride
    drops_first: bool = True

    def along(self, axis: int, span: Span) -> Span:
        factor, dropped = self.factors[axis], self._dropped(axis)
        start, stop = (span.start + dropped) // factor, (span.stop - 1 + dropped) // factor + 1
        return Span(start, stop, (span.size + dropped) // factor)

    @property
    def stride(self) -> Stride:
        return self.factors

    def slices(self, coarse: Region, fine: Region) -> tuple[Slice, Slice, Slice]:
        """Where `fine` lies in all that `coarse` becomes."""
        time, height, width = (
            Slice(after.start - origin, after.stop - origin)
            for after, origin in (
                (after, before.start * factor - self._dropped(axis))
                for axis, (before, after, factor) in enumerate(zip(coarse, fine, self.factors, strict=True))
            )
        )
        return time, height, width

    def _dropped(self, axis: int) -> int:
        return self.factors[0] - 1 if self.drops_first and axis == 0 else 0


def window_start(position: int, kernel: int, size: int) -> int:
    """Where the window of a position starts, on an axis at least as long as the kernel."""
    return min(max(position - kernel // 2, 0), size - kernel)


@dataclass(frozen=True)
class Attention(Need):
    """A neighbourhood of `kernel` positions around its own, shifted inward at the borders."""

    kernel: Stride

    def along(self, axis: int, span: Span) -> Span:
        kernel = min(self.kernel[axis], span.size)
        first, last = (window_start(n, kernel, span.size) for n in (span.start, span.stop - 1))
        return Span(first, last + kernel, span.size)


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


def as_window(window: Window | None) -> Window:
    """The window; all of the output if there is none.

    Raises:
        TypeError: If it is something else.
    """
    if window is None or isinstance(window, Window):
        return window or Window()
    raise TypeError(
        f"window must be a Window or None, got a {type(window).__name__}; Window(frames=slice(0, 9))"
    )


def _resolve(name: str, wanted: slice | None, size: int) -> Span:
    if wanted is None:
        return Span(0, size, size)
    if not isinstance(wanted, slice):
        raise TypeError(f"window {name} must be a slice or None, got {wanted!r}")
    try:
        start = 0 if wanted.start is None else index(wanted.start)
        stop = size if wanted.stop is None else index(wanted.stop)
    except TypeError as error:
        raise TypeError(f"window {name} must be a slice of integers, got {wanted}") from error
    if wanted.step not in (None, 1) or not 0 <= start < stop <= size:
        raise ValueError(f"window {name} must be a non-empty slice inside 0:{size} of step 1, got {wanted}")
    return Span(start, stop, size)
