"""Decodes the parts of a plan: within MLX's limits, looked at for faults, at a pace that is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_vae_tiling.runtime.autotune import plan_to_run
from mlx_vae_tiling.runtime.faults import of_the_device, tried_twice
from mlx_vae_tiling.runtime.frames import Frames, finish
from mlx_vae_tiling.runtime.planning.cost import Part
from mlx_vae_tiling.runtime.planning.memory import PeakMeter, memory_limits
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.planning.planner import MEMORY, plan_anew
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.options import DecodeOptions, Noise
from mlx_vae_tiling.vae.schedule import Pace

MOST_NAMED = 8
"""Frames that a message names."""

NO_FRAMES = np.zeros((0, 0, 0, 3), np.uint8)


class Failure(NamedTuple):
    """Why frames cannot be used.

    Args:
        faults: Index and fault of each frame that is wrong.
        error: What the device raised.
    """

    faults: tuple[tuple[int, str], ...] = ()
    error: RuntimeError | None = None

    def told(self, start: int, sound: int) -> Exception:
        """The error that ends a decode of which frame `start` failed twice, after so many sound frames."""
        before = f"the {sound} frames before are sound"
        if self.error is not None:
            return RuntimeError(
                f"decoding failed twice at frame {start}: {self.error}; {before}. Try a smaller memory limit"
            )
        names = ", ".join(f"{start + index} is {fault}" for index, fault in self.faults[:MOST_NAMED])
        names += f" and {more} more" if (more := len(self.faults) - MOST_NAMED) > 0 else ""
        return ArithmeticError(
            f"decoding failed twice: frame {names}; {before}. "
            "Try a smaller memory limit, float32 weights, or another machine"
        )


@dataclass
class Spent:
    """Adds up the seconds that computing takes; what the consumer does meanwhile is not counted."""

    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """A decode and everything it depends on.

    Args:
        decoder: The decoder, with its weights evaluated.
        latents: (B, C, F, H, W), finite.
        plan: For them; it fits.
        options: Of the decode.
        kind: Of the frames that are wanted: one of `frames.KINDS`, or "unit".
        backend: The plan's, opened.
        meter: Of the memory for arrays.
        noise: Of the whole video.
        checked: Whether frames are looked at for faults.
        spent: What decoding has taken.
        watch: Called before every step of the decoder; what it raises ends the decode.
    """

    decoder: StreamingDecoder
    latents: mx.array
    plan: DecodePlan
    options: DecodeOptions
    kind: str
    backend: Backend
    meter: PeakMeter
    noise: Noise
    checked: bool = True
    spent: Spent = field(default_factory=Spent)
    watch: Callable[[], object] | None = None

    @classmethod
    def prepare(
        cls,
        decoder: StreamingDecoder,
        latents: mx.array,
        options: DecodeOptions,
        kind: str,
        plan: DecodePlan | None,
        checked: bool = True,
        noise: mx.array | None = None,
        fitting: bool = True,
        **planning: Any,
    ) -> Job:
        """Checks all of it, and plans the decode where there is no plan yet.

        Args:
            decoder, latents, options, kind, checked: As `Job`.
            plan: For these latents; None to make one.
            noise: In place of that of the options' seed.
            fitting: Whether the plan has to fit.
            **planning: As `plan_to_run`.

        Raises:
            ValueError: If something does not fit something else.
            RuntimeError: If the device fails twice.
        """
        decoder.check(latents, options)
        noise_of_video = decoder.noise(latents.shape, options, noise)
        given = [] if noise_of_video.given is None else [noise_of_video.given]
        if checked:
            _require_finite("latents", latents, "latent frames")
            if noise is not None:
                _require_finite("noise", noise, "frames")
        if plan is None:
            planning |= {"causal": options.causal, "num_inference_steps": options.inference_steps}
            plan = plan_to_run(decoder, latents.shape, **planning)
        plan.require_match(decoder, latents.shape, options)
        if fitting:
            plan.require_fit()
        weights = list(dict(tree_flatten(decoder.parameters())).values())
        # Whichever thread goes on, it cannot compute what this one has only scheduled.
        tried_twice(lambda: mx.eval(latents, weights, given), "reading the weights")
        others = mx.get_active_memory() - sum(value.nbytes for value in weights)
        backend = plan.backend.opened()
        meter = PeakMeter(others, backend)
        return cls(decoder, latents, plan, options, kind, backend, meter, noise_of_video, checked)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32 if self.kind == "unit" else self.kind)

    def as_begun(self, parts: tuple[Part, ...], arithmetic: dict[str, Any]) -> Job:
        """The job that an earlier run has begun, with its parts and its forms, under this run's limit."""
        if (parts, arithmetic) == (self.plan.parts, self.plan.backend.arithmetic):
            return self
        job = self.planned_anew(parts, arithmetic)
        job.plan.require_fit_of_begun(len(self.plan.parts))
        return job

    def planned_anew(self, parts: tuple[Part, ...], arithmetic: dict[str, Any]) -> Job:
        """The same job for these parts, computed in these forms, under this run's limit, fitting or not."""
        old = self.plan
        backend = old.backend.computing_as(arithmetic)
        plan = plan_anew(self.decoder, old, parts, old.memory_limit, backend)
        self.meter.backend = plan.backend.opened()
        return replace(self, plan=plan, backend=self.meter.backend)

    def decode(
        self, part: Part, done: int = 0, report: Callable[[int], object] | None = None
    ) -> Iterator[Frames]:
        """Checked frames of one part from its frame `done` on.

        Frames that are not finite, or large and of one single value, are decoded once more with chunks of
        half the size, and so are those at which the device failed. MLX's limits are the plan's while a
        piece is computed, and no longer.

        Args:
            part: One of the plan's.
            done: Frames of it that are not wanted.
            report: Told how many frames are finished, each time that some are.

        Raises:
            ArithmeticError: If frames are wrong also the second time.
            RuntimeError: If the device fails also the second time.
        """
        pace = Pace(self.plan.latent_frames_per_step, self.plan.max_chunk_frames, self.watch)
        origin, stop, _ = part.pixels.time
        failed_at, start, may_grow = -1, origin + done, self.plan.limited_by == MEMORY
        while start < stop:
            pieces, failure = self._stream(part, start, pace), None
            while start < stop and failure is None:
                began = time.perf_counter()
                with self._limits():
                    frames, failure = self._next(pieces)
                    seconds = time.perf_counter() - began
                    self.spent.seconds += seconds
                    if failure is None:
                        count = frames.shape[2 if self.kind == "unit" else 0]
                        may_grow = self._correct(pace, count, seconds, may_grow)
                if failure is None:
                    start += count
                    if report:
                        report(count)
                    yield frames
            if failure is None:
                return
            if failed_at == start:
                raise failure.told(start, start - origin) from failure.error
            failed_at = start
            # The error's traceback holds the stream's frames.
            del pieces, failure
            mx.clear_cache()
            pace.halve(self.decoder.config.temporal_scale)

    def _next(self, pieces: Iterator[mx.array]) -> tuple[Frames, Failure | None]:
        """The next finished frames, and what is wrong with them."""
        try:
            frames, faults = finish(next(pieces), self.kind)
            # The failure of a command buffer may be told of by a later call only.
            mx.synchronize()
        except RuntimeError as error:
            if not of_the_device(error):
                raise
            return NO_FRAMES, Failure(error=error)
        return frames, Failure(tuple(faults)) if faults and self.checked else None

    def _limits(self) -> Any:
        limit = self.plan.memory_limit - self.plan.workspace_bytes + self.meter.others
        return memory_limits(limit, cache=self.backend.cache_bytes(limit, self.plan.chunk_bytes))

    def _stream(self, part: Part, start: int, pace: Pace) -> Iterator[mx.array]:
        """Pieces of one part from output frame `start` on; nothing is computed until one is asked for."""
        decoder, plan, options = self.decoder, self.plan, self.options
        if isinstance(plan.tiling, TilingConfig):
            pieces = decoder.run_tiled(self.latents, options, plan.tiling, self.backend, noise=self.noise)
            yield from _skip(pieces, start)
            return
        _, rows, columns = part.latents
        latents = self.latents[..., rows.slice, columns.slice]
        noise = self.noise.at((0, rows.start, columns.start))
        pixels = part.inside
        pixels = pixels.over(start, pixels.time.stop)
        # Integers are made of what was computed, and not of that in the latents' dtype.
        dtype = latents.dtype if self.kind == "unit" else decoder.dtype
        yield from decoder.run(latents, options, pixels, pace, noise, self.backend, dtype)

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


def _some(frames: list[int]) -> str:
    more = len(frames) - MOST_NAMED
    return f"{frames[:MOST_NAMED]} and {more} more" if more > 0 else str(frames)


def _require_finite(name: str, array: mx.array, frames: str) -> None:
    """Raises a `ValueError` that names the frames of (B, C, F, H, W) with values that are not finite."""

    def found() -> list[int]:
        return [i for i in range(array.shape[2]) if not mx.isfinite(array[:, :, i]).all().item()]

    if bad := tried_twice(found, f"looking at the {name}"):
        raise ValueError(f"{name} must be finite, got NaN or infinity in the {frames} {_some(bad)}")


def _skip(pieces: Iterator[mx.array], count: int) -> Iterator[mx.array]:
    for piece in pieces:
        skipped = min(count, piece.shape[2])
        count -= skipped
        if skipped < piece.shape[2]:
            yield piece[:, :, skipped:]
        del piece
