"""The policy for the CPU: NumPy on MLX's buffers, and everything computed at once."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.vae.backend import Backend, BackendName
from mlx_vae_tiling.vae.backend_layers import CPULayerBackend
from mlx_vae_tiling.vae.blocks import Stride
from mlx_vae_tiling.vae.convolution import ConvolutionForm
from mlx_vae_tiling.vae.kernels.convolution_cpu import choose_form, convolve_numpy, workspace_bytes
from mlx_vae_tiling.vae.kernels.numbers import numbers
from mlx_vae_tiling.vae.kernels.operands import Operands
from mlx_vae_tiling.vae.kernels.upsampling_cpu import upsample_numpy
from mlx_vae_tiling.vae.kernels.workspace import Workspace
from mlx_vae_tiling.vae.operations import Activation, Padding

BLOCK_ELEMENTS = 2**17
"""How much the CPU activates at a time: a few copies of it fit into a core's cache."""

SHARING_FRAMES, SHARING_POSITIONS = 4, 384
"""Frames of a chunk, and positions at the scale of the latents, beyond which a larger one gains under 3 %."""

SMALL_BUFFERS_BYTES = 2**22


@dataclass(frozen=True)
class CPUBackend(CPULayerBackend, Backend):
    """Computes at once, step by step and frame by frame, so that the peak is small and always the same.

    Args:
        form: Pins a form of convolution.
        workspace: Where NumPy's forms compute, outside of MLX; None for a new one each time.
        workers: Threads that share a convolution; 0 for one on each core that is free for them. The
            numbers do not depend on it.
    """

    name: BackendName = "cpu"
    workspace: Workspace | None = field(default=None, compare=False)
    workers: int = field(default=0, compare=False)

    def opened(self) -> CPUBackend:
        return replace(self, workspace=self.workspace or Workspace(), workers=self.threads)

    def opened_beside(self, other: Backend) -> Backend:
        return replace(self, workspace=other.workspace if isinstance(other, CPUBackend) else None).opened()

    @property
    def held_workspace_bytes(self) -> int:
        return self.workspace.nbytes if self.workspace else 0

    def useful_chunk(self, positions: int, scale: int) -> tuple[int, int]:
        """Frames are computed one by one; a chunk shares their transforms, and those of the kernels."""
        frames: int = 2 ** math.ceil(math.log2(max(SHARING_FRAMES, SHARING_POSITIONS / positions)))
        return frames, frames

    def cache_bytes(self, memory_limit: int, chunk_bytes: int) -> int:
        """Only of small buffers: large ones the system gives as fast."""
        return SMALL_BUFFERS_BYTES

    @property
    def pieces_ahead(self) -> int:
        return 0

    @property
    def longest_evaluation_seconds(self) -> float:
        return math.inf

    @property
    def forms(self) -> tuple[ConvolutionForm, ...]:
        return ("numpy", "blocked")

    def device(self) -> dict[str, int | str]:
        return mx.device_info(mx.cpu)

    def device_memory(self) -> None:
        return None

    def default_form(self, dtype: mx.Dtype) -> ConvolutionForm:
        """The CPU wheel for Linux is linked to a reference BLAS, NumPy's to a fast one."""
        return "numpy" if platform.system() == "Linux" else "blocked"

    def settle(self, *arrays: mx.array) -> None:
        mx.eval(*arrays)

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
        """One pass over rows in cache: what is activated and what is padded exist only there.

        In half precision what comes out is rounded, and so is its sum with the skip, as on other backends.
        """
        if skip is not None and x.dtype.size == 2:
            y = self.convolution(x, weight, bias, padding, activation, None, first_frame)
            return self.computed(y) + skip
        if not self._fuses:
            return super().convolution(x, weight, bias, padding, activation, skip, first_frame)
        return convolve_numpy(
            *(x, weight, bias),
            replicas=padding.frames,
            padding=(*padding.rows, *padding.columns),
            mode=padding.mode,
            activation="none" if activation is None else "norm_silu",
            modulation=None if activation is None else activation.modulation,
            residual=skip,
            workspace=self.workspace,
            workers=self.threads,
        )

    def convolve(self, x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        if (self.form or self.default_form(x.dtype)) != "numpy":
            return super().convolve(x, weight, bias)
        return convolve_numpy(x, weight, bias, workspace=self.workspace, workers=self.threads)

    @property
    def _fuses(self) -> bool:
        return (self.form or self.default_form(mx.float32)) == "numpy"

    def prepare(self, x: mx.array, padding: Padding, activation: Activation | None) -> mx.array:
        """By blocks of rows into one array: the CPU's norm takes several copies of its input."""
        b, t, h, w, c = x.shape
        first, top, left = padding.frames[0], padding.rows[0], padding.columns[0]
        shape = (b, t + sum(padding.frames), h + sum(padding.rows), w + sum(padding.columns), c)
        padded = mx.zeros(shape, x.dtype)
        view = numbers(padded)
        rows = max(1, BLOCK_ELEMENTS // (b * w * c))
        for index, start in product(range(t), range(0, h, rows)):
            block = x[:, index : index + 1, start : start + rows]
            block = block if activation is None else activation(block)
            place = slice(top + start, top + start + block.shape[2])
            view[:, first + index : first + index + 1, place, left : left + w] = numbers(block)
        if padding.mode == "reflect":
            mirror(view, 2, padding.rows)
            mirror(view, 3, padding.columns)
        view[:, :first] = view[:, first : first + 1]
        view[:, first + t :] = view[:, first + t - 1 : first + t]
        return padded

    def upsample(self, y: mx.array, skip: mx.array | None, stride: Stride, repeats: int) -> mx.array:
        if not self._fuses or y.dtype.size == 2:
            return super().upsample(y, skip, stride, repeats)
        return upsample_numpy(y, skip, stride, max(repeats, 1))

    def computed(self, x: mx.array) -> mx.array:
        mx.eval(x)
        return x

    def convolution_bytes(self, operands: Operands, frames: int, activated: bool) -> int:
        """What comes out, in half precision with the kernel in float32; unless fused also what goes in."""
        itemsize, padded, made = operands.itemsize, operands.padded, operands.made
        if self._fuses:
            return 4 * made if itemsize == 4 else max(4 * (operands.weights + made), 6 * made)
        activating = itemsize * padded + activated * 2 * 4 * min(operands.given_frame, BLOCK_ELEMENTS)
        convolving = 4 * (padded + made)
        if itemsize == 2:
            convolving = max(convolving + 2 * padded + 4 * operands.weights, 6 * made)
        return max(activating, convolving)

    def workspace_bytes(self, operands: Operands) -> int:
        if not self._fuses:
            return 0
        _, frames, height, width, channels_in, channels_out, *_ = operands
        form = choose_form(height, width, channels_in, channels_out)
        return workspace_bytes(form, frames, height, width, channels_in, channels_out, self.threads)

    def addition_bytes(self, convolution: int, made: int, shortcut: int, itemsize: int) -> int:
        return max(convolution, itemsize * made + shortcut)

    def norm_bytes(self, given: int, itemsize: int) -> int:
        # In float32, with the deviations from the mean and their squares.
        return given * (4 * 4 if itemsize == 4 else 5 * 4)

    def upsampling_bytes(self, made: int, kept: int, repeats: int, itemsize: int) -> int:
        tiled = made + made // repeats if repeats and (not self._fuses or itemsize == 2) else 0
        return itemsize * (made + max(tiled, kept * (kept < made)))


def mirror(x: np.ndarray[Any, np.dtype[Any]], axis: int, amounts: tuple[int, int]) -> None:
    """Fills the first and the last position of an axis with those beside their neighbours, or neither."""
    x = np.moveaxis(x, axis, 0)
    if amounts[0]:
        x[0] = x[2]
    if amounts[1]:
        x[-1] = x[-3]
