"""Work that is divided over machines: the output once, even by counted work, within the memory of each."""

from functools import lru_cache

import mlx.core as mx
import numpy as np
import pytest
from vae_cases import expected_operations

from mlx_vae_tiling.runtime.planning.cost import CostModel
from mlx_vae_tiling.runtime.planning.grids import part_around
from mlx_vae_tiling.runtime.ranks.shares import assign, divide
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.published import PUBLISHED
from mlx_vae_tiling.vae.regions import Window

FULL_HD, LONG, SMALL = (16, 34, 60), (151, 16, 24), (3, 2, 3)
PLENTY = 64 * 10**9


@lru_cache
def model_of(size, version="ltx-2.3"):
    decoder = build_decoder(PUBLISHED[version].config)
    shape = (1, decoder.config.latent_channels, *size)
    return CostModel(decoder, shape, mx.bfloat16, decoder.policy("metal"))


def wanted(model, window=None):
    return (window or Window()).region(*model.decoder.output_shape(model.latent_shape)[2:])


def assert_covers_once(division, region):
    counts = np.zeros([span.length for span in region], np.int8)
    for part in division.parts:
        counts[tuple(own.inside(whole) for own, whole in zip(part.pixels, region, strict=True))] += 1
    assert (counts == 1).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize(
    ("size", "window"),
    [(FULL_HD, None), (LONG, None), (SMALL, None), (FULL_HD, Window(slice(3, 90), slice(7, 800)))],
)
def test_even_by_counted_work(size, window, ranks):
    """Against the closed form of the tests, which knows no steps and no needs."""
    model = model_of(size)
    division = divide(model, wanted(model, window), [PLENTY] * ranks)
    assert_covers_once(division, wanted(model, window))
    config, shape = model.decoder.config, model.latent_shape
    counted = [0] * ranks
    for part, owner in zip(division.parts, division.owners, strict=True):
        counted[owner] += expected_operations(config, shape, part.pixels.window)
    assert division.operations == tuple(counted)
    if size != SMALL:
        assert min(counted) > 0 and max(counted) <= 1.1 * np.mean(counted)


def test_bands_of_wide_frames_and_ranges_of_long_clips():
    bands = divide(model_of(FULL_HD), wanted(model_of(FULL_HD)), [PLENTY] * 2)
    assert bands.together
    assert [part.pixels.width.slice for part in bands.parts] == [slice(0, 960), slice(960, 1920)]
    ranges = divide(model_of(LONG), wanted(model_of(LONG)), [PLENTY] * 2)
    assert not ranges.together
    assert [part.pixels.time.start for part in ranges.parts] == [0, 601]


def test_bands_of_a_small_frame_are_cut_between_latents_too():
    model = model_of((16, 16, 24))
    division = divide(model, wanted(model), [PLENTY] * 5)
    assert division.unevenness <= 0.02
    assert any(part.pixels.width.start % 32 or part.pixels.height.start % 32 for part in division.parts)


def test_no_other_cut_is_a_tenth_better():
    """A search through all pairs of bands and of ranges finds little better ones."""
    for size in (FULL_HD, LONG):
        model, most = model_of(size), []
        region = wanted(model)
        for axis in range(3):
            name = ("time", "height", "width")[axis]
            for cut in range(32, region[axis].size, 32):
                two = [region[axis]._replace(stop=cut), region[axis]._replace(start=cut)]
                parts = [part_around(model, region._replace(**{name: span}), None) for span in two]
                most.append(max(model.operations(part) for part in parts))
        assert divide(model, region, [PLENTY] * 2).most <= 1.1 * min(most)


def test_each_within_its_memory():
    model = model_of(FULL_HD)
    budgets = [8 * 10**9, int(1.5e9), 5 * 10**8, int(1.7e9)]
    division = divide(model, wanted(model), budgets)
    assert_covers_once(division, wanted(model))
    for part, owner in zip(division.parts, division.owners, strict=True):
        assert model.weight_bytes + model.cost(part, 1, 1).total <= budgets[owner]
    assert division.of(2) == [] and division.operations[2] == 0
    assert len(division.of(0)) == 1 and len(division.of(1)) > 1
    assert division.unevenness <= 0.1


def test_a_rank_with_memory_for_a_window_and_none_for_a_share():
    """One latent's window fits, and of so small ones there would have to be too many."""
    model = model_of(FULL_HD)
    latent = wanted(model, Window(height=slice(544, 576), width=slice(960, 992)))
    needed = model.weight_bytes + model.cost(part_around(model, latent, None), 1, 1).total
    division = divide(model, wanted(model), [needed, PLENTY])
    assert_covers_once(division, wanted(model))
    assert set(division.owners) == {1}


def test_nothing_fits():
    model = model_of(FULL_HD)
    with pytest.raises(ValueError, match="no window fits in the memory of any rank, of which the largest"):
        divide(model, wanted(model), [10**6, 10**7])


def test_windows_that_see_few_latents():
    model = model_of(FULL_HD)
    division = divide(model, wanted(model), [PLENTY] * 2, halo=2)
    assert [part.latents.width.slice for part in division.parts] == [slice(0, 32), slice(28, 60)]
    exact = divide(model, wanted(model), [PLENTY] * 2)
    assert sum(division.operations) < sum(exact.operations)
    # Between others a band repeats more than at the edge, but less than one that sees all.
    assert divide(model, wanted(model), [PLENTY] * 4, halo=2).unevenness <= 0.05


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_that_were_begun_go_to_whoever_is_there(ranks):
    model = model_of(FULL_HD)
    parts = divide(model, wanted(model), [PLENTY] * 4).parts
    owners = assign(model, parts, [0, 121, 60, 60], [PLENTY] * ranks)
    assert len(owners) == 4 and set(owners) <= set(range(ranks))
    if ranks == 2:
        # The one that nothing was done of takes as long as the two halves.
        assert owners[0] != owners[2] == owners[3]
    needed = model.weight_bytes + model.cost(parts[0], 1, 1).total
    assert set(assign(model, parts, [0] * 4, [needed // 2, PLENTY])) == {1}
    with pytest.raises(ValueError, match="fits in the memory of no rank"):
        assign(model, parts, [0] * 4, [needed // 2])
