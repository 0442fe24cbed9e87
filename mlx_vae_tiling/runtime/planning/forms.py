"""What was measured on this machine, applied to a decode: which forms it takes, and how long it will take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from mlx_vae_tiling.dtypes import parse_dtype
from mlx_vae_tiling.runtime.planning.cost import CostModel
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.tuning.choices import Tuning, load_tuning
from mlx_vae_tiling.runtime.tuning.measure import Work, machine_of, work_of
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.convolution import ConvolutionForm
from mlx_vae_tiling.vae.metal import MetalBackend
from mlx_vae_tiling.vae.regions import Region

FULL_HD = 1920 * 1088

SMALLEST_BLOCK_BYTES = 128 * 2**20
"""Smaller ones took 0.9 of the time of "folded" on the modelled GPU, and many launches."""

KEYS_ANEW_SECONDS = 2.7
"""Of an operation that makes keys and values anew, over those of others: what it makes is also normalised,
rotated and joined. On the modelled GPU, 1.12 of the time for 1.05 of the work and 1.29 for 1.10."""


def tuned_backend(model: CostModel, tuning: Tuning | None = None) -> Backend:
    """The backend of a model with the forms that were measured to be best here.

    Args:
        model: Its backend is without a tuned form; where a form is pinned, it stays.
        tuning: What was measured; None for what is kept in the user's cache.
    """
    backend, dtype = model.backend, model.dtype
    if not isinstance(backend, MetalBackend) or backend.form is not None:
        return backend
    machine, default = machine_of(backend, dtype), backend.default_form(dtype)
    tuning = load_tuning() if tuning is None else tuning
    forms = {
        channels: cast(ConvolutionForm, tuning.form(machine, work.level, default))
        for channels, work in levels_of(model).items()
    }
    better = tuple((channels, form) for channels, form in forms.items() if form != default)
    return replace(backend, tuned=better)


def in_blocks(backend: Backend, everything: Region, budget: int) -> list[Backend]:
    """The backend with smaller and smaller blocks of "winograd32", if it takes that form.

    A block's bytes decide where rows are cut, and so they are of a plan, not of a window or a chunk. The
    first are twice as large for twice the area of full HD, where a budget of eight times that allows it:
    on the modelled GPU that took 0.83 of the time at 3840x2176, and at smaller sizes as long as before.

    Args:
        backend: As `tuned_backend` gives it.
        everything: All of the output, whatever part of it is decoded.
        budget: Bytes that the decode may take.
    """
    if not isinstance(backend, MetalBackend):
        return [backend]
    if "winograd32" not in (backend.form, *(form for _, form in backend.tuned)):
        return [backend]
    size = backend.block_bytes
    while 2 * size * FULL_HD <= backend.block_bytes * everything.area and 2 * size <= budget // 8:
        size *= 2
    count = max(0, (size // SMALLEST_BLOCK_BYTES).bit_length() - 1)
    return [replace(backend, block_bytes=size >> n) for n in range(count + 1)]


def fewest_windows(planned: Callable[[Backend], DecodePlan], backends: list[Backend]) -> DecodePlan:
    """The plan that repeats least: a faster form that takes so much memory that halos are repeated is none.

    Args:
        planned: Plans with a backend.
        backends: The fastest first, then what takes less memory.
    """
    best = planned(backends[0])
    # Where the first does not fit, the search for windows is long, and only the smallest are tried.
    for backend in backends[1:] if best.fits else backends[1:][-2:]:
        if best.fits and len(best.parts) == 1:
            break
        other = planned(backend)
        if best.fits and other.fits:
            best = min(best, other, key=lambda plan: len(plan.parts))
        elif not best.fits:
            best = min(other, best, key=lambda plan: (not plan.fits, plan.peak_bytes))
    return best


def or_making_keys_anew(
    best: DecodePlan, planned: Callable[[Backend], DecodePlan], modelled: Callable[[Backend], CostModel]
) -> DecodePlan:
    """A plan, or the one that holds less and makes it anew, where that is expected to be faster.

    Args:
        best: Where it does not fit, neither did the other in all that was tried: 768 to 3840 pixels wide,
            3 to 32 GB; where it is one window, it repeats nothing.
        planned: Plans with a backend.
        modelled: What decodes cost with a backend.
    """
    backend = replace(best.backend, makes_keys_anew=True)
    model = modelled(backend)
    if not best.fits or len(best.parts) == 1 or not any(step.repeated for step in model.steps):
        return best
    other = planned(backend)
    once = sum(model.operations(part) for part in other.parts)
    expected = once + KEYS_ANEW_SECONDS * (other.operations - once)
    return other if other.fits and expected < best.operations else best


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
    backend, dtype = plan.backend, parse_dtype(plan.dtype)
    model = CostModel(decoder, plan.latent_shape, dtype, backend, decoder.options(causal=plan.causal))
    tuning = load_tuning() if tuning is None else tuning
    machine, levels = machine_of(backend, dtype), levels_of(model)
    if not levels:
        return None
    seconds = 0.0
    for part in plan.parts:
        for level, _, operations in work_of(model.steps, part.inside, 1):
            channels = level.channels_in, level.channels_out
            form = backend.form or backend.default_form(dtype)
            if isinstance(backend, MetalBackend):
                form = backend.form_of(*channels)
            whole = levels[channels].level
            taken = tuning.seconds(machine, {(whole, form): float(operations)})
            if taken is None:
                return None
            seconds += taken
    # Tiles that are blended are one part, of which some is decoded several times.
    return seconds * plan.latent_shape[0] * (plan.recompute if isinstance(plan.tiling, TilingConfig) else 1)


def levels_of(model: CostModel, latent_frames: int = 1) -> dict[tuple[int, int], Work]:
    """The convolutions that are measured, by channels in and out, those with most operations first.

    Of all with the same channels, that is, those with most operations in all of the output.

    Args:
        model: Of the decode.
        latent_frames: Taken in at a time.
    """
    found: dict[tuple[int, int], Work] = {}
    for work in work_of(model.steps, model.everything, latent_frames):
        found.setdefault((work.level.channels_in, work.level.channels_out), work)
    return found
