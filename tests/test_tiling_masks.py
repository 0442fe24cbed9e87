"""Masks against their closed form in float64."""

import doctest
import importlib

import numpy as np
import pytest

from mlx_vae_tiling import compute_trapezoidal_mask_1d

LENGTHS = (1, 2, 5, 16, 33)
RAMPS = (-1, 0, 1, 2, 7, 16, 40)


def expected_mask(length, ramp_left, ramp_right, from_0):
    left, right = (min(max(ramp, 0), length) for ramp in (ramp_left, ramp_right))
    mask = []
    for i in range(length):
        rising = 1.0
        if i < left:
            rising = i / left if from_0 else (i + 1) / (left + 1)
        falling = min(1.0, (length - i) / (right + 1))
        mask.append(rising * falling)
    return np.array(mask, dtype=np.float64)


@pytest.mark.parametrize("from_0", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_mask_equals_closed_form(length, from_0):
    for ramp_left in RAMPS:
        for ramp_right in RAMPS:
            mask = np.array(compute_trapezoidal_mask_1d(length, ramp_left, ramp_right, from_0))
            assert mask.shape == (length,) and mask.dtype == np.float32
            expected = expected_mask(length, ramp_left, ramp_right, from_0)
            np.testing.assert_allclose(mask, expected, rtol=1e-7, atol=0)


def test_left_ramp_does_not_start_from_0_by_default():
    assert compute_trapezoidal_mask_1d(4, 2, 0).tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("length", [0, -3])
def test_empty_mask_raises(length):
    with pytest.raises(ValueError, match=f"length must be positive, got {length}"):
        compute_trapezoidal_mask_1d(length, 1, 1)


def test_a_mask_that_no_video_needs_raises():
    with pytest.raises(ValueError, match=f"length must be at most {2**24}, got {2**24 + 1}"):
        compute_trapezoidal_mask_1d(2**24 + 1, 1, 1)


@pytest.mark.parametrize("module", ["masks", "intervals", "config", "decode"])
def test_docstring_examples(module):
    results = doctest.testmod(importlib.import_module(f"mlx_vae_tiling.tiling.{module}"))
    assert results.attempted and not results.failed
