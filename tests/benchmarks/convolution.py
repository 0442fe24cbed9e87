"""The CPU's convolutions on the layers of two decoders, in turn: im2col, the form chosen, torch where it is.

One latent frame of 384x256 pixels at a time and full width, as a stream runs them, in one thread. Beside
the times stands the error against float64 of both forms, relative to the largest output.

    OPENBLAS_NUM_THREADS=1 python tests/benchmarks/convolution.py [--quick]
"""

import importlib.util
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import numpy as np
from common import parse_quick

from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.kernels.convolution_cpu import choose_form, convolve_rows, workspace_bytes
from mlx_vae_tiling.vae.kernels.rows import Rows
from mlx_vae_tiling.vae.kernels.workspace import Workspace
from mlx_vae_tiling.vae.published import PUBLISHED

Runs = dict[str, Callable[[], object]]


class Shape(NamedTuple):
    """Of a convolution's output, and the channels of its input."""

    frames: int
    height: int
    width: int
    in_channels: int
    out_channels: int

    @property
    def operations(self) -> int:
        return 54 * self.frames * self.height * self.width * self.in_channels * self.out_channels


def published(name: str) -> DecoderConfig:
    """The architecture of a convolutional decoder."""
    config = PUBLISHED[name].config
    assert isinstance(config, DecoderConfig)
    return config


def layers(config: DecoderConfig, height: int, width: int, divisor: int) -> Counter[Shape]:
    """How often each shape occurs in the decode of one latent frame (height, width)."""
    shapes: Counter[Shape] = Counter()
    t = h = w = 1
    for layer in config.layers():
        channels = (layer.in_channels // divisor, layer.out_channels // divisor)
        shapes[Shape(t, height * h, width * w, *channels)] += 1
        t, h, w = t * layer.stride[0], h * layer.stride[1], w * layer.stride[2]
    return shapes


def operands(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Input as after SiLU, kernel, bias."""
    random = np.random.default_rng(0)
    t, h, w, c, o = shape
    x = random.standard_normal((t + 2, h + 2, w + 2, c), dtype=np.float32)
    weight = random.standard_normal((o, 3, 3, 3, c), dtype=np.float32) / np.float32(np.sqrt(27 * c))
    return x / (1 + np.exp(-x)), weight, random.standard_normal(o, dtype=np.float32)


def candidates(
    shape: Shape, workspace: Workspace
) -> tuple[dict[str, Callable[[], object]], Callable[[], float]]:
    """What is compared, and the error of what ran last."""
    x, weight, bias = operands(shape)
    rows = Rows(list(x))
    out = np.empty((*shape[:3], shape.out_channels), np.float32)
    chosen = choose_form(*shape[1:])
    runs: Runs = {
        "im2col": lambda: convolve_rows(rows, weight, bias, out, form="columns", workspace=workspace),
        "chosen": lambda: convolve_rows(rows, weight, bias, out, form=chosen, workspace=workspace),
    }
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)
        moved = [
            torch.from_numpy(np.ascontiguousarray(a))
            for a in (x.transpose(3, 0, 1, 2)[None], weight.transpose(0, 4, 1, 2, 3), bias)
        ]
        runs["torch"] = lambda: torch.nn.functional.conv3d(*moved)

    def error() -> float:
        part = slice(0, 64)
        taps = np.lib.stride_tricks.sliding_window_view(x[:3, :6], (3, 3, 3), axis=(0, 1, 2))[0, :4]
        taps = taps.transpose(0, 1, 3, 4, 5, 2).reshape(taps.shape[0], taps.shape[1], -1).astype(np.float64)
        expected = taps @ weight[part].reshape(len(weight[part]), -1).T.astype(np.float64) + bias[part]
        return float(np.abs(out[0, :4, :, part] - expected).max() / np.abs(expected).max())

    return runs, error


def main() -> None:
    """A table for each decoder, with the sum over its layers."""
    quick = parse_quick(__doc__)
    for name in ("ltx-2", "ltx-2.3"):
        shapes = layers(published(name), 4 if quick else 8, 4 if quick else 12, 16 if quick else 1)
        total: Counter[str] = Counter()
        print(f"{name}: {sum(s.operations * n for s, n in shapes.items()) / 1e9:.0f} GFLOP")
        print(f"{'output, channels':<34}{'form':>9}{'MiB':>5}{'seconds and GFLOP/s of each':>40}{'ratio':>8}")
        for shape, count in shapes.items():
            describe(shape, count, total, repeats=1 if quick else 4)
        print(f"{'all layers':<48}" + times(total) + f"{total['chosen'] / total['im2col']:>8.2f}\n")


def describe(shape: Shape, count: int, total: Counter[str], repeats: int) -> None:
    workspace = Workspace()
    runs, error = candidates(shape, workspace)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    errors = {}
    for _ in range(repeats + 1):  # the first run of each only warms up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            errors[name] = error()
    medians = {name: median(own[1:]) for name, own in seconds.items()}
    for name in medians:
        total[name] += count * medians[name]
    form = choose_form(*shape[1:])
    positions = "x".join(map(str, shape[:3]))
    title = f"{count:>2} x {positions}, {shape.in_channels} to {shape.out_channels}"
    stated = workspace_bytes(form, *shape) / 2**20
    figures = times(medians, shape.operations) + f"{medians['chosen'] / medians['im2col']:>8.2f}"
    print(f"{title:<34}{form:>9}{stated:>5.0f}{figures}  error {errors['im2col']:.0e} {errors['chosen']:.0e}")


def times(seconds: dict[str, float] | Counter[str], operations: int = 0) -> str:
    if not operations:
        return "".join(f"  {name} {own:.2f} s" for name, own in seconds.items())
    return "".join(f"  {name} {own:.3f} ({operations / own / 1e9:.0f})" for name, own in seconds.items())


if __name__ == "__main__":
    main()
