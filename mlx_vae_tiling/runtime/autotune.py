"""Measures forms of the convolution before a decode that is long enough to gain by it, once on a machine."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_vae_tiling.dtypes import parse_dtype
from mlx_vae_tiling.runtime.faults import of_the_device, tried_twice
from mlx_vae_tiling.runtime.planning.cost import CostModel
from mlx_vae_tiling.runtime.planning.forms import levels_of
from mlx_vae_tiling.runtime.planning.memory import memory_limits
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.planning.planner import plan_decode
from mlx_vae_tiling.runtime.tuning.choices import ERROR_BOUNDS, Level, Trial, load_tuning, save_tuning, tune
from mlx_vae_tiling.runtime.tuning.measure import (
    error_of,
    machine_of,
    operations_of,
    sample_bytes,
    sample_of,
    seconds_of,
)
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.kernels.operands import Operands
from mlx_vae_tiling.vae.kernels.winograd_gpu import POSITIONS
from mlx_vae_tiling.vae.metal import MetalBackend

LONG_OPERATIONS = 5e13
"""From as many operations on a decode is long: 5 s at 10 TFLOP/s, of which a faster form may save two."""

TUNING_SECONDS = 2.0
"""What measuring may take before a decode."""

FIRST_OPERATIONS, LEAST_OPERATIONS, MOST_OPERATIONS = 2e10, 5e9, 1e12
"""Of the convolution that tells how fast the machine is, and of the others: enough to outweigh a launch."""

MEASURING = "measuring forms of the convolution"

Tell = Callable[[str], object]


def plan_to_run(
    decoder: StreamingDecoder,
    latent_shape: tuple[int, ...],
    *,
    no_tune: bool = False,
    tell: Tell | None = None,
    **planning: Any,
) -> DecodePlan:
    """The plan of a decode that is about to begin.

    Before a long one on Metal (5e13 operations or more), the forms of those convolutions are measured that
    never were on this machine at these sizes: for two seconds, at the end of which no other is begun. What
    was measured is kept in the user's cache; what was not is left to the next long decode.

    Args:
        decoder: The decoder.
        latent_shape: (B, C, F, H, W).
        no_tune: Measures nothing, and takes no form for having been measured.
        tell: Told in one line that something is measured; None to log that.
        **planning: As `plan_decode`.
    """
    plan = plan_decode(decoder, latent_shape, no_tune=no_tune, **planning)
    competing = isinstance(plan.backend, MetalBackend) and plan.backend.form is None
    if no_tune or not competing or not plan.fits or plan.operations < LONG_OPERATIONS:
        return plan
    tell = tell or logging.getLogger(__name__).info
    return plan_decode(decoder, latent_shape, **planning) if tune_for(decoder, plan, tell) else plan


def tune_for(
    decoder: StreamingDecoder,
    plan: DecodePlan,
    tell: Tell,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Level]:
    """Measures what never was of the convolutions of a decode, and keeps it.

    Args:
        decoder: The decoder.
        plan: Of the decode, whose memory limit holds here too.
        tell: Told in one line, if anything is measured.
        clock: Tells the time in seconds.

    Returns:
        The levels that were measured.
    """
    dtype, backend = parse_dtype(plan.dtype), decoder.policy(plan.backend.name)
    model = CostModel(decoder, plan.latent_shape, dtype, backend, decoder.options(causal=plan.causal))
    machine, tuning = machine_of(backend, dtype), load_tuning()
    works = levels_of(model, plan.latent_frames_per_step).values()
    missing = {work.level: work.frames for work in works if not tuning.of(machine, work.level)}
    if not missing:
        return []
    tell(
        f"measuring {len(missing)} kinds of convolution on {machine}, once, "
        f"for about {TUNING_SECONDS:g} s (--no-tune, no_tune=True: not)"
    )
    room = plan.memory_limit - plan.weight_bytes
    began, operations = clock(), 0.0

    def measure(level: Level) -> list[Trial]:
        nonlocal operations
        if not operations:
            rate = tried_twice(lambda: rate_of(backend, level, dtype), MEASURING)
            left = TUNING_SECONDS - (clock() - began)
            # A reference, and of each form its error, a run to warm up and one that counts.
            operations = rate * left / (len(missing) * (1 + 3 * len(backend.forms)))
            operations = min(max(operations, LEAST_OPERATIONS), MOST_OPERATIONS)
        frames = min(missing[level], plan.max_chunk_frames or missing[level])
        return measure_forms(backend, level, frames, dtype, operations, room)

    with memory_limits(plan.memory_limit + mx.get_active_memory()):
        measured = tune(tuning, machine, list(missing), measure, seconds=TUNING_SECONDS, clock=clock)
    mx.clear_cache()
    save_tuning(tuning)
    return measured


def rate_of(backend: Backend, level: Level, dtype: mx.Dtype) -> float:
    """Operations per second of the default form on a part of a level, roughly."""
    part, frames = part_of(backend, level, 2, dtype, FIRST_OPERATIONS)
    sample, form = sample_of(backend, part, frames, dtype), backend.default_form(dtype)
    return sample.operations / seconds_of(backend, form, sample, 1)


def part_of(
    backend: Backend, level: Level, frames: int, dtype: mx.Dtype, operations: float
) -> tuple[Level, int]:
    """The rows and the frames of a level with about so many operations.

    Two frames at least, where there are, as some forms compute pairs of them; and rows enough for the
    kernels that the whole level takes.
    """
    frames = min(frames, max(2, int(operations // operations_of(level, 1))))
    rows = int(operations // operations_of(level._replace(height=1), frames))
    operands = Operands(1, frames, *level, dtype.size)
    least = -(-POSITIONS // level.width) if "winograd32" in backend.forms_at(operands) else 1
    return level._replace(height=min(level.height, max(rows, least))), frames


def measure_forms(
    backend: Backend, level: Level, frames: int, dtype: mx.Dtype, operations: float, room: int
) -> list[Trial]:
    """Times the accurate forms at a level, each once.

    Args:
        backend: Whose forms.
        level: The level, and
        frames: those of a piece.
        dtype: In which the decoder computes.
        operations: How many each may take, about.
        room: Bytes that there are.

    Returns:
        A trial of each form. One that is inaccurate, at which the device fails or for which there is no room
        takes infinitely long.
    """
    part, frames = part_of(backend, level, frames, dtype, operations)
    sample, trials = tried_twice(lambda: sample_of(backend, part, frames, dtype), MEASURING), []
    default, bound = backend.default_form(dtype), ERROR_BOUNDS[machine_of(backend, dtype).dtype]
    for form in backend.forms_at(Operands(1, frames, *level, dtype.size)):
        seconds = error = math.inf
        if sample_bytes(backend, form, part, frames, dtype) <= room:
            try:
                error = error_of(backend, form, sample)
                if form == default or error <= bound:
                    seconds = seconds_of(backend, form, sample, 1)
            except RuntimeError as failure:
                if not of_the_device(failure):
                    raise
                error = math.inf
        trials.append(Trial(form, seconds, error, sample.operations))
    return trials
