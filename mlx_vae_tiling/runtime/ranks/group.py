"""A decode by several ranks: what they agree on, who sends what, and how far each may be ahead.

Rank 0 compares what everyone is about to decode, divides the work and takes the frames; the others send
theirs. A rank computes one piece beyond what rank 0 has room for and then waits with it, so that nobody's
memory grows with the video. The windows and rank 0's forms of convolution decide the bytes of a frame, and
not who computes them: a decode of the same windows by one process, or by another number of ranks, gives the
same. A decode of the whole frame gives the same to rounding.
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
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.ranks.crew import Crew, RankError
from mlx_vae_tiling.runtime.ranks.shares import Division, assign, divide, division_of
from mlx_vae_tiling.runtime.ranks.wire import Message
from mlx_vae_tiling.runtime.resuming.journal import read_part
from mlx_vae_tiling.tiling import TilingConfig

Fingerprint = dict[str, str]

LEAD_PIECES = 2
"""How many pieces of rank 0's size a rank may be ahead of what was put together."""


@dataclass(frozen=True)
class Team:
    """Rank 0's side of a decode.

    Args:
        crew: The ranks.
        job: Its plan's parts are those of all ranks.
        division: Whose part is which.
        budgets: The memory of each rank in bytes.
    """

    crew: Crew
    job: Job
    division: Division
    budgets: list[int]

    def taken_up(self, parts: tuple[Part, ...], done: list[int], arithmetic: dict[str, Any]) -> Team:
        """The same for parts and forms of an earlier run, of which so many frames are finished."""
        backend = self.job.plan.backend.computing_as(arithmetic)
        job, division = replace(self.job, plan=replace(self.job.plan, backend=backend)), self.division
        if parts != division.parts:
            model = _model(job)
            division = division_of(model, parts, assign(model, parts, done, self.budgets), self.crew.size)
        return replace(self, job=_of_all(job, division), division=division)

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
        numbers = self.division.of(0)
        if numbers:
            parts = tuple(self.division.parts[number] for number in numbers)
            job = _sharing(self.job, parts, self.job.plan.backend.arithmetic)
            for number in numbers:
                for frames in job.decode(self.division.parts[number], store.done[number]):
                    yield number, frames

    def _may_compute(self, left: list[int], store: Store) -> bool:
        own = [number for number in left if self.division.owners[number] == 0]
        return bool(own) and store.done[own[0]] < self._until(own[0], store)

    def _until(self, number: int, store: Store) -> int:
        """The frame of a part from which on nothing is taken yet."""
        lead = LEAD_PIECES * self.job.plan.latent_frames_per_step * self.job.decoder.config.temporal_scale
        return lead + (store.complete if store.bounded else store.done[number])

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
        ValueError: If a rank is about to decode something else, or no window fits.
    """
    budgets = _gathered(crew, job, fingerprint)
    division = divide(_model(job), job.plan.output, budgets, _halo(job.plan))
    return Team(crew, _of_all(job, division), division, budgets)


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
        job = _sharing(job, parts, share["arithmetic"])
    for number, part, done in zip(share["numbers"], parts, share["done"], strict=True):
        for frames in job.decode(part, done):
            while done >= until[number]:
                message = crew.hear()
                if message is None or message.kind == "bye":
                    return sent  # whoever takes the frames wants no more
                until[message.fields["part"]] = message.fields["frame"]
            crew.tell(0, "frames", {"part": number, "shape": frames.shape}, np.ascontiguousarray(frames))
            done, sent = done + len(frames), sent + len(frames)
    while (message := crew.hear()) is not None and message.kind not in ("finished", "bye"):
        pass
    return sent


def _sharing(job: Job, parts: tuple[Part, ...], arithmetic: dict[str, Any]) -> Job:
    """The job of one rank's parts, computed in rank 0's forms."""
    job = job.planned_anew(parts, arithmetic)
    job.plan.require_fit()
    return job


def require_exact(tiling: TilingConfig | int | None) -> None:
    """Raises a `ValueError` for blended tiles, which one machine decodes."""
    if isinstance(tiling, TilingConfig):
        raise ValueError("blended tiles are decoded by one machine; several take windows: tiling=None")


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


def _halo(plan: DecodePlan) -> int | None:
    require_exact(plan.tiling)
    return plan.tiling if isinstance(plan.tiling, int) else None


def _of_all(job: Job, division: Division) -> Job:
    """The job with the parts of all ranks, of which its own plan's memory is that of this rank alone."""
    operations = sum(division.operations)
    plan = replace(
        job.plan,
        parts=division.parts,
        operations=operations,
        recompute=operations * job.plan.recompute / job.plan.operations,
    )
    return replace(job, plan=plan)


def _length(part: Part) -> int:
    return part.pixels.time.length
