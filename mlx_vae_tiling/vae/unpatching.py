"""The last step of every decoder: patches become frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_vae_tiling.vae.backend import Taken, Where
from mlx_vae_tiling.vae.needs import Chained
from mlx_vae_tiling.vae.operations import cut, unpatchify
from mlx_vae_tiling.vae.regions import Need, Upsampling
from mlx_vae_tiling.vae.schedule import Read, Step


@dataclass(frozen=True)
class Unpatching:
    """Patches (B, F', H'/p, W'/p, 3*p*p) to frames (B, 3, F', H', W').

    Args:
        channels: Of the frames.
        patch_size: Rows and columns of a patch.
        dtype: Of the frames.
        need: Where the frames lie in those of all patches.
        unpatched: As `unpatchify`, for another order or range of the patches' numbers.
        arrays: That `unpatched` makes beside its input, at once.
    """

    channels: int
    patch_size: int
    dtype: mx.Dtype
    need: Need
    unpatched: Callable[[mx.array, int], mx.array] = unpatchify
    arrays: int = 1

    def step(self, producer: int) -> Step:
        """After the step that makes the patches."""
        need = Chained(self.need, self._patches)
        return Step(self._frames, self._taken, (Read(producer, need),), self.channels)

    @property
    def _patches(self) -> Upsampling:
        return Upsampling((1, self.patch_size, self.patch_size))

    def _frames(self, inputs: Sequence[mx.array], where: Where) -> mx.array:
        parts = self._patches.slices(where.inputs[0], self.need.before(where.output))
        return cut(self.unpatched(inputs[0], self.patch_size), parts, first_axis=2).astype(self.dtype)

    def _taken(self, where: Where) -> Taken:
        planes = where.batch * self.channels
        made, kept = planes * where.inputs[0].volume * self.patch_size**2, planes * where.output.volume
        copied = where.dtype.size * kept * (kept < made) + self.dtype.size * kept * (
            self.dtype != where.dtype
        )
        return Taken(where.dtype.size * made * self.arrays + copied, made)
