"""The 3x3x3 convolution, in the form that suits each backend.

All forms share one contract: x (B, T+2, H+2, W+2, C), weight (O, 3, 3, 3, C) and bias (O,) give
the valid convolution (B, T, H, W, O) in the dtype of x. Padding is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import mlx.core as mx

from mlx_vae_tiling.vae.kernels import convolution_gpu as gpu
from mlx_vae_tiling.vae.kernels.convolution_cpu import blocked, convolve_numpy

ConvolutionForm = Literal["stock", "folded", "blocked", "numpy", "gemm", "winograd32", "winograd_time"]


def convolve(x: mx.array, weight: mx.array, bias: mx.array, form: ConvolutionForm) -> mx.array:
    """Valid 3x3x3 convolution.

    Args:
        x: (B, T+2, H+2, W+2, C).
        weight: (O, 3, 3, 3, C).
        bias: (O,).
        form: "stock", "blocked", "numpy", or one of those in `convolution_gpu`.

    Returns:
        (B, T, H, W, O) in the dtype of x.
    """
    if form == "gemm" or form == "winograd32" or form == "winograd_time":
        return gpu.convolve(x, weight, bias, form)
    return FORMS[form](x, weight, bias)


def _stock(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.conv_general(x, weight) + bias


FORMS: dict[ConvolutionForm, Callable[[mx.array, mx.array, mx.array], mx.array]] = {
    "stock": _stock,
    "blocked": blocked,
    "numpy": convolve_numpy,
    "folded": partial(gpu.convolve, form="folded"),
}
