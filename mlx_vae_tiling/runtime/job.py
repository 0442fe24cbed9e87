"""Decodes the parts of a plan: within MLX's limits, looked at for faults, at a pace that is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_vae_tiling.runtime.cost import Part
from mlx_vae_tiling.runtime.frames import KINDS, Frames, finish
from mlx_vae_tiling.runtime.memory import PeakMeter, memory_limits
from mlx_vae_tiling.runtime.plan import DecodePlan
from mlx_vae_tiling.runtime.planner import MEMORY, plan_decode
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.options import DecodeOptions, Noise
from mlx_vae_tiling.vae.schedule import Pace

SMALLEST_CACHE_BYTES = 2**20


@dataclass(frozen=True)
class Job:
    """A decode and everything it depends on.

    Args:
        decoder: The decoder, with its weights evaluated.
        latents: (B, C, F, H, W), finite.
        plan: For them; it fits.
        options: Of the decode.
        kind: Of the frames that are wanted: one of `KINDS`.
        meter: Of MLX's memory.
        checked: Whether frames are looked at for faults.
    """

    decoder: StreamingDecoder
    latents: mx.array
    plan: DecodePlan
    options: DecodeOptions
    kind: str
    meter: PeakMeter
    checked: bool = True

    @classmethod
    def prepare(
        cls,
        decoder: StreamingDecoder,
        latents: mx.array,
        options: DecodeOptions,
        kind: str,
        plan: DecodePlan | None,
        checked: bool = True,
        **planning: Any,
    ) -> Job:
        """Checks all of it, and plans the decode where there is no plan yet.

        Args:
            decoder, latents, options, kind, checked: As `Job`.
            plan: For these latents; None to make one.
            **planning: As `plan_decode`.

        Raises:
            ValueError: If something does not fit something else.
        """
        if kind not in KINDS:
            raise ValueError(f"bits must be 8 or 16, got {kind.removeprefix('uint')}")
        decoder.check(latents, options)
        bad = [i for i in range(latents.shape[2]) if not mx.isfinite(latents[:, :, i]).all().item()]
        if checked and bad:
            raise ValueError(f"latents must be finite, got NaN or infinity in the latent frames {bad}")
        if plan is None:
            plan = plan_decode(decoder, latents.shape, causal=options.causal, **planning)
        plan.require_match(decoder, latents.shape, options)
        plan.require_fit()
        weights = list(dict(tree_flatten(decoder.parameters())).values())
        mx.eval(weights)
        others = mx.get_active_memory() - sum(value.nbytes for value in weights)
        return cls(decoder, latents, plan, options, kind, PeakMeter(others), checked)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32 if self.kind == "unit" else self.kind)

    def planned_anew(self, parts: tuple[Part, ...]) -> Job:
        """The same job for parts that an earlier run has begun, under this run's limit."""
        old = self.plan
        plan = plan_decode(
            self.decoder,
            old.latent_shape,
            memory_limit=old.memory_limit,
            backend=old.backend,
            tiling=old.tiling,
            window=None if isinstance(old.tiling, TilingConfig) else old.output.window,
            causal=old.causal,
            parts=parts,
        )
        plan.require_fit()
        return replace(self, plan=plan)

    def decode(
        self, part: Part, done: int = 0, report: Callable[[int], object] | None = None
    ) -> Iterator[Frames]:
        """Checked frames of one part from its frame `done` on.

        Frames that are not finite, or large and of one single value, are decoded once more with chunks of
        half the size. MLX's limits are the plan's while a piece is computed, and no longer.

        Args:
            part: One of the plan's.
            done: Frames of it that are not wanted.
            report: Told how many frames are finished, each time that some are.

        Raises:
            ArithmeticError: If frames are wrong also the second time.
        """
        pace = Pace(self.plan.latent_frames_per_step, self.plan.max_chunk_frames)
        origin, stop, _ = part.pixels.time
        failed_at, start, may_grow = -1, origin + done, self.plan.limited_by == MEMORY
        while start < stop:
            pieces = self._stream(part, start, pace)
            faults: list[tuple[int, str]] = []
            while start < stop and not faults:
                began = time.perf_counter()
                with self._limits():
                    frames, found = finish(next(pieces), self.kind)
                    faults = found if self.checked else []
                    if not faults:
                        count = frames.shape[2 if self.kind == "unit" else 0]
                        may_grow = self._correct(pace, count, time.perf_counter() - began, may_grow)
                if not faults:
                    start += count
                    if report:
                        report(count)
                    yield frames
            if not faults:
                return
            if failed_at == start:
                names = ", ".join(f"{start + index} is {fault}" for index, fault in faults)
                raise ArithmeticError(
                    f"decoding failed twice: frame {names}; the {start - origin} frames before are sound. "
                    "Try a smaller memory limit, float32 weights, or another machine"
                )
            failed_at = start
            pace.halve(self.decoder.config.temporal_scale)

    def _limits(self) -> Any:
        limit = self.plan.memory_limit + self.meter.others
        return memory_limits(limit, cache=max(self.plan.chunk_bytes, SMALLEST_CACHE_BYTES))

    def _stream(self, part: Part, start: int, pace: Pace) -> Iterator[mx.array]:
        """Pieces of one part from output frame `start` on."""
        decoder, plan, options = self.decoder, self.plan, self.options
        if isinstance(plan.tiling, TilingConfig):
            return _skip(decoder.run_tiled(self.latents, options, plan.tiling, plan.backend), start)
        _, rows, columns = part.latents
        latents = self.latents[..., rows.slice, columns.slice]
        noise = Noise(options.seed, (rows.size, columns.size), (0, rows.start, columns.start))
        pixels = part.inside
        return decoder.run(latents, options, pixels.over(start, pixels.time.stop), pace, noise, plan.backend)

    def _correct(self, pace: Pace, frames: int, seconds: float, may_grow: bool) -> bool:
        """Adapts the chunks to what was measured, once they have reached their steady size.

        Returns:
            Whether they may still grow, which they do once.
        """
        plan, scale = self.plan, self.decoder.config.temporal_scale
        used = self.meter.read()
        if frames < pace.limit(scale) or isinstance(plan.tiling, TilingConfig):
            return may_grow
        slow = seconds / len(self.decoder.steps(self.options)) > plan.backend.longest_evaluation_seconds
        if slow or used > plan.memory_limit:
            pace.halve(scale)
            self.meter.restart()
        elif may_grow and used < 0.8 * plan.peak_bytes and 2 * used - plan.lasting_bytes <= plan.memory_limit:
            pace.double(scale)
        return False


def _skip(pieces: Iterator[mx.array], count: int) -> Iterator[mx.array]:
    for piece in pieces:
        skipped = min(count, piece.shape[2])
        count -= skipped
        if skipped < piece.shape[2]:
            yield piece[:, :, skipped:]
        del piece
