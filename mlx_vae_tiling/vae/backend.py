"""What depends on the device: `Backend` objects, which are passed in and never asked for by name.

A backend computes the parts of a step whose best form depends on the device, decides what is evaluated
when, and says, beside each, how much memory that takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import mlx.core as mx

from mlx_vae_tiling.vae.backend_layers import LayerBackend
from mlx_vae_tiling.vae.blocks import Stride
from mlx_vae_tiling.vae.convolution import ConvolutionForm, convolve
from mlx_vae_tiling.vae.kernels.operands import Operands
from mlx_vae_tiling.vae.operations import Activation, Padding, depth_to_space, reflect, replicate, surround
from mlx_vae_tiling.vae.options import Noise
from mlx_vae_tiling.vae.regions import Region

BackendName = Literal["cpu", "metal", "cuda"]

SATURATING_POSITIONS = 1024
"""Latent positions per step beyond which a larger chunk is not expected to be faster on a GPU."""

SMALLEST_CACHE_BYTES = 2**20


def known_form(told: Any, pinned: bool = True) -> Any:
    """A form of convolution that was read from a file; None too, unless one has to be pinned.

    Raises:
        ValueError: If there is none of this name.
    """
    if not (told in get_args(ConvolutionForm) or (told is None and not pinned)):
        raise ValueError(f"a form of convolution must be one of {get_args(ConvolutionForm)}, got {told!r}")
    return told


class Taken(NamedTuple):
    """What a step takes beside what is held.

    Attributes:
        nbytes: At once, of MLX's memory, its result included.
        elements: Of one array.
        workspace: Bytes outside MLX that it computes in, which later steps use again.
    """

    nbytes: int
    elements: int
    workspace: int = 0


class Where(NamedTuple):
    """Where a step computes, and what it may know of the decode.

    Attributes:
        inputs: The regions that its inputs hold, in the order of its reads: just what it needs.
        output: The region that it is to compute.
        batch: Entries of the batch.
        dtype: In which the decoder computes.
        backend: What computes it.
        noise: The noise of the video.
    """

    inputs: tuple[Region, ...]
    output: Region
    batch: int
    dtype: mx.Dtype
    backend: Backend
    noise: Noise | None = None


@dataclass(frozen=True)
class Backend(LayerBackend):
    """Computes lazily and starts the computation of each step without waiting for it, as suits a GPU.

    Args:
        name: "cpu", "metal" or "cuda".
        form: Pins a form of convolution; None for the backend's own choice.
        makes_keys_anew: Whether the last stage of a diffusion decoder holds no keys and values between
            chunks, but what they are made of: less memory, more work.
    """

    name: BackendName
    form: ConvolutionForm | None = None
    makes_keys_anew: bool = False

    @property
    def pieces_ahead(self) -> int:
        """Pieces that are being computed while the consumer has the last one."""
        return 1

    @property
    def longest_evaluation_seconds(self) -> float:
        """What one evaluation should take at most: a GPU's watchdog may end longer ones."""
        return 1.0

    @property
    def forms(self) -> tuple[ConvolutionForm, ...]:
        """The forms of convolution that may compete."""
        return ("stock", "folded")

    def forms_at(self, operands: Operands) -> tuple[ConvolutionForm, ...]:
        """Those of the forms that differ from each other at a convolution."""
        return self.forms

    @property
    def wires_memory(self) -> bool:
        """Whether MLX can keep memory from being paged out."""
        return False

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What the last bits of frames depend on besides the device, in types that JSON has."""
        return {"form": self.form}

    def computing_as(self, arithmetic: dict[str, Any]) -> Backend:
        """This backend, with the forms of another one of its kind.

        Args:
            arithmetic: Of that one.

        Raises:
            ValueError: If it is no such thing.
        """
        if set(arithmetic) != {"form"}:
            raise ValueError(f"arithmetic must have a form, got {sorted(arithmetic)}")
        return replace(self, form=known_form(arithmetic["form"], pinned=False))

    def device(self) -> dict[str, int | str]:
        """What MLX says of the device."""
        return mx.device_info()

    def device_memory(self) -> dict[str, int | str] | None:
        """What MLX says of the device's memory; None where it is the machine's."""
        return self.device()

    def opened(self) -> Backend:
        """The backend for one decode: with what only one may use at a time. Opened again it is the same."""
        return self

    def opened_beside(self, other: Backend) -> Backend:
        """The same for a decode in turns with another one: they share what only one uses at a time."""
        return self.opened()

    @property
    def held_workspace_bytes(self) -> int:
        """What it holds outside MLX."""
        return 0

    def useful_chunk(self, positions: int, scale: int) -> tuple[int, int]:
        """The chunk beyond which a larger one is not expected to be faster.

        Args:
            positions: Of one latent frame.
            scale: Frames per latent frame.

        Returns:
            Latent frames per step, and the most frames of a chunk in any layer.
        """
        step: int = 2 ** math.ceil(math.log2(max(1, SATURATING_POSITIONS / positions)))
        return step, step * scale

    def cache_bytes(self, memory_limit: int, chunk_bytes: int) -> int:
        """The limit of MLX's cache of freed buffers."""
        return max(chunk_bytes, SMALLEST_CACHE_BYTES)

    def default_form(self, dtype: mx.Dtype) -> ConvolutionForm:
        """The form of convolution that is expected to run best."""
        return "stock"

    def settle(self, *arrays: mx.array) -> None:
        """Has the results of a step computed, so that its inputs can go."""
        mx.async_eval(*arrays)

    def prepare(self, x: mx.array, padding: Padding, activation: Activation | None) -> mx.array:
        """The input of a valid 3x3x3 convolution: activated if asked to, then padded."""
        x = replicate(x if activation is None else activation(x), padding.frames)
        if padding.mode == "zeros":
            return surround(x, padding.rows, padding.columns)
        return reflect(reflect(x, 2, padding.rows), 3, padding.columns)

    def convolve(self, x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        """Valid convolution (B, T+2, H+2, W+2, C) to (B, T, H, W, O)."""
        return convolve(x, weight, bias, self.form or self.default_form(x.dtype))

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
        """All of a convolution: activation, padding, products, and what is added to the result.

        Args:
            x: (B, T', H', W', C), which padding makes (B, T+2, H+2, W+2, C).
            weight, bias: (O, 3, 3, 3, C) and (O,).
            padding: What x lacks.
            activation: Applied to x first.
            skip: (B, T, H, W, O), added to the result.
            first_frame: Number of the first output frame in the video.

        Returns:
            (B, T, H, W, O).
        """
        y = self.convolve(self.prepare(x, padding, activation), weight, bias)
        return y if skip is None else y + skip

    def upsample(self, y: mx.array, skip: mx.array | None, stride: Stride, repeats: int) -> mx.array:
        """Channels to positions, plus those of the residual, whose channels are tiled.

        Args:
            y: (B, T, H, W, C*t*h*w).
            skip: (B, T, H, W, C/repeats*t*h*w) or None.
            stride: (t, h, w).
            repeats: Of the residual's channels.
        """
        y = self.computed(depth_to_space(y, stride))
        if skip is None:
            return y
        tiled = [depth_to_space(skip, stride)] * repeats
        return self.computed(y + self.computed(mx.concatenate(tiled, axis=-1)))

    def computed(self, x: mx.array) -> mx.array:
        """x, within a step; computed at once where that keeps the memory small."""
        return x

    def convolution_bytes(self, operands: Operands, frames: int, activated: bool) -> int:
        """What `prepare` and `convolve` take at once: all between two evaluations, with folded copies.

        Args:
            operands: The shapes.
            frames: Those that there are of the input, to which replicas are added.
            activated: Whether the input is activated first.
        """
        given = 2 * activated * frames * operands.given_frame
        return operands.itemsize * (given + 2 * operands.padded + 3 * operands.made)

    def workspace_bytes(self, operands: Operands) -> int:
        """What a convolution computes in outside MLX."""
        return 0

    def addition_bytes(self, convolution: int, made: int, shortcut: int, itemsize: int) -> int:
        """What a convolution takes with the sum of its result and a skip, which may reuse neither.

        Args:
            convolution: Bytes of the convolution alone.
            made: Elements of its result.
            shortcut: Bytes of what is made of the skip first.
            itemsize: Bytes of an element.
        """
        return max(convolution, 2 * itemsize * made + shortcut)

    def norm_bytes(self, given: int, itemsize: int) -> int:
        """What a LayerNorm takes."""
        return itemsize * given

    def upsampling_bytes(self, made: int, kept: int, repeats: int, itemsize: int) -> int:
        """What depth-to-space takes, with a residual that is tiled `repeats` times, if any.

        Args:
            made: Elements that come out of it, of which
            kept: are kept, in a copy if these are not all.
        """
        return itemsize * (made * (3 if repeats else 1) + kept)
