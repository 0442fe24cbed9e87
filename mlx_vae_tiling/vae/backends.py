"""The backends by name, and that of the default device."""

from __future__ import annotations

import mlx.core as mx

from mlx_vae_tiling.arguments import require, told
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.cpu import CPUBackend
from mlx_vae_tiling.vae.metal import MetalBackend

CPU, METAL, CUDA = CPUBackend(), MetalBackend(), Backend("cuda")
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CPU, METAL, CUDA)}


def current_backend() -> Backend:
    """The backend of the default device."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return CPU
    return METAL if mx.metal.is_available() else CUDA


def backend_of(backend: Backend | str | None) -> Backend:
    """A backend, by its name, or that of the default device.

    Raises:
        ValueError: If there is none of this name.
    """
    require("backend", backend, f"one of {', '.join(BACKENDS)}, a Backend or None", str, Backend, None)
    if backend is None:
        return current_backend()
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {told(backend)}")
        return BACKENDS[backend]
    return backend
