"""What commands print: text for people, or fields as JSON for programs; errors and warnings in one line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from mlx_vae_tiling.checkpoints.describe import CheckpointInfo
from mlx_vae_tiling.runtime.memory import format_bytes
from mlx_vae_tiling.runtime.plan import DecodePlan
from mlx_vae_tiling.runtime.run import DecodeReport
from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.blocks import ResBlockNarrowing, ResBlocks
from mlx_vae_tiling.vae.regions import Window

NAME = "mlx-vae-tiling"


def print_result(args: argparse.Namespace, text: object, fields: dict[str, Any]) -> None:
    """Prints a result to stdout, as JSON where the arguments ask for it."""
    print(json.dumps(fields, indent=1) if args.json else text)


def print_error(text: str) -> None:
    """Prints what is wrong as one line to stderr."""
    print(f"{NAME}: error: {text}", file=sys.stderr)


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


def report_fields(report: DecodeReport) -> dict[str, Any]:
    """The fields of a report in types that JSON has."""
    return {**vars(report), "plan": plan_fields(report.plan)}


def checkpoint_fields(info: CheckpointInfo) -> dict[str, Any]:
    """The fields of a checkpoint and of its config in types that JSON has."""
    config = info.config
    return {
        **vars(info),
        "path": str(info.path),
        "config": dataclasses.asdict(config)
        | {"decoder_blocks": [{type(b).__name__: vars(b)} for b in config.decoder_blocks]},
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
        "blocks": ", ".join(_block(block) for block in config.decoder_blocks),
        "config": ", ".join(f"{name} {value}" for name, value in others.items()),
        "scale": f"{config.temporal_scale} frames and {config.spatial_scale} pixels per latent",
        "receptive": f"field of {time:.2f} latents in time, {height:.2f} x {width:.2f} in space, each way",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items())


def _bounds(window: Window) -> dict[str, list[int]]:
    return {name: [part.start, part.stop] for name, part in vars(window).items()}


def _block(block: Any) -> str:
    if isinstance(block, ResBlocks):
        return f"{block.num_layers} residual" + (" with noise" if block.inject_noise else "")
    if isinstance(block, ResBlockNarrowing):
        return "narrowing"
    return f"up {'x'.join(map(str, block.stride))}"
