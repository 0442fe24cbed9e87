"""What commands print: text or JSON to stdout; errors, warnings and news as one line each to stderr."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

from mlx_vae_tiling.checkpoints.identify import CheckpointInfo
from mlx_vae_tiling.cli import NAME
from mlx_vae_tiling.cli.options import in_options
from mlx_vae_tiling.runtime.planning.memory import format_bytes
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.report import DecodeReport
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.blocks import ResBlockNarrowing, ResBlocks
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.diffusion_config import DiffusionDecoderConfig
from mlx_vae_tiling.vae.published import AnyConfig
from mlx_vae_tiling.vae.regions import Window


def print_result(args: argparse.Namespace, text: object, fields: dict[str, Any]) -> None:
    """Prints a result to stdout, as JSON where the arguments ask for it."""
    print(json.dumps(fields, indent=1) if args.json else text)


def print_error(text: str) -> None:
    """Prints what is wrong as one line to stderr, in the words of a command line."""
    print(f"{NAME}: error: {in_options(text)}", file=sys.stderr)


def print_warning(text: str) -> None:
    """Prints what may be wrong as one line to stderr."""
    print(f"{NAME}: warning: {text}", file=sys.stderr)


def plan_fields(plan: DecodePlan) -> dict[str, Any]:
    """The fields of a plan in types that JSON has; slices as [start, stop]."""
    return {
        **{name: value for name, value in vars(plan).items() if name not in ("parts", "config")},
        "backend": plan.backend.name,
        "output": _bounds(plan.output.window),
        "windows": [_bounds(window) for window in plan.windows],
        "tiling": dataclasses.asdict(plan.tiling) if isinstance(plan.tiling, TilingConfig) else plan.tiling,
        "chunk_bytes": plan.chunk_bytes,
        "fits": plan.fits,
    }


def plan_text(plan: DecodePlan, seconds: float | None) -> str:
    """A plan in a few lines, with the seconds that are expected of it where they are known."""
    if seconds is None:
        return str(plan)
    return f"{plan}\ntime     {seconds:.3g} s of convolutions, at the rates measured here"


def print_news(text: str) -> None:
    """Prints what is being done as one line to stderr."""
    print(f"{NAME}: {text}", file=sys.stderr)


def report_fields(report: DecodeReport) -> dict[str, Any]:
    """The fields of a report in types that JSON has."""
    return {**vars(report), "plan": plan_fields(report.plan)}


def checkpoint_fields(info: CheckpointInfo) -> dict[str, Any]:
    """The fields of a checkpoint and of its config in types that JSON has."""
    config = info.config
    return {
        **vars(info),
        "path": str(info.path),
        "config": _config_fields(config),
        "parameters": config.parameters,
        "receptive_field": config.receptive_field,
        "temporal_scale": config.temporal_scale,
        "spatial_scale": config.spatial_scale,
    }


def checkpoint_text(info: CheckpointInfo) -> str:
    """A checkpoint in a few lines."""
    config = info.config
    others = {name: value for name, value in vars(config).items() if name != "decoder_blocks"}
    time, height, width = config.receptive_field
    rows = {
        "file": info.path,
        "version": info.version,
        "layout": info.layout,
        "stored": f"{info.dtype}, {format_bytes(info.decoder_bytes)}",
        "parameters": f"{config.parameters:,}",
        "blocks": ", ".join(_blocks(config)),
        "config": ", ".join(f"{name} {value}" for name, value in others.items()),
        "scale": f"{config.temporal_scale} frames and {config.spatial_scale} pixels per latent",
        "receptive": f"field of {time:.2f} latents in time, {height:.2f} x {width:.2f} in space, each way",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items())


def _bounds(window: Window) -> dict[str, list[int]]:
    return {name: [part.start, part.stop] for name, part in vars(window).items()}


def _config_fields(config: AnyConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    if isinstance(config, DecoderConfig):
        fields["decoder_blocks"] = [{type(b).__name__: vars(b)} for b in config.decoder_blocks]
    return fields


def _blocks(config: AnyConfig) -> Iterator[str]:
    """What a decoder is made of, in decode order."""
    if isinstance(config, DecoderConfig):
        yield from (_block(block) for block in config.decoder_blocks)
    elif isinstance(config, DiffusionDecoderConfig):
        for depth, kernel, up in zip(
            config.stage_depths, config.stage_kernels, (*config.upsamples, None), strict=True
        ):
            yield f"{depth} attending to {_by(kernel)}" + ("" if up else ", denoising")
            if up:
                yield f"up {_by(up[0])}"
    else:
        for width in config.widths[:-1]:
            yield from (f"{config.blocks} of {width} channels that see the frame before", "up 2x2x2")


def _block(block: Any) -> str:
    if isinstance(block, ResBlocks):
        return f"{block.num_layers} residual" + (" with noise" if block.inject_noise else "")
    if isinstance(block, ResBlockNarrowing):
        return "narrowing"
    return f"up {_by(block.stride)}"


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
