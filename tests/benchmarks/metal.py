"""What a decode takes on Metal, counted without a Mac: peaks, modelled seconds, launches and bytes.

Needs an MLX whose host code for Metal was built over a stand-in for the driver, and the module `null_metal`
beside it, which counts and models times. Weights and latents are zeros, and no kernel computes.
"""

import argparse
from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx
import null_metal
from mlx.utils import tree_flatten

from mlx_vae_tiling import DecodePlan, decode_frames, plan_decode
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.published import PUBLISHED

VERSIONS = ("ltx-2", "ltx-2.3", "ltx-0.9.5")
SIZES = {"768x512": 16, "1920x1088": 5, "3840x2176": 5}
"""Latent frames of each size."""

FORMS = ("folded", "winograd32", "winograd_time", "gemm")


class Counted(NamedTuple):
    """A plan, the peak in bytes, what null Metal reports, and launches and bytes outside convolutions."""

    plan: DecodePlan
    peak: int
    report: dict[str, Any]
    launches: int
    moved: int


def zero_decoder(version: str, dtype: mx.Dtype, form: str | None = None) -> StreamingDecoder:
    """A published version whose weights are zeros."""
    decoder = build_decoder(PUBLISHED[version].config)
    names = [(name, mx.zeros(value.shape, dtype)) for name, value in tree_flatten(decoder.parameters())]
    decoder.load_weights(names)
    decoder.convolution_form = form
    mx.eval(decoder.parameters())
    return decoder


def count(decoder: StreamingDecoder, size: str, limit: str, pace: float) -> Counted:
    """Plans and runs one decode."""
    width, height = map(int, size.split("x"))
    channels = decoder.config.latent_channels
    latents = mx.zeros((1, channels, SIZES[size], height // 32, width // 32), decoder.dtype)
    mx.eval(latents)
    plan = plan_decode(decoder, latents.shape, memory_limit=limit, no_tune=True)
    weights = sum(value.nbytes for _, value in tree_flatten(decoder.parameters()))
    mx.synchronize()
    mx.clear_cache()
    before, peak = mx.get_active_memory() - weights, 0
    mx.reset_peak_memory()
    null_metal.reset(pace=pace)
    for frames in decode_frames(decoder, latents, plan=plan):
        del frames
        peak = max(peak, mx.get_peak_memory())
    report = null_metal.report(log=True)
    peak = max(peak, mx.get_peak_memory()) - before
    return Counted(plan, peak, report, *_between_convolutions(report["log"]))


def _between_convolutions(log: list[dict[str, Any]]) -> tuple[int, int]:
    """Launches and bytes; a copy into a part of an array writes as much as it reads, not the whole array."""
    launches = moved = 0
    for launch in log:
        name, read, written = launch["kernel"], launch["bytes_read"], launch["bytes_written"]
        if "conv" not in name and "gemm" not in name:
            launches += 1
            moved += read + (min(written, read) if name.startswith("gg") and "copy" in name else written)
    return launches, moved


def memory_row(version: str, size: str, dtype: str, limit: str, one: Counted) -> str:
    """Predicted and measured, as a row of a Markdown table."""
    plan = one.plan
    chunk = f"{plan.latent_frames_per_step}" + (f", {plan.max_chunk_frames}" if plan.max_chunk_frames else "")
    return (
        f"| {version} | {size} | {dtype} | {limit.removesuffix('GB')} | {len(plan.parts)} | {chunk} | "
        f"{plan.peak_bytes / 1e9:.2f} | {one.peak / 1e9:.2f} | {plan.peak_bytes / one.peak:.3f} | "
        f"{one.report['gpu_seconds']:.2f} |"
    )


def print_memory(versions: list[str], sizes: list[str], pace: float) -> None:
    """The table of peaks, with the form that is taken where nothing was measured."""
    ratios, shares = [], []
    for version, size, dtype in product(versions, sizes, ("bfloat16", "float32")):
        decoder = zero_decoder(version, getattr(mx, dtype))
        for limit in ("8GB", "34GB"):
            one = count(decoder, size, limit, pace)
            print(memory_row(version, size, dtype, limit, one), flush=True)
            ratios.append(one.plan.peak_bytes / one.peak)
            shares.append(one.peak / one.plan.memory_limit)
        del decoder
    print(
        f"predicted over measured {min(ratios):.3f} to {max(ratios):.3f}, at most {max(shares):.2f} of budget"
    )


def print_forms(versions: list[str], sizes: list[str], pace: float) -> None:
    """Modelled seconds and peak of each form within 8 GB in bfloat16, and what lies between convolutions."""
    for version, size in product(versions, sizes):
        cells = []
        for form in FORMS:
            one = count(zero_decoder(version, mx.bfloat16, form), size, "8GB", pace)
            cells.append(f"{one.report['gpu_seconds']:.2f}, {one.peak / 1e9:.2f}")
            if form == "folded":
                between = f"{one.launches} launches, {one.moved / 1e9:.0f} GB between convolutions"
        print(f"| {version}, {size} | {' | '.join(cells)} |  {between}", flush=True)


def main() -> None:
    """Prints the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["memory", "forms"])
    parser.add_argument("--version", action="append", choices=PUBLISHED)
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--pace", type=float, default=3, help="how much faster than modelled launches end")
    args = parser.parse_args()
    # Booleans that are asked for come out true: constant frames are no fault here.
    null_metal.answer(True)
    print_table = print_memory if args.table == "memory" else print_forms
    print_table(args.version or list(VERSIONS), args.size or list(SIZES), args.pace)


if __name__ == "__main__":
    main()
