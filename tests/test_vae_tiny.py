"""The tiny decoders equal the reference implementation's frozen outputs, whole, streamed and by window."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_cases import NAMES, reference_cases, reference_decoder, reference_file
from vae_cases import joined

from mlx_vae_tiling.vae.backends import CPU, CUDA, METAL
from mlx_vae_tiling.vae.regions import Window
from mlx_vae_tiling.vae.tiny import TinyDecoder
from mlx_vae_tiling.vae.tiny_config import TinyDecoderConfig

CASES = [(name, index) for name in NAMES for index in range(len(reference_cases(name)))]


@pytest.mark.parametrize("step", [1, 2, 8])
@pytest.mark.parametrize(("name", "index"), CASES)
def test_float32_equals_the_reference(name, index, step):
    """In float32 1e-4 of the greatest value is asked for; measured are 1.1e-6."""
    tensors, stride = reference_file(name)[0], reference_cases(name)[index]["stride"]
    latents, expected = (tensors[f"case.{index}.{part}"] for part in ("latents", "output"))
    video = joined(reference_decoder(name).stream(latents, latent_frames_per_step=step))
    video = video[..., ::stride, ::stride]
    assert video.shape == expected.shape
    assert (mx.abs((video + 1) / 2 - expected).max() / expected.max()).item() <= 5e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "window",
    [Window(slice(5, 20), slice(40, 100), slice(3, 90)), Window(None, slice(150, 160)), Window(slice(0, 1))],
)
def test_a_window_is_that_part_of_the_whole(name, window):
    decoder, latents = reference_decoder(name), mx.random.normal((1, 8, 4, 5, 4), key=mx.random.key(1))
    region = window.region(25, 160, 128)
    whole = decoder(latents)[:, :, region.time.slice, region.height.slice, region.width.slice]
    got = joined(decoder.stream(latents, window=window, max_chunk_frames=3))
    assert got.shape == whole.shape and mx.abs(got - whole).max().item() <= 1e-5


def test_frames_stay_within_their_range_and_half_precision_is_near():
    for name in NAMES:
        latents = 3 * mx.random.normal((1, 8, 2, 3, 3), key=mx.random.key(2))
        whole = reference_decoder(name)(latents)
        assert whole.min().item() >= -1 and whole.max().item() <= 1
        half = reference_decoder(name, mx.bfloat16)(latents)
        assert mx.abs(whole - half).max().item() <= 0.1


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # Both halves of the published files, in half precision, are 23.5 MB: 1.565 M parameters encode.
        (TinyDecoderConfig(), 10_194_160),
        (TinyDecoderConfig((1024, 512, 256, 64), wide=True), 28_607_536),
    ],
)
def test_parameters(config, published):
    assert config.parameters == published
    assert config.spatial_scale == 32 and config.temporal_scale == 8


def test_denormalised_latents_are_refused():
    decoder = TinyDecoder(TinyDecoderConfig((8, 8, 8, 8), 1, latent_channels=4)).init_random()
    with pytest.raises(ValueError, match="takes normalised latents, and its file has no statistics"):
        decoder.stream(mx.zeros((1, 4, 1, 1, 1)), normalized=False)
    with pytest.raises(ValueError, match="widths must be 4 positive integers"):
        TinyDecoderConfig((8, 8, 8))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_convolutions_of_frames_are_the_same_on_every_backend(frames, groups):
    keys = mx.random.split(mx.random.key(0))
    x = mx.random.normal((2, frames, 5, 7, 8), key=keys[0])
    weight = mx.random.normal((6, 3, 3, 8 // groups), key=keys[1])
    shifted = np.lib.stride_tricks.sliding_window_view(np.array(x, np.float64), (3, 3), axis=(2, 3))
    parts = [
        np.einsum("nthwcij,oijc->nthwo", values, kernel)
        for values, kernel in zip(
            np.split(shifted, groups, axis=4), np.split(np.array(weight, np.float64), groups), strict=True
        )
    ]
    for backend in (CPU, METAL, CUDA):
        got = np.array(backend.convolve_frames(x, weight, groups))
        np.testing.assert_allclose(got, np.concatenate(parts, axis=-1), rtol=0, atol=1e-4)
