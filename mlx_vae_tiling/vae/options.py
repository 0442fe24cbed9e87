"""What a decode depends on besides latents and weights: its options, and the noise of its seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_vae_tiling.arguments import require, told
from mlx_vae_tiling.vae.regions import Region

Timestep = float | Sequence[float] | mx.array | npt.NDArray[Any]


@dataclass(frozen=True)
class GivenOptions:
    """Options as a caller gives them, of kinds that they can have; None is the decoder's default.

    Args:
        causal, timestep, noise_scale, seed, normalized, num_inference_steps: As `StreamingDecoder.stream`.

    Raises:
        TypeError: If one is of no kind that it can have.
        ValueError: If the timestep is no finite and small number, or a sequence of none.
    """

    causal: bool | None = None
    timestep: Timestep | None = None
    noise_scale: float | None = None
    seed: int = 0
    normalized: bool = True
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        require("causal", self.causal, "True, False or None", bool, np.bool_, None)
        if self.timestep is not None:
            timesteps_of(self.timestep)
        require("noise_scale", self.noise_scale, "a number or None", Real, None)
        require("normalized", self.normalized, "True or False", bool, np.bool_)
        require("num_inference_steps", self.num_inference_steps, "an integer or None", Integral, None)

    def require_one_step(self) -> None:
        """Raises a `ValueError` if several steps are asked for, of a decoder that has one."""
        if self.num_inference_steps not in (None, 1):
            raise ValueError(
                f"num_inference_steps is for diffusion decoders, got {self.num_inference_steps} for another"
            )


@dataclass(frozen=True)
class DecodeOptions:
    """Options resolved for one decoder: its defaults filled in, checked, the same in every piece of a decode.

    Attributes:
        causal: Whether convolutions see past frames only.
        timestep: One number, or one per batch entry; empty for versions without timestep conditioning.
        noise_scale: Share of noise in the latents; 0 for versions without timestep conditioning.
        seed: Of all noise.
        normalized: Whether the latents are normalised per channel.
        inference_steps: Denoising steps of a diffusion decoder.
    """

    causal: bool
    timestep: tuple[float, ...]
    noise_scale: float
    seed: int
    normalized: bool
    inference_steps: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.noise_scale <= 1:
            raise ValueError(f"noise_scale must lie between 0 and 1, got {self.noise_scale}")
        object.__setattr__(self, "seed", seed_of(self.seed))  # NumPy's is written in another way
        if self.inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {self.inference_steps}")


def seed_of(seed: int) -> int:
    """A seed that MLX takes; raises a `ValueError` where it is none."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, got {told(seed)}")
    return int(seed)


def timesteps_of(timestep: object) -> tuple[float, ...]:
    """A timestep, or one for each batch entry, as numbers in float32.

    Raises:
        TypeError: If it is neither a number nor an array or list of them.
        ValueError: If there is none, or one is not finite or not small.
    """
    kinds = "a number, or an array or list of them"
    require("timestep", timestep, kinds, Real, list, tuple, mx.array, np.ndarray)
    # Planning asks for this too, and a number needs no device.
    given: Any = timestep.reshape(-1).tolist() if isinstance(timestep, mx.array | np.ndarray) else timestep
    numbers = given if isinstance(given, list | tuple) else [given]
    if not numbers:
        raise ValueError(f"timestep must be one number or one per batch entry, got {told(timestep)}")
    for number in numbers:
        require("timestep", number, kinds, Real)
        if not abs(number) < 1e9:
            raise ValueError(f"timestep must be finite and small, got {told(timestep)}")
    return tuple(float(np.float32(number)) for number in numbers)


@dataclass(frozen=True)
class Noise:
    """The noise of a whole video, of which chunks, windows and tiles take their part by position.

    Args:
        seed: Of all fields.
        size: Height and width of the whole video's latents.
        origin: Frame, row and column of the whole video's latents at which positions are counted from.
        given: (B, 3, frames, height, width), which replaces the drawn noise of pixels.
    """

    seed: int
    size: tuple[int, int]
    origin: tuple[int, int, int] = (0, 0, 0)
    given: mx.array | None = field(default=None, compare=False)

    def at(self, origin: tuple[int, int, int]) -> Noise:
        """The same noise, for positions that are counted from these latents."""
        return replace(self, origin=origin)

    def latents(self, region: Region, batch: int, channels: int) -> mx.array:
        """The noise of a region of the latents: (batch, channels, f, h, w) float32, drawn by the frame."""
        frames, rows, columns = self._place(region, 1, 1)
        drawn = [
            mx.random.normal((batch, channels, *self.size), key=self._key(0, 0, frame))[..., rows, columns]
            for frame in frames
        ]
        return mx.stack(drawn, axis=2)

    def field(self, number: int, region: Region, scale: int) -> mx.array:
        """The part (h, w) of a field that is the same for all frames and channels of a level.

        Args:
            number: Of the field, in decode order.
            region: Of the level.
            scale: Positions of the level per latent, along height and width.
        """
        size = self.size[0] * scale, self.size[1] * scale
        _, rows, columns = self._place(region, 1, scale)
        return mx.random.normal(size, key=self._key(1, 0, number))[rows, columns]

    def pixels(self, region: Region, batch: int, channels: int, scales: tuple[int, int]) -> mx.array:
        """The noise of a region of the frames: (batch, channels, f, h, w), drawn by the frame in float32.

        Args:
            region: Of the frames.
            batch, channels: Of the frames.
            scales: Frames, and pixels along height and width, per latent.
        """
        frames, rows, columns = self._place(region, *scales)
        if self.given is not None:
            return self._given(frames, rows, columns)
        # A clip that is padded is larger than its latents say.
        sizes = zip(self.size, self.origin[1:], region[1:], strict=True)
        size = [max(n * scales[1], start * scales[1] + span.size) for n, start, span in sizes]
        drawn = []
        for frame in frames:
            whole = mx.random.normal((batch, channels, *size), key=self._key(1, 1, frame))
            drawn.append(mx.contiguous(whole[..., rows, columns]))
            mx.eval(drawn[-1])
        return mx.stack(drawn, axis=2)

    @staticmethod
    def pixels_bytes(region: Region, planes: int) -> int:
        """What `pixels` takes with a copy in another order, in a region with so many numbers at a position.

        Each frame is drawn whole, beside the parts that are kept of those before.
        """
        kept, frame = planes * region.volume, planes * region.height.size * region.width.size
        return 4 * max(3 * kept, kept + frame)

    def _place(self, region: Region, time: int, side: int) -> tuple[range, slice, slice]:
        """Where a region lies in the whole video, at a level of so many frames and positions per latent."""
        first, top, left = (n * scale for n, scale in zip(self.origin, (time, side, side), strict=True))
        frames = range(first + region.time.start, first + region.time.stop)
        rows = slice(top + region.height.start, top + region.height.stop)
        return frames, rows, slice(left + region.width.start, left + region.width.stop)

    def _key(self, half: int, kind: int, number: int) -> mx.array:
        """The key of one field: by the half of the seed's key, the kind of noise and its number."""
        base = mx.random.split(mx.random.key(self.seed))[half]
        return mx.random.split(base ^ mx.array([kind, number], mx.uint32))[0]

    def _given(self, frames: range, rows: slice, columns: slice) -> mx.array:
        """A part of the array, whose borders are repeated beyond them, as those of a padded tile are."""
        assert self.given is not None
        part = self.given
        for axis, (start, stop) in enumerate(
            ((frames.start, frames.stop), (rows.start, rows.stop), (columns.start, columns.stop)), start=2
        ):
            size = part.shape[axis]
            if stop <= size:
                bounds = [slice(None)] * part.ndim
                bounds[axis] = slice(start, stop)
                part = part[tuple(bounds)]
            else:
                part = mx.take(part, mx.array([min(i, size - 1) for i in range(start, stop)]), axis=axis)
        return part
