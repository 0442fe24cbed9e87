"""The 3x3x3 convolution, in the form that suits each backend.

All forms share one contract: x (B, T+2, H+2, W+2, C), weight (O, 3, 3, 3, C) and bias (O,) give
the valid convolution (B, T, H, W, O) in the dtype of x. Padding is the caller's.
"""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from mlx_vae_tiling.vae.kernels import convolution_gpu as gpu
from mlx_vae_tiling.vae.kernels.convolution_cpu import blocked, convolve_numpy

ConvolutionForm = Literal[gpu.GPUForm, "blocked", "numpy"]


def convolve(x: mx.array, weight: mx.array, bias: mx.array, form: ConvolutionForm) -> mx.array:
    """Valid 3x3x3 convolution.

    Args:
        x: (B, T+2, H+2, W+2, C).
        weight: (O, 3, 3, 3, C).
        bias: (O,).
        form: "blocked" or "numpy", or one of those in `convolution_gpu`.

    Returns:
        (B, T, H, W, O) in the dtype of x.
    """
    if form == "blocked":
        return blocked(x, weight, bias)
    if form == "numpy":
        return convolve_numpy(x, weight, bias)
    return gpu.convolve(x, weight, bias, form)
