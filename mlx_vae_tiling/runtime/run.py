"""Runs a plan: frames that were checked, in order, to an iterator or to a file."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vae_tiling.arguments import require
from mlx_vae_tiling.media.video import frame_rate
from mlx_vae_tiling.runtime.frames import KINDS, Frames
from mlx_vae_tiling.runtime.job import Job
from mlx_vae_tiling.runtime.journal import fingerprint_of, hash_of
from mlx_vae_tiling.runtime.memory import footprint_bytes, format_bytes
from mlx_vae_tiling.runtime.output import DecodeOutput, open_output
from mlx_vae_tiling.runtime.plan import DecodePlan
from mlx_vae_tiling.runtime.store import FrameStore
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.regions import Window


@dataclass(frozen=True)
class DecodeReport:
    """What a decode to a file did.

    Attributes:
        path: The file.
        frames: Frames in it.
        resumed_frames: Of these, those that an earlier run had decoded.
        seconds: Time taken, opening and writing included.
        peak_bytes: Measured peak of MLX's memory.
        footprint_bytes: The most physical memory that the process ever held, by the system's count.
        plan: The plan that was run, which holds the prediction.
    """

    path: str
    frames: int
    resumed_frames: int
    seconds: float
    peak_bytes: int
    footprint_bytes: int
    plan: DecodePlan

    def __str__(self) -> str:
        resumed = f" ({self.resumed_frames} of them from before)" if self.resumed_frames else ""
        return (
            f"{self.path}: {self.frames} frames{resumed} in {self.seconds:.1f} s, "
            f"{(self.frames - self.resumed_frames) / max(self.seconds, 1e-9):.1f} frames/s, "
            f"peak {format_bytes(self.peak_bytes)} (predicted {format_bytes(self.plan.peak_bytes)}), "
            f"process {format_bytes(self.footprint_bytes)}"
        )


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
    progress: bool = False,
) -> Iterator[Frames]:
    """Decodes latents to finished RGB frames within a memory budget.

    Frames are checked on the device for NaN, infinities and a single value; where there are any,
    they are decoded once more with chunks of half the size. Several windows are put together in a
    temporary file.

    Args:
        decoder: The decoder.
        latents: (1, C, F, H, W).
        memory_limit: Bytes, or a string such as "8GB"; by default 70 % of what is available.
        plan: A plan from `plan_decode` for these latents, in place of memory_limit, tiling, window.
        tiling: As `plan_decode`: None is exact.
        window: The part of the output that is wanted; None for all of it.
        causal, timestep, noise_scale, seed, normalized: As `VideoDecoder.stream`; a plan is for one
            value of causal, which is then the default.
        noise: (1, 3, 8(F-1)+1, 32H, 32W), in place of the noise that a diffusion decoder draws by the seed.
        num_inference_steps: Of a diffusion decoder; None for its config's.
        bits: 8 for uint8, 16 for uint16 frames, 32 for float32 in [0, 1].
        progress: Shows a progress bar on stderr.

    Returns:
        An iterator of uint8 (or uint16, float32) arrays (f, H, W, 3).

    Raises:
        ValueError: If latents or options do not fit the decoder, or nothing fits the budget.
        ArithmeticError: If frames are not finite, or constant, also the second time.
    """
    options = {"causal": causal, "timestep": timestep, "noise_scale": noise_scale}
    options |= {"seed": seed, "normalized": normalized, "num_inference_steps": num_inference_steps}
    planning = {"memory_limit": memory_limit, "tiling": tiling, "window": window}
    job = new_job(decoder, latents, bits, plan, options, planning, noise)
    return frames_of(job, None, progress)


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
    progress: bool = False,
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
            num_inference_steps, progress: As `decode_frames`.

    Returns:
        What was done. Its `str()` is one line.

    Raises:
        BlockingIOError: If another process is writing the output.
        FileExistsError: If there is an output and overwrite is False, or an earlier decode is kept and
            resume is False too.
        OSError: If the disk is full or the path cannot be written.
        ValueError, ArithmeticError: As `decode_frames`.
    """
    began = time.perf_counter()
    for name, value in (("resume", resume), ("overwrite", overwrite), ("progress", progress)):
        require(name, value, "True or False", bool)
    bits = 16 if os.fspath(path).lower().endswith(".mov") and codec in (None, "prores") else 8
    options = {"causal": causal, "timestep": timestep, "noise_scale": noise_scale}
    options |= {"seed": seed, "normalized": normalized, "num_inference_steps": num_inference_steps}
    planning = {"memory_limit": memory_limit, "tiling": tiling, "window": window}
    job = new_job(decoder, latents, bits, plan, options, planning, noise)
    settings = {"tiling": job.plan.tiling, "output": job.plan.output, "bits": bits, **vars(job.options)}
    if noise is not None:
        settings["noise"] = hash_of(noise).hex()
    fingerprint = fingerprint_of(decoder, latents, **settings)
    video = {"fps": fps, "codec": codec, "quality": quality, **_sound(audio, job.plan, fps)}
    with open_output(
        path, job.plan, job.dtype, fingerprint, resume=resume, overwrite=overwrite, **video
    ) as output:
        if output.writer is not None:
            if output.journal.parts != job.plan.parts:
                job = job.planned_anew(output.journal.parts)
            with contextlib.closing(frames_of(job, output, progress)) as frames:
                for piece in frames:
                    output.writer.write(piece)
    seconds = time.perf_counter() - began
    return DecodeReport(
        os.fspath(path), job.plan.frames, output.kept, seconds, job.meter.highest, footprint_bytes(), job.plan
    )


def _sound(audio: str | os.PathLike[str] | None, plan: DecodePlan, fps: float | str) -> dict[str, Any]:
    if audio is None:
        return {}
    frames, rate = plan.output.time, frame_rate(fps)
    return {
        "audio": audio,
        "audio_start_seconds": float(frames.start / rate),
        "clip_seconds": float(frames.size / rate),
    }


def new_job(
    decoder: StreamingDecoder,
    latents: mx.array,
    bits: int,
    plan: DecodePlan | None,
    options: dict[str, Any],
    planning: dict[str, Any],
    noise: mx.array | None,
) -> Job:
    """The job of one video's frames of so many bits, with what a plan says where the options say nothing."""
    require("plan", plan, "a DecodePlan or None", DecodePlan, None)
    require("bits", bits, "8, 16 or 32", int)
    if bits not in KINDS:
        raise ValueError(f"bits must be 8, 16 or 32, got {bits}")
    if plan is not None:
        for name, planned in (("causal", plan.causal), ("num_inference_steps", plan.inference_steps)):
            options[name] = planned if options.get(name) is None else options[name]
    job = Job.prepare(
        decoder, latents, decoder.options(**options), KINDS[bits], plan, noise=noise, **planning
    )
    if len(latents) != 1:
        raise ValueError(
            f"frames come from one video at a time, got a batch of {len(latents)}; decode latents[i : i + 1]"
        )
    return job


def frames_of(job: Job, output: DecodeOutput | None = None, progress: bool = False) -> Generator[Frames]:
    """Frames of a job in order, those that an output keeps left out; several windows are put together.

    Progress counts each frame of each window.
    """
    from tqdm import tqdm

    parts = len(job.plan.parts)
    unit, total = "frame" if parts == 1 else f"frame of {parts} windows", parts * job.plan.frames
    store = output.store if output else None
    start = output.writer.frames_kept if output and output.writer else 0
    done = sum(store.done) if store else start
    with tqdm(total=total, initial=done, unit=f" {unit}", desc="decode", disable=not progress) as bar:

        def report(frames: int) -> None:
            bar.set_postfix_str(f"peak {format_bytes(job.meter.highest)}", refresh=False)
            bar.update(frames)

        if parts == 1:
            yield from job.decode(job.plan.parts[0], start, report)
        elif store is not None:
            yield from _put_together(job, store, start, report)
        else:
            with tempfile.TemporaryDirectory() as folder:
                shape = (job.plan.frames, *job.plan.size, 3)
                fresh = FrameStore(Path(folder), job.plan.parts, shape, job.dtype)
                with contextlib.closing(fresh):
                    yield from _put_together(job, fresh, start, report)


def _put_together(job: Job, store: FrameStore, start: int, report: Callable[[int], None]) -> Iterator[Frames]:
    """Finished frames of several windows from frame `start` on, those of the store first."""
    for index, part in enumerate(job.plan.parts):
        yield from read_store(store, start, min(store.done))
        start = max(start, min(store.done))
        for frames in job.decode(part, store.done[index], report):
            store.append(index, frames)
            yield from read_store(store, start, min(store.done))
            start = max(start, min(store.done))
    yield from read_store(store, start, job.plan.frames)


def read_store(store: FrameStore, start: int, stop: int) -> Iterator[Frames]:
    """Its frames, a few at a time."""
    for first in range(start, stop, 8):
        yield store.read(first, min(first + 8, stop))
