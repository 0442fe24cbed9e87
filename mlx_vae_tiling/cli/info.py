"""`mlx-vae-tiling info`: what a checkpoint holds."""

from __future__ import annotations

import argparse

from mlx_vae_tiling.checkpoints.describe import describe_checkpoint
from mlx_vae_tiling.cli.options import SOURCE, parse_config
from mlx_vae_tiling.cli.printing import checkpoint_fields, checkpoint_text, print_result

PURPOSE = "say what a checkpoint holds, from its header alone"
EXAMPLES = """
  mlx-vae-tiling info demo
  mlx-vae-tiling info ltx-2-19b-dev.safetensors --json
  mlx-vae-tiling info vae/ --config ltx-2"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declares the arguments of this command alone."""
    command.add_argument("source", metavar="SOURCE", help=SOURCE)


def run(args: argparse.Namespace) -> int:
    """Prints it; returns the exit status."""
    info = describe_checkpoint(args.source, config=parse_config(args.config))
    print_result(args, checkpoint_text(info), checkpoint_fields(info))
    return 0
