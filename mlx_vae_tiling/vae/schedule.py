"""When each step of a decoder computes which frames, and how long they are held: integers only.

A decoder is a list of steps, of which each reads earlier ones through needs. `regions_of` runs the needs
backwards from the pixels; `schedule` runs forwards and says what happens, event by event. The planner adds
the events up, the runner carries them out: neither knows more than they say.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

from mlx_vae_tiling.arguments import require
from mlx_vae_tiling.vae.regions import Need, Region, Span

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_vae_tiling.vae.backend import Taken, Where


class Read(NamedTuple):
    """What a step reads: an earlier step, by its number, and which positions of it."""

    producer: int
    need: Need


class Step(NamedTuple):
    """A node of a decoder. The first of a list reads no step but the latents.

    Attributes:
        compute: Turns what is read, in the order of `reads`, and where that is, into the frames asked for.
        taken: The bytes that `compute` takes beside what is held before it, its result included.
        reads: What it reads; the first is its main input, which is at most as far upsampled as itself.
        channels: Of its output.
        operations: Multiplications and additions per position of its output.
        kernel: Channels in and out, where it is a 3x3x3 convolution, which comes in several forms.
        repeated: Multiplications and additions per position of its main input, anew for every chunk.
    """

    compute: Callable[[Sequence[mx.array], Where], mx.array]
    taken: Callable[[Where], Taken]
    reads: tuple[Read, ...]
    channels: int
    operations: int = 0
    kernel: tuple[int, int] | None = None
    repeated: int = 0


class Compute(NamedTuple):
    """Frames start to stop - 1 of a step are computed from those of its producers, and held."""

    step: int
    start: int
    stop: int


class Forget(NamedTuple):
    """Frames before `before` of a step are seen by no later one."""

    step: int
    before: int


class Deliver(NamedTuple):
    """All that is held of the last step is handed out."""

    step: int


Event = Compute | Forget | Deliver


@dataclass
class Pace:
    """How much a stream takes in at a time; may be changed while the stream runs.

    Args:
        latent_frames: Latent frames per step.
        max_chunk_frames: Bounds the frames of a chunk in any layer below what a step gives.
        check: Called before every chunk; what it raises ends the stream.
    """

    latent_frames: int = 1
    max_chunk_frames: int | None = None
    check: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        for name in ("latent_frames", "max_chunk_frames"):
            value = getattr(self, name)
            require(name, value, "a whole number", Integral, *([None] if name == "max_chunk_frames" else []))
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
            self.max_chunk_frames *= 2

    def halve(self, scale: int) -> None:
        """Halves the chunks of the last level, whose frames per latent frame are `scale`."""
        self.max_chunk_frames = max(1, self.limit(scale) // 2)
        self.latent_frames = min(self.latent_frames, self.max_chunk_frames)


class HeldLengths:
    """What a step holds, as numbers: the lengths of the pieces in `stream.HeldFrames`, from `start` on.

    Frames that are joined, and those that stay of a piece, are there twice for a moment.
    """

    def __init__(self, start: int):
        self.start = start
        self.pieces: list[int] = []

    @property
    def frames(self) -> int:
        return sum(self.pieces)

    def add(self, frames: int) -> None:
        self.pieces.append(frames)

    def join(self) -> int:
        """Makes one piece of all; returns how many frames are copied."""
        if len(self.pieces) < 2:
            return 0
        self.pieces = [self.frames]
        return self.frames

    def forget(self, before: int) -> int:
        """Drops the frames before `before`; returns how many are copied."""
        while self.pieces and before > self.start:
            surplus = min(before - self.start, self.pieces[0])
            self.start += surplus
            if surplus < self.pieces[0]:
                self.pieces[0] -= surplus
                return self.pieces[0]
            del self.pieces[0]
        return 0

    def deliver(self) -> None:
        """Hands out all frames."""
        self.pieces = []


def regions_of(steps: Sequence[Step], output: Region) -> list[Region]:
    """What each step has to compute for a region of the last one's output."""
    axes = (spans_of(steps, axis, span) for axis, span in enumerate(output))
    return [Region(*spans) for spans in zip(*axes, strict=True)]


def spans_of(steps: Sequence[Step], axis: int, output: Span) -> list[Span]:
    """As `regions_of`, along one axis (0 is time): none depends on another."""
    wanted: list[Span | None] = [None] * len(steps)
    wanted[-1] = output
    for number in range(len(steps) - 1, 0, -1):
        span = wanted[number]
        assert span is not None, f"step {number} is read by no later one"
        for producer, need in steps[number].reads:
            before, other = need.along(axis, span), wanted[producer]
            wanted[producer] = before if other is None else other.joined(before)
    return [span for span in wanted if span is not None]


def schedule(steps: Sequence[Step], times: Sequence[Span], pace: Pace) -> Iterator[Event]:
    """Says what happens in a decode, in order.

    Whatever is furthest down and can compute something does so next; only when nothing can are latents
    taken in. A chunk has at most as many frames as the pace allows at the level of its main input, times
    the step's own stride, and less where its producers have less.

    Args:
        steps: The decoder.
        times: The frames that each step has to compute.
        pace: Read anew for every chunk.

    Yields:
        Each `Compute`, followed by a `Forget` of every producer of which fewer frames are needed from then
        on, and, if it is the last step's, by a `Deliver`.
    """
    readers, scales = readers_of(steps), frames_per_latent(steps)
    made, held = ([span.start for span in times] for _ in range(2))

    def ready(number: int) -> int:
        """The frame up to which a step can compute now."""
        start, (_, stop, size) = made[number], times[number]
        reads = steps[number].reads
        if not reads:
            return min(stop, start + pace.latent_frames)
        scale = scales[reads[0].producer]
        stop = min(stop, start + pace.limit(scale) * scales[number] // scale)
        for producer, need in reads:
            ends = [_seen(need, n, size).stop for n in range(start, stop)]
            stop = start + bisect_right(ends, made[producer])
        return stop

    def first_needed(reader: int, need: Need, producer: int) -> int:
        start, (_, stop, size) = made[reader], times[reader]
        return times[producer].stop if start == stop else _seen(need, start, size).start

    number = 0
    while made[-1] < times[-1].stop:
        while (stop := ready(number)) <= made[number]:
            number -= 1
        if pace.check is not None:
            pace.check()
        yield Compute(number, made[number], stop)
        made[number] = stop
        for producer in sorted({read.producer for read in steps[number].reads}):
            before = min(first_needed(reader, need, producer) for reader, need in readers[producer])
            if before > held[producer]:
                held[producer] = before
                yield Forget(producer, before)
        if not readers[number]:
            yield Deliver(number)
        # Nothing but its readers can have become ready.
        number = max((reader for reader, _ in readers[number]), default=number)


@lru_cache(maxsize=2**14)
def _seen(need: Need, frame: int, size: int) -> Span:
    """The frames that one of so many needs: steps of the same kind ask for the same, again and again."""
    return need.along(0, Span(frame, frame + 1, size))


def readers_of(steps: Sequence[Step]) -> list[list[Read]]:
    """Of each step, who reads it, and through which need."""
    readers: list[list[Read]] = [[] for _ in steps]
    for number, step in enumerate(steps):
        for producer, need in step.reads:
            readers[producer].append(Read(number, need))
    return readers


def frames_per_latent(steps: Sequence[Step]) -> list[int]:
    """Of each step, how many frames of its output there are per latent frame."""
    scales: list[int] = []
    for step in steps:
        scales.append(scales[step.reads[0].producer] * step.reads[0].need.stride[0] if step.reads else 1)
    return scales
