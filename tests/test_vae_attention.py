"""Neighbourhood attention and rotary positions equal a float64 transcription of their definitions."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_vae_tiling.vae.attention import (
    block_for,
    blocks_of,
    neighbourhood_attention,
)
from mlx_vae_tiling.vae.regions import Attention, Region, Span
from mlx_vae_tiling.vae.rotary import rotary_factors, rotary_split, rotated

HEADS, WIDTH = 2, 8

# Sizes of the grid and of the kernel: at the kernel's size, above it, below it in time, and wide.
GRIDS = [
    ((3, 7, 7), (3, 7, 7)),
    ((5, 9, 8), (3, 7, 7)),
    ((2, 7, 12), (3, 5, 5)),
    ((13, 12, 19), (11, 11, 11)),
    ((6, 20, 33), (3, 5, 5)),
]


def random_grid(size, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, *size, HEADS, WIDTH)) / np.sqrt(WIDTH)
    return q, rng.standard_normal((2, *size, 2, HEADS, WIDTH))


def windows(size, kernel):
    """Of each position of an axis, those it sees."""
    kernel = min(kernel, size)
    starts = [min(max(i - kernel // 2, 0), size - kernel) for i in range(size)]
    return [range(start, start + kernel) for start in starts]


def expected(q, kv, kernel):
    """Attention position by position, in float64."""
    out = np.empty_like(q)
    size = q.shape[1:4]
    seen = [windows(n, k) for n, k in zip(size, kernel, strict=True)]
    for t, h, w in np.ndindex(*size):
        part = kv[:, seen[0][t]][:, :, seen[1][h]][:, :, :, seen[2][w]]
        k, v = (part[:, :, :, :, i].reshape(2, -1, HEADS, WIDTH) for i in (0, 1))
        scores = np.einsum("bnd,bknd->bnk", q[:, t, h, w], k)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[:, t, h, w] = np.einsum("bnk,bknd->bnd", weights, v)
    return out


def whole(size):
    return Region(*(Span(0, n, n) for n in size))


def attention_pairs(kernel, queries, block):
    """Pairs of a query and a key whose product is computed for a region of queries."""
    sizes = zip(queries, kernel, block, (False, True, True), strict=True)
    return math.prod(sum(b.repeats * b.queries * b.keys for b in blocks_of(*size)) for size in sizes)


def attention_excess(kernel, queries, block):
    """Products that are computed over those that are needed."""
    needed = [min(k, span.size) * span.length for k, span in zip(kernel, queries, strict=True)]
    return attention_pairs(kernel, queries, block) / math.prod(needed)


def part_of(x, region):
    return x[:, region.time.slice, region.height.slice, region.width.slice]


def attended(q, kv, kernel, queries, keys, block=(2, 4, 8), **options):
    q, kv = mx.array(part_of(q, queries), mx.float32), mx.array(part_of(kv, keys), mx.float32)
    return np.array(neighbourhood_attention(q, kv, kernel, queries, keys, block, **options))


@pytest.mark.parametrize("pairs", [2**26, 3000], ids=["at once", "in portions"])
@pytest.mark.parametrize(("size", "kernel"), GRIDS)
def test_whole_grids(size, kernel, pairs):
    q, kv = random_grid(size)
    got = attended(q, kv, kernel, whole(size), whole(size), pairs=pairs)
    np.testing.assert_allclose(got, expected(q, kv, kernel), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("size", "kernel"), GRIDS)
def test_parts_of_grids(size, kernel):
    """Any part of the grid, from just the keys that it needs, equals that part of the whole."""
    q, kv = random_grid(size)
    answer = expected(q, kv, kernel)
    rng = np.random.default_rng(1)
    for _ in range(5):
        bounds = [sorted(rng.choice(n + 1, 2, replace=False)) for n in size]
        region = Region(*(Span(int(a), int(b), n) for (a, b), n in zip(bounds, size, strict=True)))
        got = attended(q, kv, kernel, region, Attention(kernel).before(region))
        np.testing.assert_allclose(got, part_of(answer, region), rtol=0, atol=3e-6)


@pytest.mark.parametrize("block", [(1, 1, 1), (2, 4, 8), (4, 2, 16)])
def test_blocks_of_any_size_give_the_same(block):
    size, kernel = (5, 9, 20), (3, 5, 7)
    q, kv = random_grid(size)
    got = attended(q, kv, kernel, whole(size), whole(size), block)
    np.testing.assert_allclose(got, expected(q, kv, kernel), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("span", "kernel", "block", "aligned"),
    list(
        itertools.product(
            [Span(0, 30, 30), Span(3, 17, 30), Span(29, 30, 30), Span(0, 5, 5)],
            [1, 5, 11],
            [1, 4, 8],
            [True, False],
        )
    ),
)
def test_blocks_cover_an_axis_and_hold_every_window(span, kernel, block, aligned):
    seen = windows(span.size, kernel)
    position = span.start
    for group in blocks_of(span, kernel, block, aligned):
        for number in range(group.repeats):
            one = group.part(number, number + 1)
            assert one.first == position and one.queries <= block
            for i, start in enumerate(one.starts):
                assert one.first_key + start == seen[position + i].start
            assert one.first_key + one.keys == seen[position + one.queries - 1].stop
            position += one.queries
    assert position == span.stop


def test_aligned_blocks_are_the_same_in_every_window():
    first, *others = blocks_of(Span(43, 83, 400), 11, 8, True)
    assert (first.first, first.queries) == (43, 5)
    assert [(b.first, b.repeats, b.queries) for b in others] == [(48, 4, 8), (80, 1, 3)]


@pytest.mark.parametrize(("copying", "most"), [(96, 3.5), (8, 2.1)])
def test_the_excess_of_the_published_kernel_is_counted_and_low(copying, most):
    """Products by closed form: in the interior each block of n queries sees n + 10 keys along an axis."""
    kernel, region = (11, 11, 11), Region(Span(20, 28, 121), Span(64, 128, 272), Span(64, 192, 480))
    block = block_for(kernel, (8, 64, 128), copying)
    keys = np.prod([n + 10 for n in block])
    assert attention_pairs(kernel, region, block) == region.volume * keys
    assert attention_excess(kernel, region, block) == pytest.approx(keys / 1331)
    assert attention_excess(kernel, region, block) < most


def test_the_excess_is_that_of_the_calls(monkeypatch):
    size, kernel = (5, 9, 20), (3, 5, 7)
    q, kv = random_grid(size)
    counted = []
    attend = mx.fast.scaled_dot_product_attention

    def spy(q, k, v, **options):
        counted.append(q.shape[0] * q.shape[2] * k.shape[2])
        return attend(q, k, v, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    attended(q, kv, kernel, whole(size), whole(size))
    assert sum(counted) == 2 * attention_pairs(kernel, whole(size), (2, 4, 8))


@pytest.mark.parametrize("head_dim", [16, 64])
def test_rotations(head_dim):
    """Pairs of neighbouring channels turn by position / 10000**(channel / channels of the axis)."""
    region = Region(Span(2, 5, 9), Span(0, 3, 3), Span(7, 9, 12))
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 2, HEADS, head_dim))
    answer = np.empty_like(x)
    first = 0
    for axis, width in enumerate(rotary_split(head_dim)):
        for channel in range(0, width, 2):
            shape = [1] * 5
            shape[axis + 1] = region[axis].length
            positions = np.arange(region[axis].start, region[axis].stop).reshape(shape)
            turn = np.exp(1j * positions / 10000 ** (channel / width))
            value = (x[..., first + channel] + 1j * x[..., first + channel + 1]) * turn
            answer[..., first + channel], answer[..., first + channel + 1] = value.real, value.imag
        first += width
    assert first == head_dim
    got = rotated(mx.array(x, mx.float32), rotary_factors(region, head_dim))
    np.testing.assert_allclose(np.array(got), answer, rtol=0, atol=3e-6)


def test_the_published_heads_split_into_16_24_24():
    assert rotary_split(64) == (16, 24, 24)
