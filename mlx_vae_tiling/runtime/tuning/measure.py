"""Measurements of this machine: forms of the convolution, products, and passes over memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_vae_tiling.runtime.tuning.choices import Level, Machine, Trial
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.convolution import ConvolutionForm
from mlx_vae_tiling.vae.kernels.convolution_gpu import fold
from mlx_vae_tiling.vae.kernels.operands import Operands
from mlx_vae_tiling.vae.operations import Activation, Padding, cut, mirrored, pixel_norm, surround
from mlx_vae_tiling.vae.regions import Region
from mlx_vae_tiling.vae.schedule import Pace, Step, frames_per_latent, regions_of

ERROR_SIDE = 68
"""Rows and columns on which errors are measured: enough positions for any kernel to be taken."""

AROUND = Padding((0, 0), (1, 1), (1, 1), "zeros")


class Work(NamedTuple):
    """What a decode asks of one kind of convolution.

    Args:
        level: The kind.
        frames: Of one chunk.
        operations: Of the whole decode.
    """

    level: Level
    frames: int
    operations: int


class Pass(NamedTuple):
    """A pass over memory: its name, and bytes read and written per second."""

    name: str
    bytes_per_second: float


def machine_of(backend: Backend, dtype: mx.Dtype) -> Machine:
    """This machine, as measurements are kept by."""
    name = str(backend.device().get("device_name", backend.name))
    return Machine(name, str(vars(mx)["__version__"]), str(dtype).removeprefix("mlx.core."))


def work_of(
    steps: Sequence[Step], output: Region, latent_frames: int, max_chunk_frames: int | None = None
) -> list[Work]:
    """The kinds of convolution of a decoder, those with most operations first.

    Args:
        steps: The decoder.
        output: What is decoded.
        latent_frames: Taken in at a time.
        max_chunk_frames: Bounds the frames of a chunk.
    """
    pace = Pace(latent_frames, max_chunk_frames)
    found: dict[Level, Work] = {}
    for step, region, scale in zip(steps, regions_of(steps, output), frames_per_latent(steps), strict=True):
        if step.kernel is None:
            continue
        level = Level(region.height.length, region.width.length, *step.kernel)
        frames = min(pace.limit(scale), region.time.length)
        before = found.get(level, Work(level, frames, 0))
        found[level] = before._replace(operations=before.operations + step.operations * region.volume)
    return sorted(found.values(), key=lambda work: -work.operations)


def timed(run: Callable[[], mx.array], repeats: int = 3) -> float:
    """The least seconds of some runs, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        mx.synchronize()
        began = time.perf_counter()
        mx.eval(run())
        mx.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


class Sample(NamedTuple):
    """Operands of a convolution, and what errors are measured by.

    Args:
        level: The kind of convolution, with as many rows as are computed.
        x, weight, bias: In the decoder's dtype.
        reference: The result of a part, in float32 on the same device.
    """

    level: Level
    x: mx.array
    weight: mx.array
    bias: mx.array
    reference: mx.array

    @property
    def part(self) -> mx.array:
        """The input of the reference."""
        return mx.contiguous(self.x[:, :4, :ERROR_SIDE, :ERROR_SIDE])

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return operations_of(self.level, self.x.shape[1] - 2)


def sample_of(backend: Backend, level: Level, frames: int, dtype: mx.Dtype) -> Sample:
    """Random operands at a level."""
    x, weight, bias = _operands(level, frames, dtype)
    given = Sample(level, x, weight, bias, bias)
    x32, weight32, bias32 = (array.astype(mx.float32) for array in (given.part, weight, bias))
    plain = replace(backend, form=backend.default_form(mx.float32))
    reference = plain.convolution(x32, weight32, bias32, AROUND)
    mx.eval(reference)
    return given._replace(reference=reference)


def error_of(backend: Backend, form: ConvolutionForm, sample: Sample) -> float:
    """The root mean square error of a form over that of the reference's values."""
    y = replace(backend, form=form).convolution(sample.part, sample.weight, sample.bias, AROUND)
    difference = y.astype(mx.float32) - sample.reference
    error: Any = mx.sqrt(mx.mean(difference**2) / mx.mean(sample.reference**2)).item()
    return float(error)


def seconds_of(backend: Backend, form: ConvolutionForm, sample: Sample, repeats: int) -> float:
    """What a form takes: the least of some runs."""
    chosen = replace(backend, form=form)
    return timed(lambda: chosen.convolution(sample.x, sample.weight, sample.bias, AROUND), repeats)


def measure_form(backend: Backend, form: ConvolutionForm, sample: Sample, repeats: int = 3) -> Trial:
    """Time and error of a form."""
    seconds = seconds_of(backend, form, sample, repeats)
    return Trial(form, seconds, error_of(backend, form, sample), sample.operations)


def sample_bytes(backend: Backend, form: ConvolutionForm, level: Level, frames: int, dtype: mx.Dtype) -> int:
    """What measuring a form at a level takes: operands, weights in float32 too, and what the form takes."""
    h, w, c, o = level
    operands = Operands(1, frames, h, w, c, o, dtype.size, ((0, 0), AROUND.rows, AROUND.columns))
    taken = replace(backend, form=form).convolution_bytes(operands, frames + 2, activated=False)
    given = (frames + 2) * operands.given_frame
    return taken + dtype.size * (given + operands.weights) + 4 * operands.weights


def operations_of(level: Level, frames: int) -> float:
    """Multiplications and additions of a convolution of so many frames."""
    return 54.0 * level.channels_in * level.channels_out * level.height * level.width * frames


def _operands(level: Level, frames: int, dtype: mx.Dtype) -> list[mx.array]:
    keys = mx.random.split(mx.random.key(0), 3)
    c, o = level.channels_in, level.channels_out
    shapes = ((1, frames + 2, level.height, level.width, c), (o, 3, 3, 3, c), (o,))
    scales = (1.0, (27 * c) ** -0.5, 0.1)
    operands = [
        (mx.random.normal(shape, dtype, key=key) * scale).astype(dtype)
        for shape, scale, key in zip(shapes, scales, keys, strict=True)
    ]
    mx.eval(operands)
    return operands


def product_rate(size: int, dtype: mx.Dtype) -> float:
    """Operations per second of a product of two square matrices."""
    a, b = (mx.random.normal((size, size), dtype, key=mx.random.key(seed)) for seed in (1, 2))
    mx.eval(a, b)
    return 2 * size**3 / timed(lambda: a @ b)


def pass_rates(level: Level, frames: int, dtype: mx.Dtype) -> list[Pass]:
    """Of what a decode does between its convolutions, on the input of one of them."""
    x, _, _ = _operands(level, frames, dtype)
    parts = 2 if frames % 2 == 0 else 1
    silu = Activation().after_norm
    runs: dict[str, Callable[[], mx.array]] = {
        "norm": lambda: pixel_norm(x),
        "SiLU": lambda: silu(x),
        "sum": lambda: x + x,
        "zeros around": lambda: surround(x, (1, 1), (1, 1)),
        "reflection around": lambda: mirrored(x, (1, 1), (1, 1)),
        "fold in time": lambda: mx.contiguous(fold(x, parts)),
        "copy of the last frames": lambda: cut(x, [slice(frames // 2, frames + 2)]),
    }
    kept = (frames + 2 - frames // 2) / (frames + 2)
    folded = (frames + 2 * parts) / (frames + 2)
    moved = {"sum": 3.0, "copy of the last frames": 2 * kept, "fold in time": 2 * folded}
    return [Pass(name, moved.get(name, 2.0) * x.nbytes / timed(run)) for name, run in runs.items()]
