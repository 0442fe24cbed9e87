"""The policy for Metal: which kernels MLX is led to, what is evaluated when, and what that takes.

All of it was read off MLX's code, and counted on its Metal host code over a stub driver: on no Mac yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import mlx.core as mx

from mlx_vae_tiling.vae.backend import Backend, BackendName, known_form
from mlx_vae_tiling.vae.blocks import Stride
from mlx_vae_tiling.vae.convolution import ConvolutionForm
from mlx_vae_tiling.vae.kernels import convolution_gpu as gpu
from mlx_vae_tiling.vae.kernels.operands import Operands
from mlx_vae_tiling.vae.operations import Activation, Padding, pixel_norm, replicate


@dataclass(frozen=True)
class MetalBackend(Backend):
    """Evaluates each step before the next, so that the peak is the predicted one.

    Dozens of command buffers may be under way at a time, each of which holds what it reads and writes:
    without waiting, a decode of full HD took 1.9 times the memory.

    Args:
        form: Pins a form of convolution.
        block_bytes: Bound of one block, where a convolution is computed in blocks.
        tuned: Forms that were measured to be better here, by channels in and out. They depend on nothing
            that differs between chunks or windows, lest frames do.
    """

    name: BackendName = "metal"
    block_bytes: int = gpu.BLOCK_BYTES
    tuned: tuple[tuple[tuple[int, int], ConvolutionForm], ...] = ()

    def form_of(self, channels_in: int, channels_out: int) -> ConvolutionForm:
        """The form of a convolution."""
        return self.form or dict(self.tuned).get((channels_in, channels_out), "folded")

    @property
    def arithmetic(self) -> dict[str, Any]:
        """Where a block's rows are cut decides how they are grouped into Winograd's tiles."""
        tuned = [[*channels, form] for channels, form in self.tuned]
        return {"form": self.form, "block_bytes": self.block_bytes, "tuned": tuned}

    def computing_as(self, arithmetic: dict[str, Any]) -> MetalBackend:
        if set(arithmetic) != {"form", "block_bytes", "tuned"}:
            raise ValueError(f"arithmetic must have form, block_bytes, tuned, got {sorted(arithmetic)}")
        tuned = tuple(((int(c), int(o)), known_form(form)) for c, o, form in arithmetic["tuned"])
        form = known_form(arithmetic["form"], pinned=False)
        return replace(self, form=form, block_bytes=int(arithmetic["block_bytes"]), tuned=tuned)

    @property
    def pieces_ahead(self) -> int:
        return 0

    @property
    def forms(self) -> tuple[ConvolutionForm, ...]:
        return get_args(gpu.GPUForm)

    def forms_at(self, operands: Operands) -> tuple[ConvolutionForm, ...]:
        names = get_args(gpu.GPUForm)
        return tuple(form for form in names if gpu.form_of(form, operands, self.block_bytes) == form)

    @property
    def wires_memory(self) -> bool:
        return True

    def cache_bytes(self, memory_limit: int, chunk_bytes: int) -> int:
        """All that is left: MLX keeps active memory and its cache within the memory limit together."""
        return memory_limit

    def default_form(self, dtype: mx.Dtype) -> ConvolutionForm:
        """One implicit GEMM in every dtype, where nothing was measured.

        MLX's own choice keeps intermediates of Winograd in half precision, or in TF32 on some machines,
        and takes many times the memory.
        """
        return "folded"

    def settle(self, *arrays: mx.array) -> None:
        mx.eval(*arrays)

    def computed(self, x: mx.array) -> mx.array:
        mx.eval(x)
        return x

    def convolution(
        self,
        x: mx.array,
        weight: mx.array,
        bias: mx.array,
        padding: Padding,
        activation: Activation | None = None,
        skip: mx.array | None = None,
        first_frame: int = 0,
    ) -> mx.array:
        form = self.form_of(x.shape[-1], len(weight))
        if form not in get_args(gpu.GPUForm):
            return super().convolution(x, weight, bias, padding, activation, skip, first_frame)
        return gpu.convolve(
            x,
            weight,
            bias,
            cast(gpu.GPUForm, form),
            ((0, 0), padding.rows, padding.columns),
            reflected=padding.mode == "reflect",
            given=lambda x: replicate(x if activation is None else pixel_norm(x), padding.frames),
            before=None if activation is None else activation.after_norm,
            skip=skip,
            first_frame=first_frame,
            block_bytes=self.block_bytes,
        )

    def upsample(self, y: mx.array, skip: mx.array | None, stride: Stride, repeats: int) -> mx.array:
        """In one pass: the sum of two views, which is written where it belongs."""
        if skip is None:
            return super().upsample(y, skip, stride, repeats)
        (b, t, h, w, _), (dt, dh, dw) = y.shape, stride
        order = (0, 1, 6, 2, 7, 3, 8, 4, 5)
        tiles = [
            x.reshape(b, t, h, w, n, -1, dt, dh, dw).transpose(order) for x, n in ((y, repeats), (skip, 1))
        ]
        return (tiles[0] + tiles[1]).reshape(b, t * dt, h * dh, w * dw, -1)

    def convolution_bytes(self, operands: Operands, frames: int, activated: bool) -> int:
        """Norm, activation, padding and products; between two evaluations all of it is alive."""
        form = self.form_of(operands.channels_in, operands.channels_out)
        if form not in get_args(gpu.GPUForm):
            return super().convolution_bytes(operands, frames, activated)
        given = frames * operands.given_frame * operands.itemsize
        return gpu.workspace_bytes(
            cast(gpu.GPUForm, form),
            operands,
            self.block_bytes,
            activated=activated,
            replicated=given if frames < operands.frames + 2 else 0,
        )

    def addition_bytes(self, convolution: int, made: int, shortcut: int, itemsize: int) -> int:
        """The sum is written over the result of the convolution."""
        return convolution + shortcut

    def upsampling_bytes(self, made: int, kept: int, repeats: int, itemsize: int) -> int:
        return itemsize * (made + kept * (kept < made))
