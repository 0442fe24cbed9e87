"""Runs a plan: frames that were checked, in order, to an iterator or to a file."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_vae_tiling.media.video import open_video
from mlx_vae_tiling.runtime.cost import Part
from mlx_vae_tiling.runtime.memory import PeakMeter, footprint_bytes, format_bytes, memory_limits
from mlx_vae_tiling.runtime.plan import MEMORY, DecodePlan, plan_decode
from mlx_vae_tiling.runtime.store import Frames, FrameStore, fingerprint_of, finished_share, open_store
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.streaming import Pace, Window

CONSTANT_FRAME_PIXELS = 32 * 32
"""Larger frames of one single value are taken for a failed computation."""

EVALUATION_SECONDS = 1.0
"""Longest time that one layer's evaluation should take on a GPU, whose watchdog may end longer ones."""


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


@dataclass(frozen=True)
class _Job:
    """A decode and everything it depends on."""

    decoder: VideoDecoder
    latents: mx.array
    plan: DecodePlan
    bits: int
    options: dict[str, Any]
    meter: PeakMeter

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8 if self.bits == 8 else np.uint16)


def decode_frames(
    decoder: VideoDecoder,
    latents: mx.array,
    *,
    memory_limit: int | float | str | None = None,
    plan: DecodePlan | None = None,
    tiling: TilingConfig | int | None = None,
    window: Window | None = None,
    timestep: float | None = None,
    noise_scale: float | None = None,
    seed: int = 0,
    normalized: bool = True,
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
        timestep, noise_scale, seed, normalized: As `VideoDecoder.stream`.
        bits: 8 for uint8, 16 for uint16 frames.
        progress: Shows a progress bar on stderr.

    Returns:
        An iterator of uint8 (or uint16) arrays (f, H, W, 3).

    Raises:
        ValueError: If latents or options do not fit the decoder, or nothing fits the budget.
        ArithmeticError: If frames are not finite, or constant, also the second time.
    """
    options = {"timestep": timestep, "noise_scale": noise_scale, "seed": seed, "normalized": normalized}
    job = _prepare(decoder, latents, plan, memory_limit, tiling, window, bits, options)
    return _with_progress(job, None, progress)


def decode_to_file(
    decoder: VideoDecoder,
    latents: mx.array,
    path: str | os.PathLike[str],
    *,
    fps: float | str = 24,
    resume: bool = False,
    codec: str | None = None,
    quality: float | None = None,
    memory_limit: int | float | str | None = None,
    plan: DecodePlan | None = None,
    tiling: TilingConfig | int | None = None,
    window: Window | None = None,
    timestep: float | None = None,
    noise_scale: float | None = None,
    seed: int = 0,
    normalized: bool = True,
    progress: bool = False,
) -> DecodeReport:
    """Decodes latents to a video, an image sequence or an array on disk.

    While it runs, the frames so far are also kept in `<path>.partial`. However a decode ends early,
    `resume=True` continues it from there, and gives the same frames (blended tiles are all decoded
    again, and those frames skipped); the file that was begun is playable after Ctrl-C.

    Args:
        decoder: The decoder.
        latents: (1, C, F, H, W).
        path: `.mp4`, `.mov`, `.npy`, `frame_%05d.png`, or a directory for PNG.
        fps: Frames per second of a video, also "24000/1001".
        resume: Continues an earlier decode of the same latents, weights and settings, if there is one.
        codec, quality: As `media.video.open_video`.
        memory_limit, plan, tiling, window, timestep, noise_scale, seed, normalized, progress: As
            `decode_frames`.

    Returns:
        What was done. Its `str()` is one line.

    Raises:
        FileExistsError: If an earlier decode is kept and resume is False.
        OSError: If the disk is full or the path cannot be written.
        ValueError, ArithmeticError: As `decode_frames`.
    """
    began = time.perf_counter()
    bits = 16 if os.fspath(path).lower().endswith(".mov") and codec in (None, "prores") else 8
    options = {"timestep": timestep, "noise_scale": noise_scale, "seed": seed, "normalized": normalized}
    job = _prepare(decoder, latents, plan, memory_limit, tiling, window, bits, options)
    writer = open_video(path, fps=fps, codec=codec, quality=quality)
    folder = _store_folder(path)
    settings = {"tiling": job.plan.tiling, "output": job.plan.output, "bits": bits, **options}
    fingerprint = fingerprint_of(decoder, latents, **settings)
    # An array takes as much again as the frames that are kept.
    copies = 2 if os.fspath(path).lower().endswith(".npy") else 1
    with open_store(folder, job.plan, job.dtype, fingerprint, resume, copies) as store, writer:
        if store.parts != job.plan.parts:
            job = replace(job, plan=_replan(job, store.parts))
        kept = min(store.done)
        with contextlib.closing(_with_progress(job, store, progress)) as frames:
            for piece in frames:
                writer.write(piece)
    seconds = time.perf_counter() - began
    return DecodeReport(
        os.fspath(path), job.plan.frames, kept, seconds, job.meter.highest, footprint_bytes(), job.plan
    )


def kept_frames(path: str | os.PathLike[str]) -> tuple[Path, float] | None:
    """Where an unfinished decode to `path` is kept, and what share of it; None if there is none."""
    folder = _store_folder(path)
    share = finished_share(folder)
    return None if share is None else (folder, share)


def _store_folder(path: str | os.PathLike[str]) -> Path:
    return Path(os.fspath(path).rstrip("/").replace("%", "") + ".partial")


def _prepare(
    decoder: VideoDecoder,
    latents: mx.array,
    plan: DecodePlan | None,
    memory_limit: int | float | str | None,
    tiling: TilingConfig | int | None,
    window: Window | None,
    bits: int,
    options: dict[str, Any],
) -> _Job:
    decoder.stream(latents, timestep=options["timestep"], noise_scale=options["noise_scale"])
    if latents.shape[0] != 1:
        raise ValueError(
            f"frames come from one video at a time, got a batch of {latents.shape[0]}; "
            "decode latents[i : i + 1]"
        )
    if bits not in (8, 16):
        raise ValueError(f"bits must be 8 or 16, got {bits}")
    if not bool(mx.all(mx.isfinite(latents))):
        bad = [i for i in range(latents.shape[2]) if not bool(mx.all(mx.isfinite(latents[:, :, i])))]
        raise ValueError(f"latents must be finite, got NaN or infinity in the latent frames {bad}")
    if plan is None:
        plan = plan_decode(decoder, latents.shape, memory_limit=memory_limit, tiling=tiling, window=window)
    elif plan.latent_shape != tuple(latents.shape):
        raise ValueError(f"the plan is for latents of shape {plan.latent_shape}, got {latents.shape}")
    plan.require_fit()
    weights = list(dict(tree_flatten(decoder.parameters())).values())
    mx.eval(weights)
    others = mx.get_active_memory() - sum(value.nbytes for value in weights)
    return _Job(decoder, latents, plan, bits, options, PeakMeter(others))


def _replan(job: _Job, parts: tuple[Part, ...]) -> DecodePlan:
    """The plan of a job for parts that an earlier run has begun, under this run's limit."""
    plan = job.plan
    options: dict[str, Any] = {"tiling": plan.tiling, "window": plan.output, "parts": parts}
    plan = plan_decode(job.decoder, plan.latent_shape, memory_limit=plan.memory_limit, **options)
    plan.require_fit()
    return plan


def _with_progress(job: _Job, store: FrameStore | None, progress: bool) -> Generator[Frames]:
    """Several windows count each frame of each."""
    from tqdm import tqdm

    parts = len(job.plan.parts)
    unit, total = "frame" if parts == 1 else f"frame of {parts} windows", parts * job.plan.frames
    kept = 0 if store is None else sum(store.done)
    with tqdm(total=total, initial=kept, unit=f" {unit}", desc="decode", disable=not progress) as bar:
        yield from _decode(job, store, bar)


def _decode(job: _Job, store: FrameStore | None, bar: Any) -> Iterator[Frames]:
    """Finished frames of the whole output, those of the store first."""
    with contextlib.ExitStack() as stack:
        limit = job.plan.memory_limit + job.meter.others
        stack.enter_context(memory_limits(limit, cache=max(job.plan.chunk_bytes, 2**20)))
        parts = job.plan.parts
        if store is None and len(parts) == 1:
            for frames in _decode_part(job, parts[0], 0, bar):
                yield frames
            return
        if store is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "frames"
            store = stack.enter_context(open_store(folder, job.plan, job.dtype, {}, False))
        read = 0
        for index, part in enumerate(parts):
            yield from _read(store, read, min(store.done))
            read = min(store.done)
            for frames in _decode_part(job, part, store.done[index], bar):
                store.append(index, frames)
                yield from _read(store, read, min(store.done))
                read = min(store.done)
        yield from _read(store, read, job.plan.frames)


def _read(store: FrameStore, start: int, stop: int) -> Iterator[Frames]:
    for first in range(start, stop, 8):
        yield store.read(first, min(first + 8, stop))


def _decode_part(job: _Job, part: Part, done: int, bar: Any) -> Iterator[Frames]:
    """Checked frames of one part from its frame `done` on."""
    assert part.window.frames
    scale = job.decoder.config.temporal_scale
    pace = Pace(job.plan.latent_frames_per_step, job.plan.max_chunk_frames)
    origin, stop = part.window.frames.start, part.window.frames.stop
    failed_at, start, may_grow = -1, origin + done, job.plan.limited_by == MEMORY
    while start < stop:
        began = time.perf_counter()
        for piece in _stream(job, part, start, pace):
            frames, faults = _finish(piece, job.bits)
            del piece
            if faults:
                break
            yield frames
            start += len(frames)
            may_grow = _correct(pace, job, len(frames), time.perf_counter() - began, may_grow)
            bar.set_postfix_str(f"peak {format_bytes(job.meter.highest)}", refresh=False)
            bar.update(len(frames))
            began = time.perf_counter()
        else:
            return
        if failed_at == start:
            names = ", ".join(f"{start + index} is {fault}" for index, fault in faults)
            raise ArithmeticError(
                f"decoding failed twice: frame {names}; the {start - origin} frames before are sound. "
                "Try a smaller memory limit, float32 weights, or another machine"
            )
        failed_at = start
        pace.halve(scale)


def _stream(job: _Job, part: Part, start: int, pace: Pace) -> Iterator[mx.array]:
    """Pieces of one part from output frame `start` on."""
    assert part.window.frames
    decoder, latents, options = job.decoder, job.latents, job.options
    if isinstance(job.plan.tiling, TilingConfig):
        return _skip(decoder.stream_tiled(latents, job.plan.tiling, **options), start)
    window = replace(part.window, frames=slice(start, part.window.frames.stop))
    if part.latents is None:
        return decoder.stream(latents, window=window, pace=pace, **options)
    prepared = decoder.prepare_latents(latents, **{k: v for k, v in options.items() if k != "timestep"})
    rows, columns = part.latents
    window = replace(part, window=window).within(decoder.config.spatial_scale)
    options = {**options, "noise_scale": 0.0, "normalized": False}
    return decoder.stream(prepared[..., rows, columns], window=window, pace=pace, **options)


def _skip(pieces: Iterator[mx.array], count: int) -> Iterator[mx.array]:
    for piece in pieces:
        skipped = min(count, piece.shape[2])
        count -= skipped
        if skipped < piece.shape[2]:
            yield piece[:, :, skipped:]
        del piece


def _finish(piece: mx.array, bits: int) -> tuple[Frames, list[tuple[int, str]]]:
    """(1, 3, f, h, w) in [-1, 1] to integer frames (f, h, w, 3), and what is wrong with which."""
    most, dtype = 2**bits - 1, mx.uint8 if bits == 8 else mx.uint16
    large = piece.shape[3] * piece.shape[4] > CONSTANT_FRAME_PIXELS
    finished, faults = [], []
    for index in range(piece.shape[2]):
        x = piece[0, :, index].astype(mx.float32)
        frame = mx.round(mx.clip(x / 2 + 0.5, 0, 1) * most).astype(dtype).transpose(1, 2, 0)
        finite, varied = mx.all(mx.isfinite(x)), mx.max(x) > mx.min(x)
        mx.eval(frame, finite, varied)
        finished.append(np.array(frame))
        if not finite.item():
            faults.append((index, "not finite"))
        elif large and not varied.item():
            faults.append((index, "of one single value"))
    return np.stack(finished), faults


def _correct(pace: Pace, job: _Job, frames: int, seconds: float, may_grow: bool) -> bool:
    """Adapts the chunks to what was measured, once they have reached their steady size.

    Returns:
        Whether they may still grow, which they do once.
    """
    plan, scale = job.plan, job.decoder.config.temporal_scale
    used = job.meter.read()
    if frames < pace.limit(scale) or isinstance(plan.tiling, TilingConfig):
        return may_grow
    layers = len(list(job.decoder.config.layers()))
    slow = plan.backend != "cpu" and seconds / layers > EVALUATION_SECONDS
    if slow or used > plan.memory_limit:
        pace.halve(scale)
        job.meter.restart()
    elif may_grow and used < 0.8 * plan.peak_bytes and 2 * used - plan.lasting_bytes <= plan.memory_limit:
        pace.double(scale)
    return False
