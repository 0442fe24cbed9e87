"""Pictures that commands draw, with the extra `figures`."""

from __future__ import annotations

import errno
import os
from typing import Any


def matplotlib_figure() -> Any:
    """Matplotlib's module of figures.

    Raises:
        ImportError: If Matplotlib is not installed.
    """
    try:
        import matplotlib.figure as figure
    except ImportError as error:
        raise ImportError(
            "--map and --plot need Matplotlib: pip install 'mlx_vae_tiling[figures]'"
        ) from error
    return figure


def require_drawable(path: str) -> None:
    """Raises before anything is decoded what drawing a picture of this name would raise after it."""
    kinds = matplotlib_figure().Figure().canvas.get_supported_filetypes()
    if os.path.splitext(path)[1][1:].lower() not in kinds:
        raise ValueError(f"a picture must end in .{', .'.join(sorted(kinds))}, got {path}")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "no such directory to write in, create it first", folder)
