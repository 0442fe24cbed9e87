"""Which of MLX's backends computes."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

Backend = Literal["cpu", "metal", "cuda"]


def current_backend() -> Backend:
    """The backend of the default device."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"
