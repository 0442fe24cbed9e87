"""Failures of the device: told from errors of ours, and tried once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

SIGNS_OF_THE_DEVICE = ("[METAL]", "malloc]", "Unable to allocate")
"""In what MLX raises where a command buffer or an allocation failed; anything else is an error of ours."""

T = TypeVar("T")


def of_the_device(error: RuntimeError) -> bool:
    """Whether it was the device that failed."""
    return any(sign in str(error) for sign in SIGNS_OF_THE_DEVICE)


def tried_twice(run: Callable[[], T], doing: str) -> T:
    """What a function returns, which is called once more where the device failed.

    Args:
        run: Computes something and waits for it.
        doing: What it does, for the error.

    Raises:
        RuntimeError: If the device fails also the second time.
    """
    try:
        return run()
    except RuntimeError as error:
        if not of_the_device(error):
            raise
    # Outside of the clause above, where the error's traceback would hold what was computed.
    mx.clear_cache()
    try:
        return run()
    except RuntimeError as error:
        if not of_the_device(error):
            raise
        raise RuntimeError(
            f"{doing} failed twice, before the first frame: {error}. Close other programs that use the "
            "GPU, or try a smaller memory limit"
        ) from error
