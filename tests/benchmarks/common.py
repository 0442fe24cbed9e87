"""The form of every benchmark: candidates measured in one run, printed as ratios to the first."""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx


class Measurement(NamedTuple):
    """Median seconds of the repeats, and the peak of MLX's memory above what was active before."""

    seconds: float
    peak_bytes: int


def measure(run: Callable[[], object], repeats: int = 1) -> Measurement:
    """Run a function that evaluates what it computes and returns nothing large."""
    seconds, peaks = [], []
    for _ in range(repeats):
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        start = time.perf_counter()
        run()
        mx.synchronize()
        seconds.append(time.perf_counter() - start)
        peaks.append(max(mx.get_peak_memory(), before) - before)
    return Measurement(sorted(seconds)[repeats // 2], max(peaks))


def print_ratios(title: str, rows: dict[str, Measurement]) -> None:
    """Print a table whose ratios are relative to its first row."""
    first = next(iter(rows.values()))
    print(f"{title} ({mx.default_device()}, mlx {mx.__version__})")
    print(f"{'':<28}{'time':>10}{'ratio':>8}{'peak':>12}{'ratio':>8}")
    for name, row in rows.items():
        time_ratio, peak_ratio = row.seconds / first.seconds, row.peak_bytes / first.peak_bytes
        peak = f"{row.peak_bytes / 2**20:.1f} MiB"
        print(f"{name:<28}{row.seconds:>8.3f} s{time_ratio:>8.2f}{peak:>12}{peak_ratio:>8.2f}")


def parse_quick(description: str | None) -> bool:
    """Whether the command line asks for sizes that take a second."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that the benchmark runs")
    return bool(parser.parse_args().quick)
