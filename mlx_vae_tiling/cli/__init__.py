"""The command `mlx-vae-tiling`, one module a command."""

import sys
from collections.abc import Sequence

NAME = "mlx-vae-tiling"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; Ctrl-C is answered from the start, before all that it needs is loaded.

    Args:
        argv: Its arguments; None for those of the process.

    Returns:
        The exit status.
    """
    try:
        from mlx_vae_tiling.cli.entry import run_command

        return run_command(argv)
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted, nothing was kept", file=sys.stderr)
        return 130
