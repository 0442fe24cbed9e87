"""The GPU's forms of the convolution, computed on the CPU, against float64; what they hand to MLX."""

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_vae_tiling.vae.kernels import convolution_gpu as gpu
from mlx_vae_tiling.vae.kernels import winograd_gpu as winograd
from mlx_vae_tiling.vae.kernels.operands import NO_PADDING, Operands, operands_of
from mlx_vae_tiling.vae.operations import mirrored

FORMS = ("stock", "folded", "gemm", "winograd32", "winograd_time")
ALL_SIDES = ((0, 0), (1, 1), (1, 1))
PADDINGS = (NO_PADDING, ALL_SIDES, ((0, 0), (1, 0), (0, 1)), ((0, 0), (0, 1), (1, 1)))

# (batch, frames, height, width, channels in, channels out) of the output.
SHAPES = [
    (1, 1, 3, 4, 5, 7),
    (1, 2, 4, 3, 6, 4),
    (1, 3, 3, 5, 16, 8),
    (1, 5, 4, 4, 8, 16),
    (1, 8, 3, 3, 7, 5),
    (2, 3, 4, 3, 6, 5),
]
# Relative to the largest value: float32's own rounding; in half precision the last one, those of
# the sums of "gemm", and those of transformed operands in "winograd_time".
TOLERANCES = {mx.float32: 3e-6, mx.float16: 2**-9, mx.bfloat16: 2**-6}


def operands(shape, dtype=mx.float32, padding=NO_PADDING):
    b, t, h, w, c, o = shape
    given = [size + 2 - sum(pair) for size, pair in zip((t, h, w), padding, strict=True)]
    keys = mx.random.split(mx.random.key(sum(shape)), 3)
    shapes = ((b, *given, c), (o, 3, 3, 3, c), (o,))
    return [mx.random.normal(s, key=key).astype(dtype) for s, key in zip(shapes, keys, strict=True)]


def in_float64(a):
    return np.array(a.astype(mx.float32), dtype=np.float64)


def oracle(x, weight, bias, padding=NO_PADDING):
    x = np.pad(in_float64(x), [(0, 0), *padding, (0, 0)])
    taps = np.lib.stride_tricks.sliding_window_view(x, (3, 3, 3), axis=(1, 2, 3))
    return np.einsum("bthwcijk,oijkc->bthwo", taps, in_float64(weight), optimize=True) + in_float64(bias)


def relative_error(y, expected):
    return np.abs(in_float64(y) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("padding", PADDINGS, ids=["none", "all", "one corner", "three sides"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_form_equals_float64(form, dtype, padding):
    for shape in SHAPES:
        x, weight, bias = operands(shape, dtype, padding)
        y = gpu.convolve(x, weight, bias, form, padding)
        assert (y.dtype, y.shape) == (dtype, (*shape[:4], shape[5]))
        assert relative_error(y, oracle(x, weight, bias, padding)) <= TOLERANCES[dtype], shape


@pytest.mark.parametrize(
    ("size", "blocks", "dtype", "padding"),
    [
        *(((1, 128, 66), 2, mx.float32, padding) for padding in PADDINGS),
        ((1, 128, 66), 2, mx.float16, ALL_SIDES),
        ((1, 128, 66), 2, mx.bfloat16, ALL_SIDES),
        ((2, 64, 66), 1, mx.float32, ALL_SIDES),
    ],
)
def test_winograd_in_blocks_equals_float64(size, blocks, dtype, padding):
    """Rounded once, whatever the dtype."""
    x, weight, bias = operands((1, *size, 64, 64), dtype, padding)
    block_bytes = 40 * 10**6 // blocks
    assert len(winograd.blocks_of(operands_of(x, weight, padding), block_bytes)) == blocks
    y = gpu.convolve(x, weight, bias, "winograd32", padding, block_bytes=block_bytes)
    once = {mx.float32: 3e-6, mx.float16: 2**-11, mx.bfloat16: 2**-8}
    assert relative_error(y, oracle(x, weight, bias, padding)) <= once[dtype]


def test_winograd_repeats_a_frame_that_is_too_small():
    shape = (1, 4, 30, 50, 64, 64)
    x, weight, bias = operands(shape, mx.float32, ALL_SIDES)
    all_at_once = winograd.blocks_of(operands_of(x, weight, ALL_SIDES), 2**40)
    assert all_at_once == [winograd.Block(0, 4, 0, 30)]
    whole = gpu.convolve(x, weight, bias, "winograd32", ALL_SIDES)
    assert relative_error(whole, oracle(x, weight, bias, ALL_SIDES)) <= 3e-6
    one = x[:, :3]
    assert winograd.blocks_of(operands_of(one, weight, ALL_SIDES), 2**40) == [
        winograd.Block(0, 1, 0, 30, repeats=3)
    ]
    alone = gpu.convolve(one, weight, bias, "winograd32", ALL_SIDES)
    assert mx.abs(alone - whole[:, :1]).max().item() <= 1e-5 * mx.abs(whole).max().item()


@pytest.mark.parametrize(
    ("shape", "block_bytes"),
    [
        ((1, 8, 272, 480, 128, 48), 2**30),  # channels in multiples of 32 only
        ((1, 8, 16, 16, 32, 128), 2**30),  # 224 channels in all
        ((1, 8, 272, 480, 128, 128), 40 * 2**20),  # no block of 4096 positions fits
    ],
)
def test_folded_where_mlx_would_not_take_winograd(shape, block_bytes):
    assert winograd.blocks_of(Operands(*shape, 2, ALL_SIDES), block_bytes) is None


@pytest.mark.parametrize("size", [(8, 272, 480, 128, 128), (4, 136, 240, 256, 1024), (5, 32, 48, 512, 512)])
@pytest.mark.parametrize("block_bytes", [400 * 10**6, 800 * 10**6])
@pytest.mark.parametrize("padding", PADDINGS)
def test_blocks_cover_each_row_once_and_fit(size, block_bytes, padding):
    shape = Operands(1, *size, 2, padding)
    blocks = winograd.blocks_of(shape, block_bytes)
    covered = np.zeros(size[:2], int)
    for frame, frames, row, rows, repeats in blocks:
        covered[frame : frame + frames, row : row + rows] += 1
        assert frames * repeats * rows * size[2] >= 4096
        assert winograd._block_bytes(shape, frames * repeats, rows) <= block_bytes
    assert (covered == 1).all()


@pytest.mark.parametrize("form", FORMS)
def test_operation_before_and_skip(form):
    shape = (1, 1, 64, 66, 64, 64) if form == "winograd32" else (1, 4, 5, 6, 16, 8)
    x, weight, bias = operands(shape, mx.float32, ALL_SIDES)
    skip = mx.random.normal((*shape[:4], shape[5]), key=mx.random.key(7))
    x64 = in_float64(x)
    expected = oracle(mx.array(x64 / (1 + np.exp(-x64))), weight, bias, ALL_SIDES) + in_float64(skip)
    y = gpu.convolve(x, weight, bias, form, ALL_SIDES, before=nn.silu, skip=skip)
    assert relative_error(y, expected) <= 3e-6


@pytest.mark.parametrize("form", FORMS)
def test_form_takes_views(form):
    x, weight, bias = operands((1, 6, 6, 6, 16, 8))
    view = x[:, 1:7, :, 1:7]
    assert relative_error(gpu.convolve(view, weight, bias, form), oracle(view, weight, bias)) <= 3e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_chunks_do_not_matter(form, dtype):
    """On one device frames are the same to the last bit, except for sums that BLAS orders by size."""
    x, weight, bias = operands((1, 9, 4, 5, 16, 8), dtype)
    whole = gpu.convolve(x, weight, bias, form)
    for cuts in ([3, 4], [1, 2, 8], [5]):
        bounds = [0, *cuts, 9]
        pieces = [
            gpu.convolve(x[:, start : stop + 2], weight, bias, form, first_frame=start)
            for start, stop in pairwise(bounds)
        ]
        pieces = mx.concatenate(pieces, axis=1)
        difference = mx.abs(pieces - whole).astype(mx.float32).max() / mx.abs(whole).max()
        assert difference.item() <= {mx.float32: 1e-6, mx.float16: 2**-10, mx.bfloat16: 2**-8}[dtype], cuts


def test_pairs_in_time_are_those_of_the_video():
    """Without alignment, pairs of other frames are rounded otherwise in half precision."""
    x, weight, bias = operands((1, 9, 4, 5, 16, 8), mx.bfloat16)
    whole = gpu.convolve(x, weight, bias, "winograd_time")
    aligned, not_aligned = (
        gpu.convolve(x[:, 3:], weight, bias, "winograd_time", first_frame=first) for first in (3, 0)
    )
    assert mx.array_equal(aligned, whole[:, 3:]) and not mx.array_equal(not_aligned, whole[:, 3:])


@pytest.fixture
def convolutions(monkeypatch):
    """(shape of x, shape of weight, stride) of each convolution that reaches MLX."""
    seen, general = [], mx.conv_general

    def convolve(x, weight, stride=1, padding=0):
        seen.append((tuple(x.shape), tuple(weight.shape), stride))
        return general(x, weight, stride=stride, padding=padding)

    monkeypatch.setattr(mx, "conv_general", convolve)
    return seen


@pytest.mark.parametrize("form", ["folded", "winograd_time"])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 7, 9])
def test_implicit_products_only(form, frames, convolutions):
    """MLX takes two-dimensional Winograd for a batch of one with temporal stride 1."""
    mx.eval(gpu.convolve(*operands((1, frames, 4, 3, 16, 16)), form))
    assert convolutions and all(shape[0] > 1 or stride[0] > 1 for shape, _, stride in convolutions)


@pytest.mark.parametrize(("frames", "parts"), [(2, 2), (3, 3), (5, 5), (8, 2), (9, 3), (35, 5)])
def test_folded_computes_each_frame_once(frames, parts, convolutions):
    mx.eval(gpu.convolve(*operands((1, frames, 4, 3, 16, 16)), "folded"))
    assert convolutions == [((parts, frames // parts + 2, 6, 5, 16), (16, 3, 3, 3, 16), (1, 1, 1))]


def test_pairs_in_time_save_a_third(convolutions):
    mx.eval(gpu.convolve(*operands((1, 8, 4, 3, 16, 16)), "winograd_time"))
    frames = sum(x[0] for x, weight, _ in convolutions if weight == (16, 1, 3, 3, 16))
    assert frames == 16  # of 24


def test_frames_are_not_padded():
    with pytest.raises(ValueError, match=r"frames cannot be padded.*\(1, 1\)"):
        gpu.convolve(*operands((1, 2, 3, 3, 4, 4)), "folded", ((1, 1), (0, 0), (0, 0)))


# Bytes beside the operands as MLX's Metal host code allocated them over a stub driver, in MB.
ALLOCATED = [
    ("stock", (8, 272, 480, 128, 128), 2, 4794),
    ("folded", (8, 272, 480, 128, 128), 2, 668),
    ("gemm", (8, 272, 480, 128, 128), 2, 879),
    ("winograd32", (8, 272, 480, 128, 128), 2, 761),
    ("winograd_time", (8, 272, 480, 128, 128), 2, 670),
    ("stock", (2, 68, 120, 512, 512), 2, 426),
    ("winograd32", (2, 68, 120, 512, 512), 2, 520),
    ("winograd_time", (1, 34, 60, 1024, 1024), 4, 184),
    ("folded", (4, 136, 240, 256, 1024), 4, 1070),
]


@pytest.mark.parametrize(("form", "size", "itemsize", "megabytes"), ALLOCATED)
def test_workspace_is_what_mlx_allocates(form, size, itemsize, megabytes):
    stated = gpu.workspace_bytes(form, Operands(1, *size, itemsize, ALL_SIDES), 512 * 2**20)
    assert stated / 1e6 == pytest.approx(megabytes, rel=0.01)


@pytest.mark.parametrize("rows", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("columns", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("size", [(2, 4), (3, 2), (5, 3), (4, 7)])
def test_mirrored_borders(size, rows, columns):
    x = mx.random.normal((2, 3, *size, 5), key=mx.random.key(1))
    expected = np.pad(np.array(x), [(0, 0), (0, 0), rows, columns, (0, 0)], mode="reflect")
    np.testing.assert_array_equal(np.array(mirrored(x, rows, columns)), expected)


@pytest.mark.parametrize("frames", [1, 4, 5])
@pytest.mark.parametrize("form", FORMS)
def test_reflection_and_operation_before(form, frames):
    shape = (1, 1, 64, 66, 64, 64) if form == "winograd32" else (1, frames, 5, 6, 16, 8)
    x, weight, bias = operands(shape, mx.float32, ALL_SIDES)
    x64 = in_float64(x)
    x64 = np.pad(x64 / (1 + np.exp(-x64)), [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    y = gpu.convolve(x, weight, bias, form, ALL_SIDES, reflected=True, before=nn.silu)
    assert relative_error(y, oracle(mx.array(x64), weight, bias)) <= 3e-6


@pytest.mark.parametrize("padding", [NO_PADDING, ALL_SIDES])
@pytest.mark.parametrize("reflected", [False, True])
@pytest.mark.parametrize("frames", [1, 4])
def test_long_kernels_are_divided_by_output_channels(frames, reflected, padding, convolutions, monkeypatch):
    shape = (1, frames, 4, 6, 16, 48)
    x, weight, bias = operands(shape, padding=padding)
    whole = gpu.convolve(x, weight, bias, "folded", padding, reflected=reflected, before=nn.silu)
    monkeypatch.setattr(gpu, "LONGEST_EVALUATION", operands_of(x, weight, padding).operations // 2 - 1)
    skip = mx.random.normal(whole.shape, key=mx.random.key(3))
    options = {"reflected": reflected, "before": nn.silu}
    y = gpu.convolve(x, weight, bias, "folded", padding, **options, skip=skip)
    assert [weight[0] for _, weight, _ in convolutions] == [48, 16, 16, 16]
    assert mx.abs(y - whole - skip).max().item() <= 1e-5 * mx.abs(whole).max().item()
