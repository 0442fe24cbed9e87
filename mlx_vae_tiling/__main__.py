"""`python -m mlx_vae_tiling`: the command `mlx-vae-tiling`."""

import sys

from mlx_vae_tiling.cli import main

if __name__ == "__main__":
    sys.exit(main())
