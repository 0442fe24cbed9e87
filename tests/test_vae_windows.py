"""A window equals the crop of the whole decode, touches the latents it needs and works for no others."""

import math
import random
from functools import lru_cache
from itertools import product

import mlx.core as mx
import pytest
from vae_cases import (
    LTX_2_3,
    VERSIONS,
    expected_operations,
    joined,
    operations,
    random_latents,
    recording,
    relative_error,
    small_decoder,
)

from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.regions import Window

# Of the range of the whole output, in float32. Measured: 4e-7, as sums of products depend on shapes.
TOLERANCE = 1e-5
# Batch, frames, height and width of the latents: long along one axis each, so that windows have inner
# borders on both sides at every level.
SHAPES = [(2, 3, 3, 2), (1, 16, 1, 2), (1, 1, 17, 2), (1, 1, 2, 17)]


@lru_cache(maxsize=2)
def whole(version, padding, causal, shape):
    decoder = small_decoder(version, padding)
    latents = random_latents(decoder, *shape)
    return decoder, latents, joined(decoder.stream(latents, causal=causal, seed=3))


def slices(draw, size, unit):
    """A slice of an axis: all of it, a border, one position, one latent, or anything."""
    middle = draw.randrange(1, size - 1) if size > 2 else 0
    latent = draw.randrange(-(-size // unit)) * unit
    low, high = sorted(draw.sample(range(size + 1), 2))
    choices = [
        None,
        slice(0, 1),
        slice(size - 1, None),
        slice(None, min(unit, size)),
        slice(max(size - unit, 0), size),
        slice(middle, middle + 1),
        slice(latent, min(latent + unit, size)),
        slice(low, high),
        slice(middle, None),
    ]
    return draw.choice(choices)


def cases():
    draw = random.Random(1)
    for version, shape, causal in product(VERSIONS, SHAPES, (False, True)):
        padding = "zeros" if 1 in shape[2:] else draw.choice(["zeros", "reflect"])
        frames, height, width = 8 * (shape[1] - 1) + 1, 32 * shape[2], 32 * shape[3]
        for _ in range(3):
            window = Window(slices(draw, frames, 8), slices(draw, height, 32), slices(draw, width, 32))
            yield version, padding, causal, shape, window, draw.randint(1, 4)


def crop(video, window):
    return video[
        :, :, window.frames or slice(None), window.height or slice(None), window.width or slice(None)
    ]


def nan_outside(latents, box):
    """The latents with everything outside of a region poisoned."""
    poisoned = mx.full(latents.shape, float("nan"))
    where = (..., *(slice(span.start, span.stop) for span in box))
    poisoned[where] = latents[where]
    return poisoned


@pytest.mark.parametrize(("version", "padding", "causal", "shape", "window", "step"), list(cases()))
def test_window_equals_the_crop(version, padding, causal, shape, window, step):
    decoder, latents, video = whole(version, padding, causal, shape)
    expected = crop(video, window)
    box = decoder.regions(window.region(*video.shape[2:]), causal)[0]
    backend = recording(decoder)
    options = {"window": window, "latent_frames_per_step": step, "causal": causal, "seed": 3}
    pieces = joined(decoder.stream(nan_outside(latents, box), backend=backend, **options))
    scale = (video.max() - video.min()).item()
    assert pieces.shape == expected.shape
    assert mx.abs(pieces - expected).max().item() <= TOLERANCE * scale
    assert operations(backend.calls) == expected_operations(decoder.config, latents.shape, window, causal)


@pytest.mark.parametrize("version", VERSIONS)
def test_corners(version):
    shape = (1, 3, 3, 2)
    decoder, latents, video = whole(version, None, False, shape)
    sides = [
        (slice(0, n), slice(size - n, size)) for n, size in zip((3, 10, 5), video.shape[2:], strict=True)
    ]
    for corner in product(*sides):
        window = Window(*corner)
        piece = joined(decoder.stream(latents, window=window, seed=3))
        assert relative_error(piece, crop(video, window)) <= TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_latent_that_is_read_matters(version, causal):
    decoder = small_decoder(version)
    latents = random_latents(decoder, 1, 3, 4, 25)
    window = Window(width=slice(400, 401), height=slice(0, 1), frames=slice(9, 10))
    box = decoder.regions(window.region(*decoder.output_shape(latents.shape)[2:]), causal)[0]
    assert box.width.length < 25
    for axis, span in enumerate(box, start=2):
        for side in (span.start, span.stop - 1):
            poisoned = mx.array(latents)
            poisoned[(slice(None),) * axis + (side,)] = float("nan")
            assert mx.isnan(joined(decoder.stream(poisoned, window=window, causal=causal))).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_one_inner_pixel_needs_the_receptive_field(version):
    """To either side as far as the property says, give or take the position inside a latent."""
    config = small_decoder(version).config
    pixel = Window(slice(400, 401), slice(1610, 1611), slice(1630, 1631)).region(801, 3200, 3200)
    box = VideoDecoder(config).regions(pixel)[0]
    for span, reach in zip(box, config.receptive_field, strict=True):
        assert 2 * reach <= span.length <= 2 * reach + 2


def test_two_bands_cost_a_fifth_more():
    """LTX-2.3 in two bands of 20 of 40 latent rows: counted on a narrow decoder, at the published width."""
    decoder, shape = small_decoder("ltx-2.3", num_layers=None, base_channels=4), (1, 128, 5, 40, 1)
    latents = random_latents(decoder, 1, *shape[2:])

    def counted(window):
        backend = recording(decoder)
        mx.eval(list(decoder.stream(latents, window=window, backend=backend)))
        published = list(LTX_2_3.layers())
        return sum(
            54 * published[c.layer].in_channels * published[c.layer].out_channels * math.prod(c.shape[:4])
            for c in backend.calls
        )

    windows = [Window(), Window(height=slice(0, 640)), Window(height=slice(640, 1280))]
    whole_decode, *bands = (counted(window) for window in windows)
    assert [whole_decode, *bands] == [expected_operations(LTX_2_3, shape, window) for window in windows]
    assert sum(bands) / whole_decode == pytest.approx(1.2, abs=0.01)


def test_closed_form_of_a_whole_decode_tends_to_the_operations_per_latent():
    shape = (1, 128, 400, 10, 10)
    assert expected_operations(LTX_2_3, shape) / (400 * 100) == pytest.approx(
        LTX_2_3.operations_per_latent, rel=5e-3
    )
