"""Every form of the 3x3x3 convolution against float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vae_tiling.vae.convolution import convolve
from mlx_vae_tiling.vae.kernels import convolution_cpu

FORMS = ("stock", "blocked", "numpy", "folded")

# (batch, frames, height, width, channels in, channels out) of the output. NumPy's form changes its
# method above 32 channels and, with them, where a frame has 32 tiles of 4x2; above 4096 positions it
# takes blocks of rows.
SHAPES = [
    (1, 1, 1, 1, 3, 5),
    (2, 1, 1, 7, 4, 6),
    (1, 3, 5, 1, 32, 16),
    (2, 2, 3, 3, 33, 7),
    (1, 4, 9, 6, 40, 24),
    (1, 5, 2, 3, 8, 48),
    (2, 1, 4, 3, 48, 8),
    (1, 1, 70, 71, 3, 4),
    (2, 2, 19, 17, 34, 9),
]
# The result is rounded once or, where the bias is added to a rounded product, twice.
TOLERANCES = {mx.float32: 1e-5, mx.float16: 2**-10, mx.bfloat16: 2**-7}


def operands(shape, dtype=mx.float32):
    """Input with its two borders on each axis, kernel and bias, all exact in float64."""
    b, t, h, w, c, o = shape
    shapes = ((b, t + 2, h + 2, w + 2, c), (o, 3, 3, 3, c), (o,))
    keys = mx.random.split(mx.random.key(sum(shape)), 3)
    return [mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys, strict=True)]


def oracle(x, weight, bias):
    x, weight, bias = (np.array(a.astype(mx.float32), dtype=np.float64) for a in (x, weight, bias))
    taps = np.lib.stride_tricks.sliding_window_view(x, (3, 3, 3), axis=(1, 2, 3))
    return np.einsum("bthwcijk,oijkc->bthwo", taps, weight, optimize=True) + bias


def relative_error(y, expected):
    return np.abs(np.array(y.astype(mx.float32)) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("workspace_bytes", [convolution_cpu.WORKSPACE_BYTES, 2 * 4 * 27 * 40 * 6])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_form_equals_float64(form, dtype, workspace_bytes, monkeypatch):
    monkeypatch.setattr(convolution_cpu, "WORKSPACE_BYTES", workspace_bytes)
    for shape in SHAPES:
        x, weight, bias = operands(shape, dtype)
        y = convolve(x, weight, bias, form)
        assert (y.dtype, y.shape) == (dtype, (*shape[:4], shape[5]))
        assert relative_error(y, oracle(x, weight, bias)) <= TOLERANCES[dtype], shape


def test_forms_agree():
    x, weight, bias = operands((1, 5, 8, 6, 36, 12))
    results = [convolve(x, weight, bias, form) for form in FORMS]
    assert all(relative_error(y, np.array(results[0])) <= 1e-5 for y in results)


@pytest.mark.parametrize("form", FORMS)
def test_form_takes_views(form):
    x, weight, bias = operands((1, 4, 4, 4, 6, 5))
    view = x[:, 1:5, :, 1:6]
    expected = oracle(view, weight, bias)
    assert relative_error(convolve(view, weight, bias, form), expected) <= 1e-5


def test_numpy_blocks_stay_within_the_workspace(monkeypatch):
    monkeypatch.setattr(convolution_cpu, "WORKSPACE_BYTES", 2 * 4 * 27 * 40 * 6)
    sizes, matmul = [], np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, out: sizes.append(a.nbytes) or matmul(a, b, out=out))
    convolve(*operands((1, 1, 7, 6, 40, 8)), "numpy")
    assert max(sizes) == convolution_cpu.WORKSPACE_BYTES and len(sizes) == 4
