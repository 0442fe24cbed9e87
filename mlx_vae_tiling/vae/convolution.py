"""The 3x3x3 convolution, in the form that suits each backend.

All forms share one contract: x (B, T+2, H+2, W+2, C), weight (O, 3, 3, 3, C) and bias (O,) give
the valid convolution (B, T, H, W, O) in the dtype of x. Padding is the caller's.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from mlx_vae_tiling.vae.backend import current_backend
from mlx_vae_tiling.vae.convolution_cpu import blocked, convolve_numpy

ConvolutionForm = Literal["stock", "folded", "blocked", "numpy"]


def default_form(dtype: mx.Dtype) -> ConvolutionForm:
    """The form that the default device is expected to run best.

    On Metal, half precision takes the implicit 3-D GEMM, because the Winograd kernels that the
    stock path selects keep their intermediates in half precision. The CPU wheel for Linux is
    linked to a reference BLAS, NumPy's to a fast one.
    """
    backend = current_backend()
    if backend != "cpu":
        return "folded" if backend == "metal" and dtype != mx.float32 else "stock"
    return "numpy" if platform.system() == "Linux" else "blocked"


def convolve(x: mx.array, weight: mx.array, bias: mx.array, form: ConvolutionForm | None = None) -> mx.array:
    """Valid 3x3x3 convolution.

    Args:
        x: (B, T+2, H+2, W+2, C).
        weight: (O, 3, 3, 3, C).
        bias: (O,).
        form: "stock", "folded", "blocked" or "numpy"; by default what `default_form` says.

    Returns:
        (B, T, H, W, O) in the dtype of x.
    """
    return FORMS[form or default_form(x.dtype)](x, weight, bias)


def _stock(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.conv_general(x, weight) + bias


def _folded(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Two halves in time, or of the rows of a single frame, as a batch of two."""
    b, t, h, _, _ = x.shape
    axis = 1 if t > 3 else 2
    size = (t if axis == 1 else h) - 2
    if b > 1 or size == 1:
        return _stock(x, weight, bias)
    half = (size + 1) // 2
    low, high = mx.split(x, [half + 2], axis=axis)[0], mx.split(x, [size - half], axis=axis)[1]
    low, high = mx.split(_stock(mx.concatenate([low, high]), weight, bias), 2)
    return mx.concatenate([low, mx.split(high, [2 * half - size], axis=axis)[1]], axis=axis)


FORMS: dict[ConvolutionForm, Callable[[mx.array, mx.array, mx.array], mx.array]] = {
    "stock": _stock,
    "folded": _folded,
    "blocked": blocked,
    "numpy": convolve_numpy,
}
