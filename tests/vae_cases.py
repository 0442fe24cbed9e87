"""Decoders of every published version for the tests, small, with random or the reference's weights."""

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_vae_tiling import plan_decode
from mlx_vae_tiling.vae.blocks import ResBlocks
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.cpu import CPUBackend
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.options import Noise
from mlx_vae_tiling.vae.published import PUBLISHED
from mlx_vae_tiling.vae.regions import Span, Window

VERSIONS = ("0.9.0", "0.9.1", "0.9.5", "ltx-2", "ltx-2.3", "ltx-2.3-pruna")
DATA = Path(__file__).parent / "data"

LTX_2_3 = PUBLISHED["ltx-2.3"].config


class ReferenceCase(NamedTuple):
    """Latents and what the reference implementation made of them, every `stride`-th row and column."""

    latents: mx.array
    output: mx.array
    stride: int
    causal: bool
    timestep: float | None
    noise_scale: float
    noise: mx.array | None
    injected: list[mx.array]


@dataclass(frozen=True)
class RecordedNoise(Noise):
    """The noise of a case instead of that of a seed."""

    case: ReferenceCase | None = None

    def latents(self, region, batch, channels):
        spans = (span.slice for span in region)
        return self.case.noise[(slice(None), slice(None), *spans)]

    def field(self, number, region, scale):
        return self.case.injected[number][region.height.slice, region.width.slice]


def recorded_noise(case):
    return RecordedNoise(0, case.latents.shape[3:], case=case)


@lru_cache
def reference_file(version):
    return mx.load(str(DATA / f"reference_{version}.safetensors"), return_metadata=True)


def reference_config(version):
    """The published blocks and layers at a small width."""
    return DecoderConfig.from_original(json.loads(reference_file(version)[1]["config"]))


def reference_cases(version):
    tensors, metadata = reference_file(version)
    cases = []
    for index, described in enumerate(json.loads(metadata["cases"])):
        own = {
            name.removeprefix(f"case.{index}."): value
            for name, value in tensors.items()
            if name.startswith(f"case.{index}.")
        }
        injected = [own[f"injected.{i}"] for i in range(sum(name.startswith("injected.") for name in own))]
        del described["latents"]
        case = ReferenceCase(
            own["latents"], own["output"], noise=own.get("noise"), injected=injected, **described
        )
        cases.append(case)
    return cases


@lru_cache
def reference_decoder(version, dtype=mx.float32):
    """The decoder whose outputs are frozen; its weights are exact in every dtype."""
    tensors, metadata = reference_file(version)
    decoder = VideoDecoder(reference_config(version))
    weights = []
    for name, value in tensors.items():
        name = name.removeprefix("decoder.")
        kind, _, statistic = name.partition("per_channel_statistics.")
        if kind.startswith("case.") or (statistic and statistic not in ("mean-of-means", "std-of-means")):
            continue
        if value.dtype == mx.int8:
            value = value.astype(mx.float32) * float(metadata["kernel_scale"])
        if value.ndim == 5:
            value = value.transpose(0, 2, 3, 4, 1)
        if name.endswith("conv_shortcut.weight") or "per_channel_scale" in name:
            value = value.squeeze((1, 2, 3) if value.ndim == 5 else (1, 2))
        weights.append((name.removesuffix("-of-means"), value.astype(dtype)))
    decoder.load_weights(weights)
    return decoder


@lru_cache
def small_decoder(version, spatial_padding_mode=None, num_layers=1, base_channels=4):
    """A version with random weights, and one residual block where it has several, or all of them (None)."""
    config = reference_config(version)
    blocks = (
        replace(block, num_layers=num_layers) if num_layers and isinstance(block, ResBlocks) else block
        for block in config.decoder_blocks
    )
    config = replace(
        config,
        decoder_blocks=tuple(blocks),
        # Widths that are spelled out cannot be changed by their last one.
        base_channels=config.base_channels if version == "ltx-2.3-pruna" else base_channels,
        spatial_padding_mode=spatial_padding_mode or config.spatial_padding_mode,
    )
    return VideoDecoder(config).init_random(seed=1)


def random_latents(decoder, batch, frames, height, width, seed=0):
    shape = (batch, decoder.config.latent_channels, frames, height, width)
    return mx.random.normal(shape, key=mx.random.key(seed))


def budgets(decoder, size):
    """Budgets for latents of a size that lead to one chunk, to several, and to several windows, anywhere.

    Just below what the largest chunk and what the smallest one of a single window take.
    """
    shape = (1, decoder.config.latent_channels, *size)
    large, small = (plan_decode(decoder, shape, memory_limit="1GB", chunk=(1, cap)) for cap in (None, 1))
    return {"whole": "1GB", "streamed": large.peak_bytes - 1, "windows": small.peak_bytes - 1}


def joined(pieces):
    return mx.concatenate(list(pieces), axis=2)


def relative_error(value, expected):
    """Greatest difference over the range of what is expected; NaN where shapes or values are no numbers."""
    if value.shape != expected.shape:
        return float("nan")
    value, expected = value.astype(mx.float32), expected.astype(mx.float32)
    return (mx.abs(value - expected).max() / (expected.max() - expected.min())).item()


def made_and_taken(step, given, where):
    """What a step makes, and the bytes of MLX's memory that it takes at once beside what it is given."""
    mx.eval(given)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    made = step.compute(given, where)
    mx.eval(made)
    return made, mx.get_peak_memory() - before


class Convolution(NamedTuple):
    """A call: its kernel's number in decode order, its output's shape, its multiplications and additions."""

    layer: int
    shape: tuple[int, ...]
    operations: int


@dataclass(frozen=True)
class RecordingBackend(CPUBackend):
    """Records every convolution of a decoder."""

    kernels: tuple[mx.array, ...] = ()
    calls: list[Convolution] = field(default_factory=list, compare=False)

    def convolution(self, x, weight, bias, *given):
        y = super().convolution(x, weight, bias, *given)
        layer = next(index for index, kernel in enumerate(self.kernels) if kernel is weight)
        self.calls.append(Convolution(layer, y.shape, 2 * weight[0].size * y.size))
        return y


def recording(decoder):
    kernels = tuple(value for _, value in tree_flatten(decoder.parameters()) if value.ndim == 5)
    return RecordingBackend(kernels=kernels)


def operations(calls):
    return sum(call.operations for call in calls)


def expected_operations(config, latent_shape, window=None, causal=False):
    """Multiplications and additions for a window, in closed form from the shrinking halo."""
    frames, height, width = latent_shape[2:]
    t, s = config.temporal_scale, config.spatial_scale
    spans = (window or Window()).region(t * (frames - 1) + 1, s * height, s * width)
    p = config.patch_size
    spans = [spans.time, *(Span(x.start // p, -(-x.stop // p), x.size // p) for x in spans[1:])]
    reaches = [(2, 0) if causal else (1, 1), (1, 1), (1, 1)]
    total = 0
    for layer in reversed(list(config.layers())):
        dropped = [layer.stride[0] - 1, 0, 0]
        for axis, (factor, first) in enumerate(zip(layer.stride, dropped, strict=True)):
            start, stop, size = spans[axis]
            spans[axis] = Span(
                (start + first) // factor, -(-(stop + first) // factor), (size + first) // factor
            )
        volume = 1
        for start, stop, _ in spans:
            volume *= stop - start
        total += latent_shape[0] * volume * 54 * layer.in_channels * layer.out_channels
        spans = [
            Span(max(start - before, 0), min(stop + after, size), size)
            for (start, stop, size), (before, after) in zip(spans, reaches, strict=True)
        ]
    return total
