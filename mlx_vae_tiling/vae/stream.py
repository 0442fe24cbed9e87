"""Carries out a schedule: holds the frames that a decoder's steps still need, and computes the next ones.

The rule of lifetimes: nobody holds what was forgotten or handed out. Frames live in the stream's `held`
alone; what a step is given are views of them, which end with the step; what it returns belongs to it and is
a view of nothing. Therefore no name here outlives the event that needed it, frames that are kept beyond a
chunk are copied out of it, and a piece is gone from here before the consumer has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlx_vae_tiling.vae.backend import Backend, Where
from mlx_vae_tiling.vae.operations import cut
from mlx_vae_tiling.vae.options import Noise
from mlx_vae_tiling.vae.regions import Region
from mlx_vae_tiling.vae.schedule import Deliver, Event, Forget, Pace, Step, schedule


class HeldFrames:
    """Frames of one step from `start` on, in the pieces in which they arrived."""

    def __init__(self, start: int):
        self.start = start
        self.pieces: list[mx.array] = []

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def read(self, part: Region, whole: Region) -> mx.array:
        """A view of a region of the frames, which are joined and of the region `whole`."""
        frames = slice(part.time.start - self.start, part.time.stop - self.start)
        return self.pieces[0][:, frames, part.height.inside(whole.height), part.width.inside(whole.width)]

    def join(self) -> None:
        """Makes one piece of all."""
        if len(self.pieces) > 1:
            self.pieces = [mx.concatenate(self.pieces, axis=1)]

    def forget(self, before: int) -> None:
        """Drops the frames before `before`; what is left of a piece is a copy."""
        while self.pieces and before > self.start:
            frames = self.pieces[0].shape[1]
            surplus = min(before - self.start, frames)
            self.start += surplus
            first = self.pieces.pop(0)
            if surplus < frames:
                self.pieces.insert(0, cut(first, [slice(surplus, frames)]))
            del first

    def deliver(self) -> list[mx.array]:
        """Hands out all frames."""
        delivered, self.pieces = self.pieces, []
        return delivered


class Stream:
    """A decode under way.

    Args:
        steps: The decoder.
        regions: What each step has to compute.
        latents: What the first step reads.
        dtype: In which the steps compute.
        backend: What computes.
        noise: The noise of the video.

    Attributes:
        held: The frames that each step holds for later ones.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        regions: Sequence[Region],
        latents: mx.array,
        dtype: mx.Dtype,
        backend: Backend,
        noise: Noise | None = None,
    ):
        self.steps, self.regions, self._latents = steps, regions, latents
        self._dtype, self._backend, self._noise = dtype, backend, noise
        self.held = [HeldFrames(region.time.start) for region in regions]

    def run(self, pace: Pace) -> Iterator[mx.array]:
        """The frames of the last step, piece by piece, of which the backend may compute some ahead."""
        waiting: list[mx.array] = []
        for event in schedule(self.steps, [region.time for region in self.regions], pace):
            waiting += self.carry_out(event)
            if len(waiting) > self._backend.pieces_ahead:
                yield waiting.pop(0)
        while waiting:
            yield waiting.pop(0)

    def carry_out(self, event: Event) -> list[mx.array]:
        """Computes, forgets or delivers; returns what is delivered."""
        held = self.held[event.step]
        if isinstance(event, Deliver):
            return held.deliver()
        if isinstance(event, Forget):
            held.forget(event.before)
        else:
            output = self.regions[event.step].over(event.start, event.stop)
            held.pieces.append(self._computed(event.step, output))
        self._backend.settle(*held.pieces)
        return []

    def _computed(self, number: int, output: Region) -> mx.array:
        step = self.steps[number]
        inputs = tuple(need.before(output) for _, need in step.reads)
        where = Where(inputs, output, len(self._latents), self._dtype, self._backend, self._noise)
        for read in step.reads:
            self.held[read.producer].join()
            self._backend.computed(self.held[read.producer].pieces[0])
        views = [
            self.held[producer].read(part, self.regions[producer])
            for (producer, _), part in zip(step.reads, inputs, strict=True)
        ]
        return step.compute(views or [self._latents], where)
