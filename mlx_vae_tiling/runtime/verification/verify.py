"""`verify_decode`: how far an approximate decode, or a file of frames, is from the exact one.

Two decodes run in turns, a piece at a time, where both fit in the memory limit at once. Where they do not, or
frames come only after several windows, the first is kept in a temporary file, and each has all of the memory.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.media.saved_frames import SavedFrames, read_array, read_frames
from mlx_vae_tiling.runtime.assembly import read_store
from mlx_vae_tiling.runtime.flow import frames_of
from mlx_vae_tiling.runtime.frames import Frames
from mlx_vae_tiling.runtime.job import NO_FRAMES, Job
from mlx_vae_tiling.runtime.planning.memory import PeakMeter
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.planning.planner import plan_decode
from mlx_vae_tiling.runtime.request import Planning, Settings, new_job
from mlx_vae_tiling.runtime.resuming.store import FrameStore
from mlx_vae_tiling.runtime.verification.compare import Comparison, Score
from mlx_vae_tiling.runtime.verification.seams import Seams, seams_of
from mlx_vae_tiling.runtime.verification.verification import Verification
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.regions import Window


def verify_decode(
    decoder: StreamingDecoder,
    latents: mx.array,
    *,
    tiling: TilingConfig | int | None = None,
    against: str | os.PathLike[str] | Frames = "exact",
    memory_limit: int | float | str | None = None,
    window: Window | None = None,
    no_tune: bool = False,
    report: Callable[[int], object] | None = None,
    **options: Any,
) -> Verification:
    """Decodes in blended tiles or with small halos, and compares that with the exact frames, of 8 bits.

    Args:
        decoder: The decoder.
        latents: (1, C, F, H, W).
        tiling: Of the decode that is verified, as `plan_decode`: blended tiles, or the latents that windows
            see around them. Which windows these are follows from the memory limit, as in a decode.
        against: "exact" for the exact decode. Else frames, which the decode is compared with: a file, as
            `read_frames`, or an array (F, H, W, 3) of uint8; of an exact one where tiling is None.
        memory_limit: As `plan_decode`; both decodes together keep it.
        window: The part of the output; None for all of it. Blended tiles have no other.
        no_tune: As `plan_decode`.
        report: Told how many frames were compared, each time that some were.
        **options: As `decode_frames`: causal, timestep, noise_scale, seed, normalized, noise,
            num_inference_steps. They hold for both.

    Returns:
        What was found; its `str()` is one line.

    Raises:
        ValueError: If there is nothing to compare, sizes differ, or no plan fits in the memory limit.
        ArithmeticError: As `decode_frames`.

    Example:
        >>> decoder, latents = load_decoder("demo"), load_latents("demo")
        >>> print(verify_decode(decoder, latents, tiling=TilingConfig.aggressive()))
        seams visible: 29.0 dB at the seams against 33.3 dB elsewhere, worst frame 41 (24.8 dB)
    """
    saved = _saved(against)
    if saved is None and tiling is None:
        raise ValueError("an exact decode equals itself: give a tiling to verify, or frames to compare with")
    given_noise = options.pop("noise", None)

    def planned(tiling: TilingConfig | int | None, limit: int | float | str | None) -> DecodePlan:
        return plan_decode(
            decoder,
            latents.shape,
            memory_limit=limit,
            tiling=tiling,
            window=window,
            causal=options.get("causal"),
            num_inference_steps=options.get("num_inference_steps"),
            no_tune=no_tune,
        )

    def job_of(plan: DecodePlan) -> Job:
        return new_job(decoder, latents, 8, plan, Settings(**options), Planning(), given_noise)

    plan = planned(tiling, memory_limit)
    job, comparison, seams = job_of(plan), Comparison(*plan.size), seams_of(plan)
    meter = PeakMeter(job.meter.others, job.backend)
    if saved is not None:
        name, ours, theirs = saved.path, _frames(job, meter), saved.pieces
        if saved.count not in (None, plan.frames):
            raise ValueError(f"{name} has {saved.count} frames, the decode {plan.frames}")
    else:
        name, beside = "exact", planned(None, plan.memory_limit - plan.peak_bytes + plan.weight_bytes)
        in_turns = beside.fits and len(plan.parts) == len(beside.parts) == 1
        # A decode in turns with another one counts what that holds, too.
        exact = replace(beside, memory_limit=plan.memory_limit) if in_turns else planned(None, memory_limit)
        ours = _frames(job, meter) if in_turns else _kept(job, meter)
        theirs = _frames(job_of(replace(exact, backend=exact.backend.opened_beside(job.backend))), meter)
    with contextlib.closing(ours), contextlib.closing(theirs):
        scores = list(_scored(_paired(ours, theirs, name), comparison, seams, report))
    at_seams, elsewhere = zip(*scores, strict=True)
    return Verification(plan, name, seams, at_seams, elsewhere, comparison.squared_error, meter.highest)


def _saved(against: str | os.PathLike[str] | Frames) -> SavedFrames | None:
    if isinstance(against, np.ndarray):
        return read_array("against", against)
    return None if against == "exact" else read_frames(against)


def _frames(job: Job, meter: PeakMeter) -> Generator[Frames]:
    """Of all of a plan, in order; the peak is read while they are computed, and not while others are."""
    with contextlib.closing(frames_of(job)) as frames:
        while True:
            mx.reset_peak_memory()
            piece = next(frames, None)
            meter.read()
            if piece is None:
                return
            yield piece


def _kept(job: Job, meter: PeakMeter) -> Generator[Frames]:
    """The same, all decoded before the first one comes."""
    plan = job.plan
    with tempfile.TemporaryDirectory() as folder:
        store = FrameStore(Path(folder), plan.parts, (plan.frames, *plan.size, 3), job.dtype)
        with contextlib.closing(store):
            for index, part in enumerate(plan.parts):
                for frames in job.decode(part):
                    store.append(index, frames)
            meter.read()
            yield from read_store(store, 0, plan.frames)


def _paired(ours: Iterable[Frames], theirs: Iterator[Frames], name: str) -> Iterator[tuple[Frames, Frames]]:
    """Pieces of equal length of both."""
    paired, other = 0, NO_FRAMES
    for piece in ours:
        while len(piece):
            if not len(other):
                other = next(theirs, NO_FRAMES)
                if not len(other):
                    raise ValueError(f"{name} has {paired} frames, the decode has more")
            if other.shape[1:] != piece.shape[1:]:
                sizes = [f"{width}x{height}" for _, height, width, _ in (other.shape, piece.shape)]
                raise ValueError(f"{name} has frames of {sizes[0]} pixels, the decode of {sizes[1]}")
            count = min(len(piece), len(other))
            yield piece[:count], other[:count]
            piece, other, paired = piece[count:], other[count:], paired + count
    if len(other) or len(next(theirs, NO_FRAMES)):
        raise ValueError(f"{name} has more than the {paired} frames of the decode")


def _scored(
    pairs: Iterator[tuple[Frames, Frames]],
    comparison: Comparison,
    seams: Seams,
    report: Callable[[int], object] | None,
) -> Iterator[tuple[Score, Score]]:
    """The scores of each frame at the seams and elsewhere."""
    index = 0
    for ours, theirs in pairs:
        for first, second in zip(ours, theirs, strict=True):
            yield comparison.score(first, second, seams.of_frame(index))
            index += 1
        if report:
            report(len(ours))
