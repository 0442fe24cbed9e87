"""What was measured on this machine, applied to a decode: which forms it takes, and how long it will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import mlx.core as mx

from mlx_vae_tiling.dtypes import parse_dtype
from mlx_vae_tiling.runtime.cost import Part
from mlx_vae_tiling.runtime.measure import Work, machine_of, work_of
from mlx_vae_tiling.runtime.plan import DecodePlan
from mlx_vae_tiling.runtime.tuning import Tuning, load_tuning
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.convolution import ConvolutionForm
from mlx_vae_tiling.vae.metal import MetalBackend
from mlx_vae_tiling.vae.regions import Region, Window
from mlx_vae_tiling.vae.schedule import Step


def tuned_backend(
    backend: Backend,
    steps: Sequence[Step],
    everything: Region,
    dtype: mx.Dtype,
    tuning: Tuning | None = None,
) -> Backend:
    """The backend with the forms that were measured to be best here.

    Args:
        backend: Without a tuned form; where a form is pinned, it stays.
        steps: The decoder.
        everything: All of the output, whatever part of it is decoded.
        dtype: In which the decoder computes.
        tuning: What was measured; None for what is kept in the user's cache.
    """
    if not isinstance(backend, MetalBackend) or backend.form is not None:
        return backend
    machine, default = machine_of(backend, dtype), backend.default_form(dtype)
    tuning = load_tuning() if tuning is None else tuning
    forms = {
        channels: cast(ConvolutionForm, tuning.form(machine, work.level, default))
        for channels, work in levels_of(steps, everything).items()
    }
    better = tuple((channels, form) for channels, form in forms.items() if form != default)
    return replace(backend, tuned=better)


def measured_seconds(
    backend: Backend,
    steps: Sequence[Step],
    everything: Region,
    parts: Sequence[Part],
    dtype: mx.Dtype,
    tuning: Tuning | None = None,
) -> float | None:
    """How long the convolutions of a decode take at the rates measured here; None where one was not.

    Args:
        backend, steps, everything, dtype, tuning: As `tuned_backend`.
        parts: What is decoded.
    """
    tuning = load_tuning() if tuning is None else tuning
    machine, levels = machine_of(backend, dtype), levels_of(steps, everything)
    if not levels:
        return None
    seconds = 0.0
    for part in parts:
        for level, _, operations in work_of(steps, part.inside, 1):
            channels = level.channels_in, level.channels_out
            form = backend.form or backend.default_form(dtype)
            if isinstance(backend, MetalBackend):
                form = backend.form_of(*channels)
            whole = levels[channels].level
            taken = tuning.seconds(machine, {(whole, form): float(operations)})
            if taken is None:
                return None
            seconds += taken
    return seconds


def expected_seconds(
    decoder: StreamingDecoder, plan: DecodePlan, tuning: Tuning | None = None
) -> float | None:
    """How long the convolutions of a plan take at the rates measured here.

    None where one was not measured, and for decoders that have no such convolutions.

    Args:
        decoder: For which the plan was made; its weights are not looked at.
        plan: The plan.
        tuning: As `tuned_backend`.
    """
    steps = decoder.steps(decoder.options(causal=plan.causal))
    everything = Window().region(*decoder.output_shape(plan.latent_shape)[2:])
    dtype, batch = parse_dtype(plan.dtype), plan.latent_shape[0]
    # Tiles that are blended are one part, of which some is decoded several times.
    repeats = batch * (plan.recompute if isinstance(plan.tiling, TilingConfig) else 1)
    seconds = measured_seconds(plan.backend, steps, everything, plan.parts, dtype, tuning)
    return None if seconds is None else seconds * repeats


def levels_of(
    steps: Sequence[Step], everything: Region, latent_frames: int = 1
) -> dict[tuple[int, int], Work]:
    """The convolutions that are measured, by channels in and out, those with most operations first.

    Of all with the same channels, that is, those with most operations.

    Args:
        steps, everything: As `tuned_backend`.
        latent_frames: Taken in at a time.
    """
    found: dict[tuple[int, int], Work] = {}
    for work in work_of(steps, everything, latent_frames):
        found.setdefault((work.level.channels_in, work.level.channels_out), work)
    return found
