"""The command `mlx-vae-tiling`, one module a command."""

from mlx_vae_tiling.cli.entry import main

__all__ = ["main"]
