"""What a caller asks for, made into the job, the fingerprint and the sound of one decode."""

from __future__ import annotations

import os
import sys
from numbers import Integral
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_vae_tiling.arguments import require, told
from mlx_vae_tiling.media.video import frame_rate
from mlx_vae_tiling.runtime.frames import KINDS
from mlx_vae_tiling.runtime.job import Job
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.resuming.journal import fingerprint_of, hash_of
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.regions import Window


class Settings(NamedTuple):
    """The options of a decode as a caller gives them, as `decode_frames`.

    They are checked as `GivenOptions` when the job is made, where a failure is told to other ranks.
    """

    causal: bool | None = None
    timestep: float | None = None
    noise_scale: float | None = None
    seed: int = 0
    normalized: bool = True
    num_inference_steps: int | None = None


class Planning(NamedTuple):
    """What a plan is made of, where none is given, as `decode_frames`."""

    memory_limit: int | float | str | None = None
    tiling: TilingConfig | int | None = None
    window: Window | None = None
    no_tune: bool = False


def new_job(
    decoder: StreamingDecoder,
    latents: mx.array,
    bits: int,
    plan: DecodePlan | None,
    settings: Settings,
    planning: Planning,
    noise: mx.array | None,
    progress: bool = False,
    fitting: bool = True,
) -> Job:
    """The job of one video's frames of so many bits, with what a plan says where the settings say nothing."""
    require("plan", plan, "a DecodePlan or None", DecodePlan, None)
    require("bits", bits, "8, 16 or 32", Integral)
    if bits not in KINDS:
        raise ValueError(f"bits must be 8, 16 or 32, got {bits}")
    if not isinstance(decoder, StreamingDecoder):
        raise TypeError(f"the decoder must be one, got a {type(decoder).__name__}; load_decoder loads it")
    if plan is not None:
        for name in ("memory_limit", "tiling", "window"):
            if (given := getattr(planning, name)) is not None:
                raise ValueError(
                    f"a plan has its own {name}, got {told(given)} beside it; pass that to plan_decode"
                )
        if settings.causal is None:
            settings = settings._replace(causal=plan.causal)
        if settings.num_inference_steps is None:
            settings = settings._replace(num_inference_steps=plan.inference_steps)
    job = Job.prepare(
        decoder,
        latents,
        decoder.options(**settings._asdict()),
        KINDS[bits],
        plan,
        noise=noise,
        fitting=fitting,
        tell=_print if progress else None,
        **planning._asdict(),
    )
    if len(latents) != 1:
        raise ValueError(
            f"frames come from one video at a time, got a batch of {len(latents)}; decode latents[i : i + 1]"
        )
    return job


def fingerprint_job(job: Job, noise: mx.array | None) -> dict[str, str]:
    """What a resumed decode, and all ranks of one, have to share."""
    settings: dict[str, Any] = {
        "tiling": job.plan.tiling,
        "output": job.plan.output,
        "bits": 8 * job.dtype.itemsize,
    }
    settings |= vars(job.options)
    settings |= {"backend": job.plan.backend.name, "convolution_form": job.decoder.convolution_form}
    if noise is not None:
        settings["noise"] = hash_of(noise).hex()
    return fingerprint_of(job.decoder, job.latents, **settings)


def _print(text: str) -> None:
    print(text, file=sys.stderr)


def sound_of(audio: str | os.PathLike[str] | None, plan: DecodePlan, fps: float | str) -> dict[str, Any]:
    """What `open_video` needs to cut the sound of a clip to the window that is decoded."""
    if audio is None:
        return {}
    frames, rate = plan.output.time, frame_rate(fps)
    return {
        "audio": audio,
        "audio_start_seconds": float(frames.start / rate),
        "clip_seconds": float(frames.size / rate),
    }
