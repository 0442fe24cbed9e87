"""Frames of several parts, put together in order: a source of pieces, where they wait, who takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from mlx_vae_tiling.runtime.frames import Frames
from mlx_vae_tiling.runtime.job import Job

READ_FRAMES = 8
"""Taken at a time of what is complete."""

Piece = tuple[int, Frames]
"""The number of a part, and its next finished frames."""


class Store(Protocol):
    """Where frames wait for the other parts.

    Attributes:
        done: Finished frames of each part.
        bounded: Whether parts have to advance together.
    """

    done: list[int]
    bounded: bool

    @property
    def complete(self) -> int: ...

    def append(self, part: int, frames: Frames) -> None: ...

    def read(self, start: int, stop: int) -> Frames: ...


def part_by_part(job: Job, store: Store, report: Callable[[int], object]) -> Iterator[Piece]:
    """All parts one after the other, each from where an earlier run has left it."""
    for number, part in enumerate(job.plan.parts):
        for frames in job.decode(part, store.done[number], report):
            yield number, frames


def put_together(pieces: Iterable[Piece], store: Store, start: int) -> Iterator[Frames]:
    """The frames of the output from `start` on, those of the store first.

    Args:
        pieces: From where the store's parts are.
        store: Takes them.
        start: Frames that are not wanted.
    """
    yield from read_store(store, start, store.complete)
    start = max(start, store.complete)
    for number, frames in pieces:
        store.append(number, frames)
        yield from read_store(store, start, store.complete)
        start = max(start, store.complete)


def read_store(store: Store, start: int, stop: int) -> Iterator[Frames]:
    """Its frames, a few at a time."""
    for first in range(start, stop, READ_FRAMES):
        yield store.read(first, min(first + READ_FRAMES, stop))
