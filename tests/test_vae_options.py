"""Options of a decode, and the noise of a seed: of the whole video, cut by position."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vae_tiling.vae.options import DecodeOptions, Noise
from mlx_vae_tiling.vae.regions import Region, Span

SIZE = (6, 5)
"""Height and width of the latents."""


def region(*spans):
    return Region(*(Span(*span) for span in spans))


ALL = region((0, 4, 4), (0, 6, 6), (0, 5, 5))
PART = region((1, 3, 4), (2, 5, 6), (1, 4, 5))


@pytest.mark.parametrize("changes", [{"noise_scale": -0.1}, {"noise_scale": 1.1}, {"inference_steps": 0}])
def test_shares_and_steps_have_bounds(changes):
    with pytest.raises(ValueError, match=r"must (lie|be)"):
        DecodeOptions(
            **{"causal": False, "timestep": (), "noise_scale": 0.0, "seed": 0, "normalized": True} | changes
        )


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_seeds_are_those_that_mlx_takes(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\*\*64 - 1"):
        DecodeOptions(False, (), 0.0, seed, True)


DRAWN = {
    "latents": lambda noise, where: noise.latents(where, 1, 3),
    "field": lambda noise, where: noise.field(2, scaled(where), 8),
    "pixels": lambda noise, where: noise.pixels(scaled(where), 1, 3, (1, 8)),
}


def scaled(where):
    return Region(where.time, *(Span(*(8 * bound for bound in span)) for span in where[1:]))


@pytest.mark.parametrize("kind", DRAWN)
def test_noise_is_normal_and_of_its_seed(kind):
    noise = np.array(DRAWN[kind](Noise(1, SIZE), ALL))
    few = 4 / np.sqrt(noise.size)
    assert abs(noise.mean()) < few and abs(noise.std() - 1) < few
    assert np.array_equal(noise, DRAWN[kind](Noise(1, SIZE), ALL))
    assert not np.allclose(noise, DRAWN[kind](Noise(2, SIZE), ALL), atol=0.1)


@pytest.mark.parametrize("kind", DRAWN)
def test_a_part_has_the_noise_of_its_place(kind):
    """Also of a tile that counts from its own corner, in time as well."""
    whole = DRAWN[kind](Noise(1, SIZE), ALL)
    scale = 1 if kind == "latents" else 8
    cuts = [slice(1, 3), slice(2 * scale, 5 * scale), slice(1 * scale, 4 * scale)]
    expected = whole[tuple(cuts[-whole.ndim :])] if kind == "field" else whole[(..., *cuts)]
    assert mx.array_equal(DRAWN[kind](Noise(1, SIZE), PART), expected)
    tile = region((0, 2, 2), (0, 3, 3), (0, 3, 3))
    assert mx.array_equal(DRAWN[kind](Noise(1, SIZE).at((1, 2, 1)), tile), expected)
