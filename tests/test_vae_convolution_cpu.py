"""The CPU's convolutions in float32 against float64, to the byte between calls, and in stated memory."""

import os
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest

from mlx_vae_tiling.vae.kernels import winograd, winograd_kernel
from mlx_vae_tiling.vae.kernels.convolution_cpu import (
    choose_form,
    convolve_numpy,
    convolve_rows,
    workspace_bytes,
)
from mlx_vae_tiling.vae.kernels.numbers import numbers
from mlx_vae_tiling.vae.kernels.rows import Rows, activate, row_buffers
from mlx_vae_tiling.vae.kernels.upsampling_cpu import upsample_numpy
from mlx_vae_tiling.vae.kernels.workers import idle_cores
from mlx_vae_tiling.vae.kernels.workspace import Workspace, bytes_of

pytestmark = pytest.mark.cpu

FORMS = ("columns", "shifts", "winograd")
# (frames, height, width, channels in, channels out) of the output; Winograd's tiles are 4 by 2.
SHAPES = [
    (1, 4, 1, 3, 5),
    (1, 4, 2, 1, 1),
    (2, 5, 3, 8, 4),
    (5, 7, 8, 40, 24),
    (3, 9, 6, 33, 48),
    (2, 11, 37, 16, 200),
    (3, 30, 40, 20, 12),
    (3, 16, 24, 128, 64),
]
TOLERANCE = {"columns": 1e-6, "shifts": 1e-6, "winograd": 2e-6}


def operands(shape, seed=0):
    """Input as after SiLU, with its borders; kernel, bias, residual."""
    t, h, w, c, o = shape
    random = np.random.default_rng(seed)
    x = random.standard_normal((t + 2, h + 2, w + 2, c))
    weight = random.standard_normal((o, 3, 3, 3, c)) / np.sqrt(27 * c)
    rest = (random.standard_normal(s) for s in ((o,), (t, h, w, o)))
    return [a.astype(np.float32) for a in (x / (1 + np.exp(-x)), weight, *rest)]


def run(form, shape, rows, weight, bias, **options):
    t, h, w, _, o = shape
    out = np.full((t, h, w, o), np.nan, np.float32)
    convolve_rows(rows, weight, bias, out, form=form, **options)
    return out


def reference(x, weight, bias):
    taps = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3, 3), axis=(0, 1, 2))
    return np.einsum("thwcijk,oijkc->thwo", taps, weight.astype(np.float64), optimize=True) + bias


def relative_error(y, expected):
    return np.abs(y - expected).max() / np.abs(expected).max()


@pytest.fixture(params=["whole", "blocks and passes"])
def cut(request, monkeypatch):
    """As it is, and with bounds so small that frames and channels are cut."""
    if request.param != "whole":
        monkeypatch.setattr(winograd, "TILES_PER_BLOCK", 16)
        monkeypatch.setattr(winograd, "WEIGHT_BYTES", 2**18)
        monkeypatch.setattr(winograd, "FRAME_BYTES", 2**17)
        monkeypatch.setattr(winograd_kernel, "KERNEL_FLOATS", 2**10)
        monkeypatch.setattr("mlx_vae_tiling.vae.kernels.convolution_cpu.WORKSPACE_BYTES", 2**17)
        monkeypatch.setattr("mlx_vae_tiling.vae.kernels.convolution_cpu.CACHED_FLOATS", 2**11)
        monkeypatch.setattr("mlx_vae_tiling.vae.kernels.rows.BAND_FLOATS", 2**8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_form_equals_float64(form, shape, cut):
    x, weight, bias, residual = operands(shape)
    expected = reference(x, weight, bias)
    assert relative_error(run(form, shape, Rows(list(x)), weight, bias), expected) <= TOLERANCE[form]
    y = run(form, shape, Rows(list(x)), weight, bias, residual=residual)
    assert relative_error(y, expected + residual) <= TOLERANCE[form]


def test_winograd_is_accurate_at_full_width():
    """The usual points, 0, +-1, +-2 and infinity, give 1.9e-6 here."""
    shape = (1, 16, 48, 1024, 64)
    x, weight, bias, _ = operands(shape)
    y = run("winograd", shape, Rows(list(x)), weight, bias)
    assert relative_error(y, reference(x, weight, bias)) <= 1.2e-6


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_read_before_it_is_written(form, cut):
    for shape in SHAPES:
        x, weight, bias, residual = operands(shape)
        rows = Rows([f[1:-1, 1:-1] for f in x], (1, 1, 1, 1), activation="norm_silu")
        results = []
        for value in (0, np.nan):
            workspace = Workspace()
            (memory,) = workspace.take((workspace_bytes(form, *shape) // 4,))
            memory[...] = value
            results.append(run(form, shape, rows, weight, bias, residual=residual, workspace=workspace))
        assert np.isfinite(results[1]).all() and np.array_equal(*results), shape


@pytest.mark.parametrize("form", FORMS)
def test_bytes_of_a_frame_do_not_depend_on_its_company(form, cut):
    for shape in SHAPES:
        x, weight, bias, residual = operands(shape)
        whole = run(form, shape, Rows(list(x)), weight, bias, residual=residual)
        for t in range(len(whole)):
            rows, own = Rows(list(x[t : t + 3])), (1, *shape[1:])
            alone = run(form, own, rows, weight, bias, residual=residual[t : t + 1])
            assert np.array_equal(alone[0], whole[t])


@pytest.mark.parametrize("form", FORMS)
def test_bytes_do_not_depend_on_workers(form, cut):
    workspace = Workspace()
    for shape in SHAPES:
        x, weight, bias, residual = operands(shape)
        expected = run(form, shape, Rows(list(x)), weight, bias, residual=residual)
        for workers in (1, 2, 3):
            options = {"workers": workers, "workspace": workspace}
            y = run(form, shape, Rows(list(x)), weight, bias, residual=residual, **options)
            assert np.array_equal(y, expected), (shape, workers)


def test_a_worker_raises():
    shape = (1, 40, 40, 3, 3)
    x, weight, bias, _ = operands(shape)
    with pytest.raises(IndexError):
        run("winograd", shape, Rows(list(x[:2])), weight, bias, workers=2)


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_workspace_is_as_stated(form, activated, cut):
    for shape in SHAPES:
        x, weight, bias, _ = operands(shape)
        rows = Rows(list(x))
        if activated:
            rows = Rows([f[1:-1, 1:-1] for f in x], (1, 1, 1, 1), activation="norm_silu")
        workspace = Workspace()
        out = np.empty((*shape[:3], shape[4]), np.float32)
        tracemalloc.start()
        convolve_rows(rows, weight, bias, out, form=form, workspace=workspace)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert workspace.nbytes == workspace_bytes(form, *shape)
        assert workspace.nbytes <= peak <= workspace.nbytes + 2**17  # NumPy's own buffers


@pytest.mark.parametrize("form", FORMS)
def test_workspace_of_workers(form):
    shape = (4, 60, 64, 20, 12)
    x, weight, bias, _ = operands(shape)
    for workers in (2, 3):
        workspace = Workspace()
        run(form, shape, Rows(list(x)), weight, bias, workers=workers, workspace=workspace)
        assert workspace.nbytes == workspace_bytes(form, *shape, workers=workers)


@pytest.mark.parametrize("channels", [128, 256, 512, 1024])
def test_workspace_is_bounded_up_to_4k(channels):
    scale = 1024 // channels
    for height, width in ((8, 12), (34, 60), (68, 120)):
        for frames in (1, 8, 64):
            stated = workspace_bytes(
                "winograd", frames, height * scale, width * scale, channels, 4 * channels
            )
            assert stated <= 96 * 2**20


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((8, 12, 1024, 1024), "columns"),
        ((16, 24, 512, 512), "winograd"),
        ((64, 96, 128, 48), "winograd"),
        ((64, 96, 32, 32), "shifts"),
        ((3, 96, 128, 128), "columns"),
    ],
)
def test_choice_of_form(shape, form):
    assert choose_form(*shape) == form


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 1, 1), (1, 0, 0, 1), (0, 1, 1, 0)])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("activation", ["none", "norm_silu"])
def test_rows_are_activated_and_padded(activation, modulated, padding, mode, cut):
    random = np.random.default_rng(0)
    frames = random.standard_normal((2, 9, 5, 24), dtype=np.float32)
    modulation = None
    expected = frames.astype(np.float64)
    if activation != "none":
        expected /= np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-8)
        if modulated:
            modulation = tuple(random.standard_normal((2, 24), dtype=np.float32))
            expected = expected * (1 + modulation[1]) + modulation[0]
        expected = silu(expected)
    top, bottom, left, right = padding
    widths = [(0, 0), (top, bottom), (left, right), (0, 0)]
    expected = np.pad(expected, widths, mode="constant" if mode == "zeros" else "reflect")
    rows = Rows(list(frames), padding, mode, activation, modulation)
    height, width, channels = rows.shape
    assert rows.shape == expected.shape[1:]
    out, scratch = (np.full(s, np.nan, np.float32) for s in row_buffers(height, width, channels))
    for start, stop in ((0, height), (0, 3), (2, 7), (height - 3, height)):
        y = rows.read(1, start, stop, out, scratch)
        assert np.abs(y - expected[1, start:stop]).max() <= 2e-6


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["none", "norm_silu"])
def test_rows_in_half_precision_are_those_of_the_same_numbers(activation, dtype, cut):
    x = mx.random.normal((2, 9, 5, 24), key=mx.random.key(0)).astype(dtype)
    for padding in ((0, 0, 0, 0), (1, 1, 1, 1)):
        read = []
        for frames in (x, x.astype(mx.float32)):
            rows = Rows(list(numbers(frames)), padding, "reflect", activation)
            buffers = (np.full(s, np.nan, np.float32) for s in row_buffers(*rows.shape))
            read.append(rows.read(1, 2, 7, *buffers))
        assert read[0].dtype == np.float32 and np.array_equal(*read)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    shape = (2, 8, 16, 33, 48)
    x, weight, bias, _ = (mx.array(a).astype(dtype) for a in operands(shape))
    y = convolve_numpy(x[None], weight, bias)
    wide = (np.array(a.astype(mx.float32)) for a in (x, weight, bias))
    expected = reference(*wide)
    unit = 2.0 ** (-11 if dtype == mx.float16 else -8)
    error = np.abs(np.array(y[0].astype(mx.float32)) - expected)
    assert y.dtype == dtype and (error <= unit * np.abs(expected) + 1e-5).all()


def test_activation_of_extremes_warns_of_nothing():
    x = np.array([1e30, -1e30, 1e-30, 0], np.float32)[None, None]
    out, scratch = np.empty((2, 1, 1, 4), np.float32)
    with np.errstate(over="ignore"):
        activate(x * np.float32(1e-12), out, scratch)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("form", FORMS)
def test_activation_on_the_way_equals_activation_before(form, cut):
    shape = (2, 11, 10, 36, 8)
    _, weight, bias, _ = operands(shape)
    inner = np.random.default_rng(1).standard_normal((4, 11, 10, 36), dtype=np.float32)
    rows = Rows(list(inner), (1, 1, 1, 1), "reflect", "norm_silu")
    normal = inner / np.sqrt((inner.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-8)
    padded = np.pad(silu(normal), [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    y = run(form, shape, rows, weight, bias)
    assert relative_error(y, reference(padded, weight, bias)) <= TOLERANCE[form]


def test_infinities_pass_without_warnings():
    shape = (1, 8, 16, 3, 5)
    x, weight, bias, _ = operands(shape)
    x[1, 4, 4] = np.inf
    for form in FORMS:
        for workers in (1, 2):
            y = run(form, shape, Rows(list(x)), weight, bias, workers=workers)
            assert not np.isfinite(y).all()


def test_workspace_grows_and_is_aligned():
    workspace = Workspace()
    for shapes in ([(3, 5), (7,)], [(100, 3), (1,)], [(2, 2)]):
        arrays = workspace.take(*shapes)
        assert [a.shape for a in arrays] == shapes
        assert all(a.ctypes.data % 64 == 0 for a in arrays)
        for i, a in enumerate(arrays):
            a[...] = i
        assert all((a == i).all() for i, a in enumerate(arrays))
    assert workspace.nbytes == bytes_of((100, 3), (1,))


@pytest.mark.parametrize("repeats", [0, 1, 2])
@pytest.mark.parametrize("stride", [(2, 2, 2), (2, 1, 1), (1, 2, 2)])
def test_upsampling_equals_index_arithmetic(stride, repeats):
    t, h, w = stride
    y = np.random.default_rng(0).standard_normal((2, 2, 3, 5, 6 * t * h * w), dtype=np.float32)
    skip = y[..., : 6 // repeats * t * h * w] * 2 if repeats else None
    out = upsample_numpy(mx.array(y), None if skip is None else mx.array(skip), stride, repeats or 1)
    b, frame, row, column, channel = np.indices(out.shape)
    place = (frame % t * h + row % h) * w + column % w
    where = (b, frame // t, row // h, column // w)
    expected = y[(*where, channel * t * h * w + place)]
    if repeats:
        expected = expected + skip[(*where, channel % (6 // repeats) * t * h * w + place)]
    assert np.array_equal(np.array(out), expected)


@pytest.mark.parametrize(("everybody", "own", "alone"), [(0.02, 0.02, True), (0.03, 0.02, False)])
def test_blas_with_threads_leaves_no_cores_to_workers(everybody, own, alone, monkeypatch):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    monkeypatch.setattr("time.process_time", iter((1, 1 + everybody)).__next__)
    monkeypatch.setattr("time.thread_time", iter((1, 1 + own)).__next__)
    assert idle_cores() == (cores if alone else 1)
