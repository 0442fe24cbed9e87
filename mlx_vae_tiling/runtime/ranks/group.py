"""A decode by several ranks: what they agree on, who sends what, and how far each may be ahead.

Rank 0 compares what everyone is about to decode, divides the work and takes the frames; the others send
theirs. A rank computes one piece beyond what rank 0 has room for and waits with what has none, so that
nobody's memory grows with the video. The windows and rank 0's forms of convolution decide the bytes of a
frame, and not who computes them: a decode of the same windows by one process, or by another number of ranks,
gives the same. A decode of the whole frame gives the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from mlx_vae_tiling.runtime.assembly import Piece, Store
from mlx_vae_tiling.runtime.job import Job
from mlx_vae_tiling.runtime.planning.cost import CostModel, Part
from mlx_vae_tiling.runtime.ranks.crew import Crew, RankError
from mlx_vae_tiling.runtime.ranks.division import Division, division_of, halo_of
from mlx_vae_tiling.runtime.ranks.shares import assign, divide
from mlx_vae_tiling.runtime.ranks.waiting import Room, ranges_of, room_for
from mlx_vae_tiling.runtime.ranks.wire import Message
from mlx_vae_tiling.runtime.resuming.journal import read_part

Fingerprint = dict[str, str]


@dataclass(frozen=True)
class Team:
    """Rank 0's side of a decode.

    Args:
        crew: The ranks.
        job: Its plan's parts are those of all ranks, its memory is that of this one.
        own: Of this rank's parts alone; None if it has none.
        division: Whose part is which.
        budgets: The memory of each rank in bytes.
        room: For the frames that wait here.
    """

    crew: Crew
    job: Job
    own: Job | None
    division: Division
    budgets: list[int]
    room: Room

    @classmethod
    def planned(cls, crew: Crew, job: Job, division: Division, budgets: list[int], room: Room) -> Team:
        """The team of a division, of which this rank's share is planned in the memory that is left for it."""
        own, plan = (
            None,
            replace(job.plan, peak_bytes=job.plan.weight_bytes, state_bytes=0, workspace_bytes=0),
        )
        waiting, operations = room.nbytes(ranges_of(division.parts)), sum(division.operations)
        if division.of(0):
            parts = tuple(division.parts[number] for number in division.of(0))
            less = replace(job, plan=replace(job.plan, memory_limit=budgets[0] - waiting))
            own = less.planned_anew(parts, job.plan.backend.arithmetic)
            plan = own.plan
        plan = replace(
            plan,
            parts=division.parts,
            memory_limit=budgets[0],
            peak_bytes=plan.peak_bytes + waiting,
            waiting_bytes=waiting,
            operations=operations,
            recompute=operations * job.plan.recompute / job.plan.operations,
        )
        return cls(crew, replace(job, plan=plan), own, division, budgets, room)

    def taken_up(self, parts: tuple[Part, ...], done: list[int], arithmetic: dict[str, Any]) -> Team:
        """The same for parts and forms of an earlier run, of which so many frames are finished."""
        if (parts, arithmetic) == (self.division.parts, self.job.plan.backend.arithmetic):
            return self
        backend = self.job.plan.backend.computing_as(arithmetic)
        job, division = replace(self.job, plan=replace(self.job.plan, backend=backend)), self.division
        if parts != division.parts:
            model = _model(job)
            left = [self.budgets[0] - self.room.nbytes(ranges_of(parts)), *self.budgets[1:]]
            division = division_of(model, parts, assign(model, parts, done, left), self.crew.size)
        return self.planned(self.crew, job, division, self.budgets, self.room)

    def stored(self, parts: tuple[Part, ...]) -> bool:
        """Whether these parts do not advance together."""
        arithmetic = self.job.plan.backend.arithmetic
        return not self.taken_up(parts, [0] * len(parts), arithmetic).division.together

    def pieces(self, job: Job, store: Store, report: Callable[[int], object]) -> Iterator[Piece]:
        """The pieces of all parts as they come, rank 0's own among them, from where the store's parts are.

        Args:
            job: With the plan of all parts.
            store: To which each piece is added before the next one is asked for.
            report: Told of each how many frames it has.
        """
        own = self._own(store)
        left = [number for number, part in enumerate(job.plan.parts) if store.done[number] < _length(part)]
        for rank in range(1, self.crew.size):
            self._hand_out(rank, store)
        while left:
            message = self.crew.hear(wait=not self._may_compute(left, store))
            number, frames = next(own) if message is None else _unpacked(message, job.dtype)
            report(len(frames))
            yield number, frames
            left = [number for number in left if store.done[number] < _length(self.division.parts[number])]
            self._let_go_on(number, store)

    def finish(self) -> None:
        """Lets the other ranks end."""
        self.crew.tell_all("finished")

    def _own(self, store: Store) -> Iterator[Piece]:
        if self.own is not None:
            self.own.plan.require_fit()
            for number in self.division.of(0):
                for frames in self.own.decode(self.division.parts[number], store.done[number]):
                    yield number, frames

    def _may_compute(self, left: list[int], store: Store) -> bool:
        own = [number for number in left if self.division.owners[number] == 0]
        if not own or not store.bounded:
            return bool(own)
        # As far as the others may have come, and then a piece, which each of them has computed as well.
        return store.done[own[0]] <= store.complete + self.room.frames

    def _until(self, number: int, store: Store) -> int:
        """The frame of a part from which on nothing is taken yet."""
        return self.room.frames + (store.complete if store.bounded else store.done[number])

    def _hand_out(self, rank: int, store: Store) -> None:
        numbers = self.division.of(rank)
        share = {
            "numbers": numbers,
            "arithmetic": self.job.plan.backend.arithmetic,
            "parts": [self.division.parts[number] for number in numbers],
            "done": [store.done[number] for number in numbers],
            "until": [self._until(number, store) for number in numbers],
        }
        self.crew.tell(rank, "share", share)

    def _let_go_on(self, number: int, store: Store) -> None:
        numbers = range(len(self.division.parts)) if store.bounded else [number]
        for moved in numbers:
            rank = self.division.owners[moved]
            if rank and store.done[moved] < _length(self.division.parts[moved]):
                self.crew.tell(rank, "until", {"part": moved, "frame": self._until(moved, store)})


def lead(crew: Crew, job: Job, fingerprint: Fingerprint) -> Team:
    """Rank 0: waits for everyone and divides the work.

    Raises:
        ValueError: If a rank is about to decode something else, or no window or too few frames fit.
    """
    budgets, model = _gathered(crew, job, fingerprint), _model(job)
    room = room_for(model, job.plan.output, job.dtype.itemsize, budgets[0])
    division = divide(model, job.plan.output, budgets, halo_of(job.plan.tiling), room)
    return Team.planned(crew, job, division, budgets, room)


def serve(crew: Crew, job: Job, fingerprint: Fingerprint) -> int:
    """Every other rank: decodes its share, sends it, and waits for the end.

    Returns:
        Frames of all its parts.
    """
    crew.tell(0, "card", {"card": _card(fingerprint), "budget": job.plan.memory_limit})
    message = crew.hear()
    if message is None or message.kind in ("finished", "bye"):
        return 0  # there was nothing to do
    share = message.fields
    parts, sent = tuple(read_part(part) for part in share["parts"]), 0
    until = dict(zip(share["numbers"], share["until"], strict=True))
    if parts:
        job = job.planned_anew(parts, share["arithmetic"])
        job.plan.require_fit()
    for number, part, done in zip(share["numbers"], parts, share["done"], strict=True):
        for frames in job.decode(part, done):
            while len(frames):
                while done >= until[number]:
                    message = crew.hear()
                    if message is None or message.kind == "bye":
                        return sent  # whoever takes the frames wants no more
                    until[message.fields["part"]] = message.fields["frame"]
                now, frames = frames[: until[number] - done], frames[until[number] - done :]
                crew.tell(0, "frames", {"part": number, "shape": now.shape}, np.ascontiguousarray(now))
                done, sent = done + len(now), sent + len(now)
    while (message := crew.hear()) is not None and message.kind not in ("finished", "bye"):
        pass
    return sent


def _gathered(crew: Crew, job: Job, fingerprint: Fingerprint) -> list[int]:
    """The memory of each rank, once all have said that they will decode the same."""
    own, budgets = _card(fingerprint), {0: job.plan.memory_limit}
    differing: list[str] = []
    for _ in range(1, crew.size):
        message = _heard(crew, "card")
        told = message.fields["card"]
        names = [name for name in own | told if told.get(name) != own.get(name)]
        if names:
            texts = (_difference(name, told.get(name), own.get(name)) for name in sorted(names))
            differing.append(f"rank {message.rank} in {', '.join(texts)}")
        budgets[message.rank] = message.fields["budget"]
    if differing:
        raise ValueError(f"all ranks must decode the same, but from rank 0 differ {'; '.join(differing)}")
    return [budgets[rank] for rank in range(crew.size)]


def _card(fingerprint: Fingerprint) -> Fingerprint:
    from mlx_vae_tiling import __version__

    versions = {"mlx_vae_tiling's version": __version__, "MLX's version": version("mlx")}
    return fingerprint | versions


def _difference(name: str, told: str | None, own: str | None) -> str:
    texts = [str(text) for text in (told, own)]
    return name if max(map(len, texts)) > 40 else f"{name} ({texts[0]}, not {texts[1]})"


def _heard(crew: Crew, kind: str) -> Message:
    message = crew.hear()
    if message is None or message.kind != kind:
        raise RankError(f"rank {message.rank if message else 0} has left before its part was done")
    return message


def _unpacked(message: Message, dtype: np.dtype[Any]) -> Piece:
    if message.kind != "frames":
        raise RankError(f"rank {message.rank} has left before its part was done")
    frames = np.frombuffer(message.data, dtype).reshape(message.fields["shape"])
    return message.fields["part"], frames


def _model(job: Job) -> CostModel:
    plan = job.plan
    return CostModel(job.decoder, plan.latent_shape, job.decoder.dtype, plan.backend, job.options)


def _length(part: Part) -> int:
    return part.pixels.time.length
