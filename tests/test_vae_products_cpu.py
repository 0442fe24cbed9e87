"""Products and attention by NumPy's BLAS equal float64, and are the same bytes however they are cut."""

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from diffusion_cases import small_decoder
from test_vae_attention import GRIDS, expected, part_of, random_grid, whole
from vae_cases import joined

from mlx_vae_tiling.vae.backends import CPU
from mlx_vae_tiling.vae.kernels import products_cpu
from mlx_vae_tiling.vae.kernels.attention_cpu import attention_numpy, attention_workspace
from mlx_vae_tiling.vae.kernels.products_cpu import linear_numpy, linear_workspace, mlp_numpy, mlp_workspace
from mlx_vae_tiling.vae.kernels.workspace import Workspace
from mlx_vae_tiling.vae.regions import Attention, Region, Span, Window

SIZE, CHANNELS = (3, 19, 21), 24
WHOLE = Region(*(Span(0, n, n) for n in SIZE))
PARTS = [
    Region(Span(1, 2, 3), Span(0, 19, 19), Span(3, 21, 21)),
    Region(Span(0, 3, 3), Span(5, 6, 19), Span(7, 8, 21)),
    Region(Span(2, 3, 3), Span(11, 19, 19), Span(0, 16, 21)),
]


def operands(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) / np.sqrt(shape[-1]) for shape in shapes]


def arrays(values, dtype=mx.float32):
    return [mx.array(value, mx.float32).astype(dtype) for value in values]


def in_float64(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


@pytest.fixture(params=[True, False], ids=["turned", "as they are"])
def weights(request, monkeypatch):
    """Small weights are copied the other way round; here also as if they were large."""
    if not request.param:
        monkeypatch.setattr(products_cpu, "TURNED_ELEMENTS", 0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(mx.float32, 2e-6), (mx.float16, 2e-3), (mx.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("workers", [1, 2])
def test_products_equal_float64(dtype, tolerance, workers, weights):
    x, weight, bias = arrays(operands((2, *SIZE, CHANNELS), (40, CHANNELS), (40,)), dtype)
    got = linear_numpy(x, weight, bias, WHOLE, workers=workers)
    assert got.dtype == dtype
    answer = in_float64(x) @ in_float64(weight).T
    np.testing.assert_allclose(in_float64(got), answer + in_float64(bias), rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        in_float64(linear_numpy(x, weight, None, WHOLE, workers=workers)), answer, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(mx.float32, 2e-6), (mx.float16, 2e-3), (mx.bfloat16, 2e-2)], ids=str
)
def test_a_gated_mlp_equals_float64(dtype, tolerance, weights):
    shapes = (2, *SIZE, CHANNELS), (56, CHANNELS), (56, CHANNELS), (CHANNELS, 56)
    x, up, gate, down = arrays(operands(*shapes), dtype)
    exact = [in_float64(a) for a in (x, up, gate, down)]
    hidden = exact[0] @ exact[2].T
    answer = (hidden / (1 + np.exp(-hidden)) * (exact[0] @ exact[1].T)) @ exact[3].T
    got = mlp_numpy(x, up, gate, down, WHOLE, workers=2)
    np.testing.assert_allclose(in_float64(got), answer, rtol=0, atol=tolerance)


@pytest.mark.parametrize("region", PARTS)
def test_products_of_a_part_are_the_bytes_of_the_whole(region, weights):
    shapes = (1, *SIZE, CHANNELS), (40, CHANNELS), (40,), (40, CHANNELS), (CHANNELS, 40)
    x, weight, bias, gate, down = arrays(operands(*shapes))
    part = mx.contiguous(part_of(x, region))
    one, other = linear_numpy(part, weight, bias, region), linear_numpy(x, weight, bias, WHOLE)
    assert mx.array_equal(one, part_of(other, region))
    one, other = mlp_numpy(part, weight, gate, down, region), mlp_numpy(x, weight, gate, down, WHOLE)
    assert mx.array_equal(one, part_of(other, region))


@pytest.mark.parametrize(("size", "kernel"), GRIDS)
def test_attention_equals_float64_and_itself_by_parts(size, kernel):
    q, kv = random_grid(size)
    given, held = mx.array(q, mx.float32), mx.array(kv, mx.float32)
    got = attention_numpy(given, held, kernel, whole(size), whole(size), workers=2)
    np.testing.assert_allclose(np.array(got), expected(q, kv, kernel), rtol=0, atol=3e-6)
    rng = np.random.default_rng(1)
    for _ in range(5):
        bounds = [sorted(rng.choice(n + 1, 2, replace=False)) for n in size]
        region = Region(*(Span(int(a), int(b), n) for (a, b), n in zip(bounds, size, strict=True)))
        keys = Attention(kernel).before(region)
        cut = (mx.contiguous(part_of(x, r)) for x, r in ((given, region), (held, keys)))
        part = attention_numpy(*cut, kernel, region, keys)
        assert mx.array_equal(part, part_of(got, region))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_attention_in_half_precision(dtype):
    size, kernel = GRIDS[1]
    given, held = arrays(random_grid(size), dtype)
    got = attention_numpy(given, held, kernel, whole(size), whole(size))
    answer = expected(in_float64(given), in_float64(held), kernel)
    assert got.dtype == dtype
    np.testing.assert_allclose(in_float64(got), answer, rtol=0, atol=1e-2)


def taken_outside_mlx(compute, threads=1):
    """Bytes of the workspace, which is all that NumPy has but for small buffers of its own in each thread."""
    compute(Workspace())  # masks are kept
    workspace = Workspace()
    tracemalloc.start()
    compute(workspace)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert workspace.nbytes <= peak <= workspace.nbytes + threads * 2**17
    return workspace.nbytes


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_workspace_is_as_stated(dtype, workers, weights):
    c, hidden = 192, 520
    shapes = (1, *SIZE, c), (hidden, c), (hidden, c), (c, hidden)
    x, up, gate, down = arrays(operands(*shapes), dtype)
    for region in (WHOLE, PARTS[0]):
        given = mx.contiguous(part_of(x, region))
        taken = taken_outside_mlx(
            lambda w, g=given, r=region: linear_numpy(g, up, None, r, w, workers), workers
        )
        assert taken == linear_workspace(c, hidden, dtype.size, workers)
        taken = taken_outside_mlx(
            lambda w, g=given, r=region: mlp_numpy(g, up, gate, down, r, w, workers), workers
        )
        assert taken == mlp_workspace(c, hidden, dtype.size, workers)


@pytest.mark.parametrize(("size", "kernel"), GRIDS)
def test_workspace_of_attention_is_as_stated(size, kernel):
    heads, width = 6, 32
    rng = np.random.default_rng(0)
    q, kv = (mx.array(rng.standard_normal((1, *size, *n, heads, width), np.float32)) for n in ((), (2,)))
    for dtype in (mx.float32, mx.bfloat16):
        given, held, grid = q.astype(dtype), kv.astype(dtype), whole(size)
        taken = taken_outside_mlx(lambda w, q=given, kv=held, r=grid: attention_numpy(q, kv, kernel, r, r, w))
        assert taken == attention_workspace(kernel, grid, heads, heads * width, 1)


def test_chunks_and_windows_are_the_bytes_of_the_whole():
    """On the CPU nothing depends on how a decode is cut, whatever the BLAS."""
    decoder = small_decoder()
    latents = mx.random.normal((1, 8, 5, 4, 3), key=mx.random.key(5))
    decoded = joined(decoder.stream(latents, latent_frames_per_step=5, backend=CPU))
    for step, cap in ((1, None), (2, None), (1, 3)):
        pieces = decoder.stream(latents, latent_frames_per_step=step, max_chunk_frames=cap, backend=CPU)
        assert mx.array_equal(joined(pieces), decoded)
    for window in (Window(slice(3, 20), slice(17, 90)), Window(None, None, slice(41, 42))):
        t, h, w = ((part or slice(None)) for part in (window.frames, window.height, window.width))
        part = joined(decoder.stream(latents, window=window, backend=CPU))
        assert mx.array_equal(part, decoded[:, :, t, h, w])
