"""What this machine does with a decoder: the numbers that a plan and a choice of forms rest on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_vae_tiling.runtime.planning.memory import PeakMeter
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.planning.planner import plan_decode
from mlx_vae_tiling.runtime.run import decode_frames
from mlx_vae_tiling.runtime.tuning.choices import ERROR_BOUNDS, Level, Machine, Trial, choose
from mlx_vae_tiling.runtime.tuning.measure import (
    Pass,
    machine_of,
    measure_form,
    operations_of,
    pass_rates,
    product_rate,
    sample_of,
    work_of,
)
from mlx_vae_tiling.tiling import SpatialTilingConfig, TilingConfig
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.metal import MetalBackend

TRIAL_OPERATIONS = 2e12
"""Of a form's trial on a GPU: fewer frames are taken above it; on the CPU, a hundredth."""


SAMPLE_SECONDS = 0.01
"""Between two looks at the memory in use."""


class Forms(NamedTuple):
    """Every form at one level.

    Attributes:
        level, frames: What was computed.
        share: Of the decode's operations.
        trials: One of each form.
        chosen: The fastest that is accurate.
    """

    level: Level
    frames: int
    share: float
    trials: list[Trial]
    chosen: str


class Decode(NamedTuple):
    """A decode, measured.

    Attributes:
        name: What is special about it.
        plan: How it was planned.
        frames, seconds: That came out, and what that took.
        longest_seconds: For one piece.
        peak_bytes: Of the memory for arrays, as the plan counts it.
        evaluation_seconds: The longest evaluation, where the backend waits for each; else 0.
        memory: Seconds since it began, and bytes that MLX held then.
    """

    name: str
    plan: DecodePlan
    frames: int
    seconds: float
    longest_seconds: float
    peak_bytes: int
    evaluation_seconds: float
    memory: list[tuple[float, int]]


@dataclass(frozen=True)
class Bench:
    """All that was measured.

    Attributes:
        machine: Device, version of MLX and dtype.
        device: MLX's own description.
        product: Operations per second of a matrix product.
        forms: By level.
        passes: On the input of the first level; like forms, none for a decoder without such convolutions.
        decodes: Of the same latents.
    """

    machine: Machine
    device: dict[str, Any]
    product: float
    forms: list[Forms]
    passes: list[Pass]
    decodes: list[Decode]


@dataclass(frozen=True)
class Policy(MetalBackend):
    """Metal's policy with other rules for evaluation and cache, for comparison.

    Args:
        waits: Whether each step is evaluated before the next.
        cache: Limit of the cache in bytes; None for the backend's own.
        evaluations: Gets the seconds of each evaluation.
    """

    waits: bool = True
    cache: int | None = None
    evaluations: list[float] = field(default_factory=list, compare=False)

    def settle(self, *arrays: mx.array) -> None:
        began = time.perf_counter()
        if self.waits:
            super().settle(*arrays)
            self.evaluations.append(time.perf_counter() - began)
        else:
            Backend.settle(self, *arrays)

    def cache_bytes(self, memory_limit: int, chunk_bytes: int) -> int:
        return super().cache_bytes(memory_limit, chunk_bytes) if self.cache is None else self.cache


def bench(
    decoder: StreamingDecoder,
    latents: mx.array,
    *,
    memory_limit: int | float | str | None = None,
    quick: bool = False,
    tell: Callable[[str], object] = lambda text: None,
) -> Bench:
    """Measures forms, passes and whole decodes.

    Args:
        decoder: With its weights.
        latents: (1, C, F, H, W).
        memory_limit: As `plan_decode`.
        quick: Measures everything once, on less.
        tell: Told what is being measured.
    """
    mx.eval(decoder.parameters(), latents)
    backend, dtype = decoder.policy(), decoder.dtype
    machine = machine_of(backend, dtype)
    plan = plan_decode(decoder, latents.shape, memory_limit=memory_limit)
    tell("products and passes")
    steps = decoder.steps(decoder.options(), latents.dtype)
    work = work_of(steps, plan.output, plan.latent_frames_per_step, plan.max_chunk_frames)
    slowness = 1 if backend.device_memory() else 100
    product = product_rate(512 if quick else 4096 if slowness == 1 else 1024, dtype)
    passes = pass_rates(work[0].level, work[0].frames, dtype) if work else []
    total, forms = sum(one.operations for one in work), []
    for level, frames, operations in work[: 2 if quick else None]:
        tell(f"forms at {level}")
        frames = max(1, min(frames, int(TRIAL_OPERATIONS / slowness // operations_of(level, 1))))
        sample = sample_of(backend, level, frames, dtype)
        trials = [measure_form(backend, form, sample, 1 if quick else 3) for form in backend.forms]
        del sample
        chosen = choose(trials, ERROR_BOUNDS[machine.dtype], backend.default_form(dtype))
        forms.append(Forms(level, frames, operations / total, trials, chosen))
    decodes = []
    for name, variant in _variants(decoder, plan, quick):
        tell(f"decode, {name}")
        decodes.append(_decode(decoder, latents, name, variant))
    return Bench(machine, backend.device(), product, forms, passes, decodes)


def _variants(decoder: StreamingDecoder, plan: DecodePlan, quick: bool) -> Iterator[tuple[str, DecodePlan]]:
    """Plans of the same latents: whole, streamed at several paces, in windows, blended, by other policies."""
    shape, limit = plan.latent_shape, plan.memory_limit

    def planned(budget: int = limit, **options: Any) -> DecodePlan:
        return plan_decode(decoder, shape, memory_limit=budget, backend=plan.backend, **options)

    whole = planned(chunk=(shape[2], None))
    if whole.fits:
        yield "whole", whole
    yield "as planned", plan
    if quick:
        return
    paces: list[tuple[int, int | None]] = [(step, None) for step in (1, 2, 4) if step < shape[2]]
    for chunk in [(1, 2), *paces]:
        streamed = planned(chunk=chunk)
        if streamed.fits and chunk != (plan.latent_frames_per_step, plan.max_chunk_frames):
            yield (
                f"{chunk[0]} latent frames a step" + f", {chunk[1]} in a layer" * (chunk[1] is not None),
                streamed,
            )
    windows = _in_windows(planned, plan)
    if windows:
        yield f"{len(windows.parts)} windows", windows
    tile = 32 * max(2, min(shape[3:]) // 2)
    blended = planned(tiling=TilingConfig(SpatialTilingConfig(tile, tile // 4 // 32 * 32)))
    if blended.fits:
        yield f"blended tiles of {tile} pixels", blended
    if isinstance(plan.backend, MetalBackend):
        yield from _policies(plan)


def _in_windows(planned: Callable[..., DecodePlan], plan: DecodePlan) -> DecodePlan | None:
    """The plan with the largest of some smaller budgets that needs several windows."""
    budget = plan.peak_bytes
    while budget > plan.weight_bytes:
        budget = budget * 3 // 4
        smaller = planned(budget)
        if not smaller.fits:
            return None
        if len(smaller.parts) > 1:
            return smaller
    return None


def _policies(plan: DecodePlan) -> Iterator[tuple[str, DecodePlan]]:
    yield "nothing waited for", replace(plan, backend=_policy(plan.backend, waits=False))
    yield "cache of one chunk", replace(plan, backend=_policy(plan.backend, cache=plan.chunk_bytes))
    yield "no cache", replace(plan, backend=_policy(plan.backend, cache=1))


def _policy(backend: Backend, **rules: Any) -> Policy:
    """A backend's forms under other rules."""
    return Policy(**{one.name: getattr(backend, one.name) for one in fields(backend)}, **rules)


def _decode(decoder: StreamingDecoder, latents: mx.array, name: str, plan: DecodePlan) -> Decode:
    evaluations: list[float] = []
    if type(plan.backend) is MetalBackend:
        plan = replace(plan, backend=_policy(plan.backend, evaluations=evaluations))
    weights = sum(value.nbytes for value in dict(tree_flatten(decoder.parameters())).values())
    mx.clear_cache()
    before, frames, longest = mx.get_active_memory() - weights, 0, 0.0
    backend = plan.backend.opened()
    meter = PeakMeter(before, backend)
    with _sampled(before) as memory:
        began = last = time.perf_counter()
        for piece in decode_frames(decoder, latents, plan=replace(plan, backend=backend)):
            meter.read()
            frames += len(piece)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        seconds = time.perf_counter() - began
    meter.read()
    return Decode(name, plan, frames, seconds, longest, meter.highest, max(evaluations, default=0.0), memory)


@contextlib.contextmanager
def _sampled(before: int) -> Iterator[list[tuple[float, int]]]:
    """What MLX holds beyond `before`, again and again while the block runs."""
    samples: list[tuple[float, int]] = []
    ended, began = threading.Event(), time.perf_counter()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            samples.append((time.perf_counter() - began, mx.get_active_memory() - before))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
