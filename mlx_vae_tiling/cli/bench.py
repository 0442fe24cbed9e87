"""`mlx-vae-tiling bench`: what this machine does, in one table to paste into an issue."""

from __future__ import annotations

import argparse
import re
from typing import Any

import mlx.core as mx

from mlx_vae_tiling import __version__
from mlx_vae_tiling.checkpoints.load import load_decoder
from mlx_vae_tiling.cli import NAME
from mlx_vae_tiling.cli.figures import matplotlib_figure, require_drawable
from mlx_vae_tiling.cli.options import SOURCE, parse_config
from mlx_vae_tiling.cli.printing import plan_fields, print_news, print_result
from mlx_vae_tiling.dtypes import FLOAT_TYPES, parse_dtype
from mlx_vae_tiling.runtime.bench import Bench, Decode, bench
from mlx_vae_tiling.runtime.planning.memory import format_bytes
from mlx_vae_tiling.runtime.tuning.choices import ERROR_BOUNDS, load_tuning, save_tuning
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.published import PUBLISHED

PURPOSE = "measure this machine: forms of the convolution, passes over memory, whole decodes"
EXAMPLES = """
  mlx-vae-tiling bench                              (LTX-2.3 with random weights, 768x512)
  mlx-vae-tiling bench --vae ltx-2.3-vae.safetensors --size 1920x1088 --latent-frames 6
  mlx-vae-tiling bench --quick                      (the demonstration VAE, in seconds)"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declares the arguments of this command alone."""
    add = command.add_argument
    add("--vae", metavar="SOURCE", help=SOURCE)
    add("--version", choices=PUBLISHED, help="in its place: a version with random weights; default: ltx-2.3")
    add("--size", metavar="WxH", help="of the frames, in multiples of 32; default: 768x512")
    add("--latent-frames", type=int, metavar="N", help="default: 8")
    add("--dtype", choices=[kind.name for kind in FLOAT_TYPES], help="of the weights; default: bfloat16")
    add("--memory", metavar="BYTES", help="budget, as 8GB or 6.5GiB; default: 70 %% of what is available")
    add("--quick", action="store_true", help="everything once; the demonstration VAE by default")
    add("--tune", action="store_true", help="keep the measurements of forms in the user's cache")
    add("--plot", metavar="FILE", help="draw memory over time, with the figures extra")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status."""
    if args.plot:
        require_drawable(args.plot)
    decoder = _decoder(args)
    latents = _latents(args, decoder)
    result = bench(decoder, latents, memory_limit=args.memory, quick=args.quick, tell=print_news)
    if args.plot:
        draw_memory(result, args.plot)
    if args.tune:
        tuning = load_tuning()
        for forms in result.forms:
            tuning.record(result.machine, forms.level, forms.trials)
        save_tuning(tuning)
    print_result(args, bench_text(result), bench_fields(result))
    return 0


def _decoder(args: argparse.Namespace) -> StreamingDecoder:
    if args.vae and args.version:
        raise ValueError("--vae names a decoder with weights and --version one without, give one of them")
    dtype = parse_dtype(args.dtype) if args.dtype else None
    if args.vae or (args.quick and not args.version):
        return load_decoder(args.vae or "demo", dtype=dtype, config=parse_config(args.config))
    decoder = build_decoder(PUBLISHED[args.version or "ltx-2.3"].config)
    decoder.cast(dtype or mx.bfloat16)
    return decoder.init_random()


def _latents(args: argparse.Namespace, decoder: StreamingDecoder) -> mx.array:
    text = args.size or ("128x96" if args.quick else "768x512")
    match, scale = re.fullmatch(r"(\d+)x(\d+)", text), decoder.config.spatial_scale
    if match is None or any(int(side) % scale or int(side) < 2 * scale for side in match.groups()):
        raise ValueError(f"--size must be WxH in multiples of {scale}, from {2 * scale} on, got {text!r}")
    frames = (3 if args.quick else 8) if args.latent_frames is None else args.latent_frames
    if frames < 1:
        raise ValueError(f"--latent-frames must be at least 1, got {frames}")
    shape = (1, decoder.config.latent_channels, frames, int(match[2]) // scale, int(match[1]) // scale)
    return mx.random.normal(shape, decoder.dtype, key=mx.random.key(0))


def bench_fields(result: Bench) -> dict[str, Any]:
    """All that was measured in types that JSON has."""
    return {
        "version": __version__,
        "machine": result.machine._asdict(),
        "device": {key: value for key, value in result.device.items()},
        "product_operations_per_second": result.product,
        "forms": [
            {
                "level": forms.level._asdict(),
                "frames": forms.frames,
                "share": forms.share,
                "chosen": forms.chosen,
                "trials": [trial._asdict() for trial in forms.trials],
            }
            for forms in result.forms
        ],
        "bytes_per_second": {one.name: one.bytes_per_second for one in result.passes},
        "decodes": [{**one._asdict(), "plan": plan_fields(one.plan)} for one in result.decodes],
    }


def bench_text(result: Bench) -> str:
    """All that was measured, as tables."""
    lines = [f"{NAME} {__version__} on {result.machine}"]
    lines.append(", ".join(f"{key} {value}" for key, value in result.device.items()))
    lines += ["", f"matrix product: {result.product / 1e9:.0f} GFLOP/s"]
    if result.forms:
        lines += ["", *_forms_lines(result), "", "passes over memory, GB/s"]
        lines += [f"  {one.name:<26}{one.bytes_per_second / 1e9:>8.1f}" for one in result.passes]
    lines += ["", *_decode_lines(result.decodes), ""]
    lines.append("Paste all of this into an issue: plans and forms for this machine are made from it.")
    return "\n".join(lines)


def _forms_lines(result: Bench) -> list[str]:
    bound = ERROR_BOUNDS[result.machine.dtype]
    lines = [f"convolutions: * is the fastest whose error is at most {bound:g}"]
    lines.append(f"  {'form':<16}{'frames':>7}{'ms':>10}{'GFLOP/s':>9}{'error':>10}")
    for level, frames, share, trials, chosen in result.forms:
        lines.append(f"  {level}, {share:.0%} of the operations")
        for form, seconds, error, operations in trials:
            mark = "*" if form == chosen else ""
            rate = operations / seconds / 1e9
            lines.append(f"  {mark:>2}{form:<14}{frames:>7}{1e3 * seconds:>10.2f}{rate:>9.0f}{error:>10.1e}")
    return lines


def _decode_lines(decodes: list[Decode]) -> list[str]:
    name = max(len(one.name) for one in decodes)
    head = ["chunk", "windows", "predicted", "measured", "ratio"]
    head += ["seconds", "ms/frame", "piece", "evaluation"]
    lines = [f"{'decodes':<{name}}" + "".join(f"{text:>11}" for text in head)]
    for one in decodes:
        plan = one.plan
        cap = f", {plan.max_chunk_frames}" if plan.max_chunk_frames else ""
        cells = (
            f"{plan.latent_frames_per_step}{cap}",
            f"{len(plan.parts)}",
            format_bytes(plan.peak_bytes),
            format_bytes(one.peak_bytes),
            f"{plan.peak_bytes / one.peak_bytes:.3f}",
            f"{one.seconds:.2f}",
            f"{1e3 * one.seconds / one.frames:.1f}",
            f"{one.longest_seconds:.2f} s",
            f"{one.evaluation_seconds:.2f} s" if one.evaluation_seconds else "-",
        )
        lines.append(f"{one.name:<{name}}" + "".join(f"{cell:>11}" for cell in cells))
    return lines


def draw_memory(result: Bench, path: str) -> None:
    """Draws what MLX held during each decode, over time.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    figure = matplotlib_figure().Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for one in result.decodes:
        axes.plot([t for t, _ in one.memory], [held / 1e9 for _, held in one.memory], label=one.name, lw=1)
    axes.set(xlabel="seconds", ylabel="GB in use", title=str(result.machine), ylim=(0, None))
    axes.legend(fontsize="small")
    figure.savefig(path)
