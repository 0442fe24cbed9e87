"""Predicted and measured peak of decodes under a budget, for shapes, budgets and dtypes.

Random weights in the structures of LTX-2 and LTX-2.3 at small width. The measured peak is MLX's, less
what it held before other than the decoder's weights: the latents, that is; and what NumPy computes in. The
weights are in both.
"""

import argparse
import time
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from mlx_vae_tiling import (
    DecodePlan,
    SpatialTilingConfig,
    TemporalTilingConfig,
    TilingConfig,
    VideoDecoder,
    Window,
    plan_decode,
)
from mlx_vae_tiling.runtime.flow import frames_of
from mlx_vae_tiling.runtime.job import Job
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.published import PUBLISHED


class Case(NamedTuple):
    """A version at a width, the frames, height and width of latents, a dtype, a budget, tiles, a window."""

    version: str
    base_channels: int
    size: tuple[int, int, int]
    dtype: str
    memory_limit: str
    tiling: TilingConfig | int | None = None
    window: Window | None = None


class Result(NamedTuple):
    """A plan and what running it took."""

    plan: DecodePlan
    measured_bytes: int
    seconds: float

    @property
    def ratio(self) -> float:
        return self.plan.peak_bytes / self.measured_bytes


TILES = TilingConfig(SpatialTilingConfig(128, 32), TemporalTilingConfig(32, 8))
FROM_8_TO_40 = Window(frames=slice(8, 40))
QUICK = [
    Case("ltx-2.3", 4, (9, 4, 5), "float32", "1GB"),
    Case("ltx-2.3", 4, (9, 4, 5), "bfloat16", "3MB"),
    Case("ltx-2.3", 4, (3, 5, 7), "float32", "3.5MB"),
    Case("ltx-2", 4, (9, 4, 5), "float16", "4MB"),
    Case("ltx-2", 4, (9, 3, 4), "bfloat16", "2.4MB"),
    Case("ltx-2", 8, (5, 3, 4), "float32", "1GB"),
    Case("ltx-2", 4, (5, 5, 6), "bfloat16", "25MB", TILES),
]
CASES = [
    *QUICK,
    Case("ltx-2.3", 4, (3, 9, 16), "float32", "12MB"),
    Case("ltx-2.3", 8, (9, 9, 16), "bfloat16", "60MB"),
    Case("ltx-2.3", 8, (5, 6, 9), "float32", "1GB"),
    Case("ltx-2.3", 8, (5, 6, 9), "float32", "30MB"),
    Case("ltx-2.3", 8, (5, 6, 9), "bfloat16", "30MB"),
    Case("ltx-2.3", 8, (5, 6, 9), "float16", "9MB"),
    Case("ltx-2.3", 8, (33, 3, 3), "float32", "14MB"),
    Case("ltx-2.3", 8, (33, 3, 3), "float16", "6MB"),
    Case("ltx-2.3", 16, (9, 4, 6), "float32", "60MB"),
    Case("ltx-2.3", 16, (5, 4, 6), "bfloat16", "25MB"),
    Case("ltx-2.3", 32, (5, 3, 4), "bfloat16", "1GB"),
    Case("ltx-2", 4, (9, 9, 16), "float16", "30MB"),
    Case("ltx-2", 8, (17, 4, 6), "float32", "25MB"),
    Case("ltx-2", 8, (17, 4, 6), "bfloat16", "8MB"),
    Case("ltx-2", 8, (5, 6, 9), "float32", "15MB"),
    Case("ltx-2", 16, (9, 4, 6), "float16", "60MB"),
    Case("ltx-2", 16, (5, 6, 6), "bfloat16", "27MB"),
    Case("ltx-2", 32, (3, 3, 4), "float16", "96MB"),
    Case("ltx-2.3", 8, (9, 9, 16), "float32", "25MB"),
    Case("ltx-2.3", 8, (5, 6, 9), "bfloat16", "8MB"),
    Case("ltx-2", 4, (3, 9, 16), "float32", "7.5MB"),
    Case("ltx-2", 8, (9, 6, 9), "float16", "8MB"),
    Case("ltx-2", 4, (9, 6, 8), "float32", "60MB", TILES),
    Case("ltx-2.3", 8, (9, 6, 8), "bfloat16", "60MB", TilingConfig.temporal_only(32, 8)),
    Case("ltx-2.3", 8, (17, 4, 6), "bfloat16", "1GB", None, FROM_8_TO_40),
    Case("ltx-2.3", 8, (17, 4, 6), "float32", "11MB", None, FROM_8_TO_40),
    Case("ltx-2.3", 8, (33, 3, 4), "float16", "6MB", None, Window(slice(121, 136))),
    Case("ltx-2", 8, (17, 4, 6), "bfloat16", "12MB", None, FROM_8_TO_40),
    Case("ltx-2", 8, (17, 4, 6), "float32", "1GB", None, FROM_8_TO_40),
    Case("ltx-2", 4, (33, 3, 4), "float32", "3MB", None, Window(slice(121, 136))),
    Case("ltx-2.3", 8, (5, 9, 16), "bfloat16", "1GB", None, Window(height=slice(96, 192))),
    Case("ltx-2.3", 8, (5, 9, 16), "float32", "22MB", None, Window(height=slice(96, 192))),
    Case("ltx-2", 8, (5, 9, 16), "float16", "1GB", None, Window(None, slice(96, 192), slice(100, 333))),
    Case("ltx-2", 8, (9, 9, 16), "bfloat16", "11MB", None, Window(slice(8, 30), slice(96, 192))),
    Case("ltx-0.9.0", 8, (9, 4, 5), "float32", "1GB"),
    Case("ltx-0.9.0", 8, (9, 4, 5), "bfloat16", "8MB"),
    Case("ltx-0.9.1", 8, (9, 4, 5), "float32", "1GB"),
    Case("ltx-0.9.1", 8, (9, 4, 5), "float16", "14MB"),
    Case("ltx-0.9.5", 8, (9, 4, 5), "bfloat16", "1GB"),
    Case("ltx-0.9.5", 8, (9, 4, 5), "float32", "16MB", None, Window(slice(8, 40))),
    Case("ltx-2.3", 8, (5, 9, 16), "bfloat16", "8MB", 1),
    Case("ltx-2", 4, (5, 9, 16), "float32", "6.5MB", 2),
]


def measure_case(case: Case) -> Result:
    """Plan and run one decode."""
    config = replace(PUBLISHED[case.version].config, base_channels=case.base_channels, latent_channels=8)
    decoder = VideoDecoder(config).init_random()
    decoder.set_dtype(getattr(mx, case.dtype))
    latents = mx.random.normal((1, decoder.config.latent_channels, *case.size)).astype(decoder.dtype)
    mx.eval(decoder.parameters(), latents)
    mx.synchronize()
    mx.clear_cache()
    options = {"memory_limit": case.memory_limit, "tiling": case.tiling, "window": case.window}
    plan = plan_decode(decoder, latents.shape, **options)
    start = time.perf_counter()
    peak = measured_peak(decoder, latents, plan)
    return Result(plan, peak, time.perf_counter() - start)


def measured_peak(decoder: StreamingDecoder, latents: mx.array, plan: DecodePlan) -> int:
    """Bytes that a plan takes, weights included."""
    options = decoder.options(causal=plan.causal, num_inference_steps=plan.inference_steps)
    job = Job.prepare(decoder, latents, options, "uint8", plan)
    for frames in frames_of(job):
        del frames
    # The job's own meter, as a correction of the chunk size starts MLX's count anew.
    job.meter.read()
    return job.meter.highest


def print_row(case: Case, result: Result) -> None:
    """Print a row of a Markdown table."""
    plan = result.plan
    chunk = f"{plan.latent_frames_per_step}" + (f", {plan.max_chunk_frames}" if plan.max_chunk_frames else "")
    windows = "tiles" if isinstance(case.tiling, TilingConfig) else len(plan.parts)
    if isinstance(case.tiling, int):
        windows = f"{windows}, halo {case.tiling}"
    shown = [span for span in plan.output if span.length < span.size]
    if shown:
        windows = f"{windows} of " + ", ".join(f"{span.start}:{span.stop}" for span in shown)
    size = "x".join(str(length) for length in case.size)
    print(
        f"| {case.version} | {case.base_channels} | {size} | {case.dtype} | {windows} | {chunk} | "
        f"{plan.memory_limit / 1e6:.1f} | {plan.peak_bytes / 1e6:.2f} | {result.measured_bytes / 1e6:.2f} | "
        f"{result.ratio:.3f} | {result.seconds:.1f} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first rows")
    cases = QUICK if parser.parse_args().quick else CASES
    columns = [
        "version",
        "channels",
        "latents",
        "dtype",
        "windows",
        "chunk",
        "budget",
        "predicted",
        "measured",
        "ratio",
        "seconds",
    ]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    ratios, shares, seconds = [], [], 0.0
    for case in cases:
        result = measure_case(case)
        print_row(case, result)
        ratios.append(result.ratio)
        shares.append(result.measured_bytes / result.plan.memory_limit)
        seconds += result.seconds
    print(
        f"\n{len(cases)} rows in {seconds:.0f} s: predicted over measured {min(ratios):.3f} to "
        f"{max(ratios):.3f}, at most {100 * max(shares):.0f} % of the budget used "
        f"({mx.default_device()}, mlx {mx.__version__})"
    )


if __name__ == "__main__":
    main()
