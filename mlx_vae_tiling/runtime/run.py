"""Runs a plan: frames that were checked, in order, to an iterator or to a file."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_vae_tiling.arguments import require
from mlx_vae_tiling.runtime.faults import tried_twice
from mlx_vae_tiling.runtime.flow import frames_of
from mlx_vae_tiling.runtime.frames import Frames
from mlx_vae_tiling.runtime.job import Job
from mlx_vae_tiling.runtime.planning.forms import expected_seconds
from mlx_vae_tiling.runtime.planning.memory import footprint_bytes
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.ranks.crew import Crew, joined
from mlx_vae_tiling.runtime.ranks.group import Team, lead, serve
from mlx_vae_tiling.runtime.report import DecodeReport
from mlx_vae_tiling.runtime.request import Planning, Settings, fingerprint_job, new_job, sound_of
from mlx_vae_tiling.runtime.resuming.output import DecodeOutput, open_output, several
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.regions import Window

Ranks = mx.distributed.Group | Crew
"""MLX's group, or the ranks that have come together already."""


def decode_frames(
    decoder: StreamingDecoder,
    latents: mx.array,
    *,
    memory_limit: int | float | str | None = None,
    plan: DecodePlan | None = None,
    tiling: TilingConfig | int | None = None,
    window: Window | None = None,
    causal: bool | None = None,
    timestep: float | None = None,
    noise_scale: float | None = None,
    seed: int = 0,
    normalized: bool = True,
    noise: mx.array | None = None,
    num_inference_steps: int | None = None,
    bits: int = 8,
    no_tune: bool = False,
    progress: bool = False,
    group: Ranks | None = None,
) -> Iterator[Frames]:
    """Decodes latents to finished RGB frames within a memory budget.

    Frames are checked on the device for NaN, infinities and a single value; where there are any,
    they are decoded once more with chunks of half the size. Several windows are put together in a
    temporary file.

    Args:
        decoder: The decoder.
        latents: (1, C, F, H, W).
        memory_limit: Bytes, or a string such as "8GB"; by default 70 % of what is available.
        plan: A plan from `plan_decode` for these latents, which has its own memory_limit, tiling and window:
            beside it they are refused.
        tiling: As `plan_decode`: None is exact.
        window: The part of the output that is wanted; None for all of it.
        causal, timestep, noise_scale, seed, normalized: As `VideoDecoder.stream`; a plan is for one
            value of causal, which is then the default.
        noise: (1, 3, 8(F-1)+1, 32H, 32W), in place of the noise that a diffusion decoder draws by the seed.
        num_inference_steps: Of a diffusion decoder; None for its config's.
        bits: 8 for uint8, 16 for uint16 frames, 32 for float32 in [0, 1].
        no_tune: Measures no form of convolution before a long decode on Metal, which takes two seconds the
            first time, and takes none for having been measured. A plan that is given has its forms.
        progress: Shows a progress bar on stderr, with the seconds that are expected where they are known.
        group: `mx.distributed.init()`, where several machines share the decode: each calls this with the
            same arguments, but for its own memory_limit. Rank 0's iterator gives all frames, those of the
            others give none and compute while they are asked. Errors come with the first frame.

    Returns:
        An iterator of uint8 (or uint16, float32) arrays (f, H, W, 3).

    Raises:
        ValueError: If latents or options do not fit the decoder, or nothing fits the budget.
        ArithmeticError: If frames are not finite, or constant, also the second time.
        ConnectionError: If another rank has failed or was lost.
    """
    settings = Settings(causal, timestep, noise_scale, seed, normalized, num_inference_steps)
    planning = Planning(memory_limit, tiling, window, no_tune)
    prepare = partial(new_job, decoder, latents, bits, plan, settings, planning, noise, progress)
    if group is None or _size(group) == 1:
        job = prepare()
        return frames_of(job, None, progress, expected_seconds(decoder, job.plan) if progress else None)
    return _with_ranks(group, prepare, noise, progress)


def decode_to_file(
    decoder: StreamingDecoder,
    latents: mx.array,
    path: str | os.PathLike[str],
    *,
    fps: float | str = 24,
    resume: bool = False,
    overwrite: bool = False,
    audio: str | os.PathLike[str] | None = None,
    codec: str | None = None,
    quality: float | None = None,
    memory_limit: int | float | str | None = None,
    plan: DecodePlan | None = None,
    tiling: TilingConfig | int | None = None,
    window: Window | None = None,
    causal: bool | None = None,
    timestep: float | None = None,
    noise_scale: float | None = None,
    seed: int = 0,
    normalized: bool = True,
    noise: mx.array | None = None,
    num_inference_steps: int | None = None,
    no_tune: bool = False,
    progress: bool = False,
    group: Ranks | None = None,
) -> DecodeReport:
    """Decodes latents to a video, an image sequence or an array on disk.

    While it runs, the output lies beside its name, as `clip.partial.mp4`, where it can be played, and a
    journal in `<path>.partial`; so do the frames where there are several windows. However a decode ends
    early, `resume=True` continues it from there, and gives the same frames (blended tiles are all decoded
    again, and those frames skipped).

    Args:
        decoder: The decoder.
        latents: (1, C, F, H, W).
        path: `.mp4`, `.mov`, `.npy`, `frame_%05d.png`, or a directory for PNG.
        fps: Frames per second of a video, also "24000/1001".
        resume: Continues an earlier decode of the same latents, weights and settings, if there is one.
        overwrite: Replaces the output, if there is one, once the new one is complete; without `resume`
            begins again what was left unfinished.
        audio: A file with the sound of the whole clip, for `.mp4` and `.mov`; of it goes in what belongs
            to the window.
        codec, quality: As `media.video.open_video`.
        memory_limit, plan, tiling, window, causal, timestep, noise_scale, seed, normalized, noise,
            num_inference_steps, no_tune, progress: As `decode_frames`.
        group: As `decode_frames`; rank 0 alone writes. Any number of ranks may resume what others began.

    Returns:
        What was done. Its `str()` is one line.

    Raises:
        BlockingIOError: If another process is writing the output.
        FileExistsError: If there is an output and overwrite is False, or an earlier decode is kept and
            resume is False too.
        OSError: If the disk is full or the path cannot be written.
        ValueError, ArithmeticError, ConnectionError: As `decode_frames`.
    """
    began = time.perf_counter()
    require("path", path, "text or a path", str, os.PathLike)
    bits = 16 if os.fspath(path).lower().endswith(".mov") and codec in (None, "prores") else 8
    settings = Settings(causal, timestep, noise_scale, seed, normalized, num_inference_steps)
    planning = Planning(memory_limit, tiling, window, no_tune)
    prepare = partial(new_job, decoder, latents, bits, plan, settings, planning, noise, progress)
    video = {"fps": fps, "codec": codec, "quality": quality, "resume": resume, "overwrite": overwrite}
    team, kept, expected = None, 0, None
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(joined(group)) if group is not None and _size(group) > 1 else None
        job, fingerprint = _watched(prepare, crew, noise)
        video |= sound_of(audio, job.plan, fps)
        if crew is not None and crew.rank:
            serve(crew, job, fingerprint)
        else:
            if crew is not None:
                team = lead(crew, job, fingerprint)
                job = team.job
            job, kept, expected = _write(job, path, fingerprint, progress, team, video)
            if team is not None:
                team.finish()
    return _reported(job, path, kept, time.perf_counter() - began, expected)


def _reported(
    job: Job, path: str | os.PathLike[str], kept: int, seconds: float, expected: float | None
) -> DecodeReport:
    return DecodeReport(
        path=os.fspath(path),
        frames=job.plan.frames,
        resumed_frames=kept,
        seconds=seconds,
        decoding_seconds=job.spent.seconds,
        expected_seconds=expected,
        peak_bytes=job.meter.highest,
        footprint_bytes=footprint_bytes(),
        plan=job.plan,
    )


def _write(
    job: Job,
    path: str | os.PathLike[str],
    fingerprint: dict[str, str],
    progress: bool,
    team: Team | None,
    video: dict[str, Any],
) -> tuple[Job, int, float | None]:
    """Decodes to a file.

    Returns:
        The job as it was begun, frames of the output that an earlier run had decoded, and the seconds
        that decoding the others was expected to take.
    """
    for name in ("resume", "overwrite"):
        require(name, video[name], "True or False", bool)
    stored, expected = several if team is None else team.stored, None
    with open_output(path, job.plan, job.dtype, fingerprint, stored=stored, **video) as output:
        if output.writer is not None:
            parts, arithmetic = output.journal.parts, output.journal.arithmetic
            if team is None:
                job = job.as_begun(parts, arithmetic)
                expected = _expected_now(job, output)
            else:
                done = output.store.done if output.store else [output.writer.frames_kept] * len(parts)
                team = team.taken_up(parts, done, arithmetic)
                job = team.job
            with contextlib.closing(frames_of(job, output, progress, expected, team)) as frames:
                for piece in frames:
                    output.writer.write(piece)
    return job, output.kept, expected


def _with_ranks(
    group: Ranks, prepare: Callable[..., Job], noise: mx.array | None, progress: bool
) -> Generator[Frames]:
    with joined(group) as crew:
        job, fingerprint = _watched(prepare, crew, noise)
        if crew.rank:
            serve(crew, job, fingerprint)
            return
        team = lead(crew, job, fingerprint)
        yield from frames_of(team.job, None, progress, team=team)
        team.finish()


def _watched(
    prepare: Callable[..., Job], crew: Crew | None, noise: mx.array | None
) -> tuple[Job, dict[str, str]]:
    """The job, which ends when one of the ranks does, and its fingerprint."""
    job = prepare(fitting=crew is None)
    if crew is not None:
        job = replace(job, watch=crew.check)
    return job, tried_twice(lambda: fingerprint_job(job, noise), "reading what is decoded")


def _size(group: Ranks) -> int:
    require("group", group, "what mx.distributed.init() returns, or None", mx.distributed.Group, Crew)
    return group.size if isinstance(group, Crew) else group.size()


def _expected_now(job: Job, output: DecodeOutput) -> float | None:
    """How long decoding the frames takes that an earlier run has not finished."""
    seconds = expected_seconds(job.decoder, job.plan)
    if seconds is None or isinstance(job.plan.tiling, TilingConfig):
        return seconds
    return seconds * (1 - output.finished / sum(part.pixels.time.length for part in job.plan.parts))
