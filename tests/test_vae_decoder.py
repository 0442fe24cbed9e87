"""What `VideoDecoder` promises beside exactness: clear errors, seeds, dtypes, a decode at full width."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from vae_cases import (
    LTX_2_3,
    VERSIONS,
    joined,
    random_latents,
    reference_config,
    relative_error,
    small_decoder,
)

from mlx_vae_tiling.tiling import SpatialTilingConfig, TilingConfig
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.options import Noise
from mlx_vae_tiling.vae.regions import Window

GOOD = (1, 8, 2, 2, 3)


@pytest.mark.parametrize(
    ("version", "latents", "message"),
    [
        ("ltx-2.3", mx.zeros((8, 2, 2, 3)), r"shape \(B, 8, F, H, W\), got \(8, 2, 2, 3\)"),
        ("ltx-2.3", mx.zeros((1, 7, 2, 2, 3)), r"shape \(B, 8, F, H, W\), got \(1, 7, 2, 2, 3\)"),
        ("ltx-2.3", mx.zeros((1, 2, 2, 3, 8)), r"shape \(B, 8, F, H, W\), got \(1, 2, 2, 3, 8\)"),
        ("ltx-2.3", mx.zeros(GOOD, mx.int32), "float32, float16 or bfloat16, got mlx.core.int32"),
        ("ltx-2.3", mx.zeros((0, 8, 2, 2, 3)), r"no empty axis, got \(0, 8, 2, 2, 3\)"),
        ("ltx-2.3", mx.zeros((1, 8, 0, 2, 3)), r"no empty axis, got \(1, 8, 0, 2, 3\)"),
        ("ltx-2.3", mx.zeros((1, 8, 2, 2, 0)), r"no empty axis, got \(1, 8, 2, 2, 0\)"),
        ("ltx-2.3", np.zeros(GOOD, np.float32), r"must be an mx.array, got ndarray; mx.array\(x\) converts"),
        ("ltx-2.3", None, "must be an mx.array, got NoneType"),
        (
            "ltx-2",
            mx.zeros((1, 8, 2, 1, 3)),
            r"reflection needs latents at least 2 high and wide, got \(1, 8, 2, 1, 3\)",
        ),
        (
            "ltx-2",
            mx.zeros((1, 8, 2, 3, 1)),
            r"reflection needs latents at least 2 high and wide, got \(1, 8, 2, 3, 1\)",
        ),
    ],
)
def test_latents_that_do_not_fit(version, latents, message):
    decoder = small_decoder(version)
    for decode in (decoder, decoder.stream):
        with pytest.raises(ValueError, match=message):
            decode(latents)


@pytest.mark.parametrize(
    ("version", "options", "message"),
    [
        ("ltx-2.3", {"latent_frames_per_step": 0}, r"latent_frames\w* must be at least 1, got 0"),
        ("ltx-2.3", {"latent_frames_per_step": -1}, r"latent_frames\w* must be at least 1, got -1"),
        ("ltx-2.3", {"max_chunk_frames": 0}, "max_chunk_frames must be at least 1, got 0"),
        (
            "ltx-2.3",
            {"window": Window(frames=slice(0, 10))},
            "window frames .* inside 0:9 of step 1, got slice",
        ),
        ("ltx-2.3", {"window": Window(frames=slice(-1, 3))}, "window frames must be a non-empty slice"),
        ("ltx-2.3", {"window": Window(height=slice(5, 5))}, "window height must be a non-empty slice"),
        ("ltx-2.3", {"window": Window(height=slice(64, None))}, "window height .* inside 0:64"),
        ("ltx-2.3", {"window": Window(width=slice(90, 97))}, "window width .* inside 0:96"),
        ("ltx-2.3", {"window": Window(width=slice(0, 96, 2))}, "window width .* of step 1"),
        ("0.9.1", {"noise_scale": 1.5}, "noise_scale must lie between 0 and 1, got 1.5"),
        ("0.9.1", {"noise_scale": float("nan")}, "noise_scale must lie between 0 and 1, got nan"),
        ("0.9.1", {"seed": -1}, "seed must be an integer from 0 to .*, got -1"),
        ("0.9.1", {"seed": 1.5}, "seed must be an integer from 0 to .*, got 1.5"),
        ("0.9.1", {"backend": "tpu"}, "backend must be one of cpu, metal, cuda, got 'tpu'"),
        ("0.9.1", {"timestep": [0.1, 0.2]}, r"one per batch entry \(1\), got 2"),
        ("0.9.1", {"timestep": []}, r"timestep must be one number or one per batch entry, got \[\]"),
        ("0.9.1", {"timestep": mx.array([])}, r"timestep must be one number or one per .*, got array\(\[\]"),
        ("0.9.1", {"timestep": mx.array(float("nan"))}, r"timestep must be finite and small, got array\(nan"),
        ("ltx-2.3", {"timestep": mx.array([1e10])}, r"timestep must be finite and small, got array\(\[1e"),
    ],
)
def test_options_that_do_not_fit(version, options, message):
    """The error comes from the call, before the first piece is asked for."""
    with pytest.raises(ValueError, match=message):
        small_decoder(version).stream(mx.zeros(GOOD), **options)


def test_no_weights():
    decoder = VideoDecoder(reference_config("ltx-2.3"))
    for decode in (decoder, decoder.stream):
        with pytest.raises(ValueError, match="no weights; use load_decoder"):
            decode(mx.zeros(GOOD))


@pytest.mark.parametrize("fill", ["update", "load_weights", "init_random"])
def test_weights_are_weights_whoever_brings_them(fill):
    decoder, other = VideoDecoder(reference_config("ltx-2.3")), small_decoder("ltx-2.3", num_layers=None)
    decoder.set_dtype(mx.bfloat16)  # changes weights and brings none
    with pytest.raises(ValueError, match="no weights"):
        decoder(mx.zeros(GOOD))
    decoder = VideoDecoder(other.config)
    given = {"update": other.parameters(), "load_weights": tree_flatten(other.parameters()), "init_random": 1}
    getattr(decoder, fill)(given[fill])
    assert mx.array_equal(decoder(mx.zeros(GOOD)), other(mx.zeros(GOOD)))


def test_loading_is_strict():
    decoder = VideoDecoder(reference_config("ltx-2.3"))
    with pytest.raises(ValueError, match=r"[Mm]issing"):
        decoder.load_weights([("conv_in.conv.bias", mx.zeros(64))])
    with pytest.raises(ValueError, match="no weights"):
        decoder(mx.zeros(GOOD))


@pytest.mark.parametrize("version", VERSIONS)
def test_call_is_the_stream(version):
    decoder = small_decoder(version)
    latents = random_latents(decoder, 2, 2, 2, 3)
    video = decoder(latents)
    assert video.shape == (2, 3, 9, 64, 96) == decoder.output_shape(latents.shape)
    assert relative_error(video, joined(decoder.stream(latents))) <= 1e-5
    assert mx.array_equal(video, decoder(latents, debug=True))
    assert not mx.allclose(video, decoder(latents, causal=True), atol=1e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_output_has_the_dtype_of_the_latents(dtype):
    decoder = small_decoder("0.9.1")
    latents = random_latents(decoder, *GOOD[:1], *GOOD[2:])
    video = decoder(latents.astype(dtype))
    assert video.dtype == dtype
    # The weights stay float32, so only the ends are rounded.
    assert relative_error(video, decoder(latents.astype(dtype).astype(mx.float32))) <= mx.finfo(dtype).eps


@pytest.mark.parametrize("version", ["0.9.1", "0.9.5"])
def test_noise_follows_the_seed(version):
    decoder = small_decoder(version)
    latents = random_latents(decoder, 1, 2, 2, 2)
    first, again, other = (joined(decoder.stream(latents, seed=seed)) for seed in (7, 7, 8))
    assert mx.array_equal(first, again) and not mx.allclose(first, other, atol=1e-3)
    mx.random.seed(99)
    assert mx.array_equal(first, joined(decoder.stream(latents, seed=7)))


def test_noise_scale_mixes_before_unnormalising():
    decoder = small_decoder("0.9.5")
    latents = random_latents(decoder, 1, 2, 2, 2)
    noise = Noise(5, latents.shape[3:]).latents(Window().region(*latents.shape[2:]), *latents.shape[:2])
    assert abs(noise.mean().item()) < 0.3 and noise.std().item() == pytest.approx(1, abs=0.2)
    mixed = joined(decoder.stream(latents, noise_scale=0.25, seed=5))
    expected = joined(decoder.stream(0.75 * latents + 0.25 * noise, noise_scale=0))
    assert relative_error(mixed, expected) <= 1e-5


def test_defaults_of_timestep_and_noise_are_attributes():
    decoder = VideoDecoder(small_decoder("0.9.5").config).init_random(seed=1)
    latents = random_latents(decoder, 2, 1, 2, 2)
    explicit = joined(decoder.stream(latents, timestep=0.05, noise_scale=0.025))
    assert mx.array_equal(joined(decoder.stream(latents)), explicit)
    decoder.decode_timestep, decoder.decode_noise_scale = 0.4, 0.0
    assert mx.array_equal(decoder(latents), joined(decoder.stream(latents, timestep=0.4, noise_scale=0)))
    assert mx.array_equal(decoder(latents), joined(decoder.stream(latents, seed=1)))
    each = decoder(latents, timestep=mx.array([0.05, 0.4]))
    for index, timestep in enumerate((0.05, 0.4)):
        assert relative_error(each[index], decoder(latents, timestep=timestep)[index]) <= 1e-5
    assert not mx.allclose(each[0], decoder(latents)[0], atol=1e-3)


@pytest.mark.parametrize("kind", [np.array, np.float32, mx.array, lambda t: np.array([t]), lambda t: [t]])
def test_a_timestep_is_a_number_however_it_is_given(kind):
    decoder = small_decoder("0.9.1")
    assert decoder.options(timestep=kind(0.4)) == decoder.options(timestep=0.4)
    assert decoder.options(timestep=0.4).timestep == (np.float32(0.4),)


def test_versions_without_timestep_ignore_it():
    decoder = small_decoder("ltx-2.3")
    latents = random_latents(decoder, 1, 2, 2, 2)
    assert mx.array_equal(decoder(latents), decoder(latents, timestep=0.5))
    assert mx.array_equal(
        decoder(latents), joined(decoder.stream(latents, latent_frames_per_step=2, noise_scale=1))
    )


def test_decode_tiled_blends_tiles():
    decoder = small_decoder("ltx-2.3")
    latents = random_latents(decoder, 1, 2, 2, 4)
    video = decoder(latents)
    assert mx.array_equal(decoder.decode_tiled(latents), video)
    tiled = decoder.decode_tiled(latents, TilingConfig(SpatialTilingConfig(96, 64)))
    assert tiled.shape == video.shape
    # Tiles see less than the whole, so blending is near and not equal.
    assert 0 < relative_error(tiled, video) < 0.5


@pytest.mark.parametrize("form", ["stock", "folded", "blocked", "numpy"])
def test_convolution_form_can_be_pinned(form):
    decoder = VideoDecoder(small_decoder("ltx-2").config).init_random(seed=1)
    latents = random_latents(decoder, 1, 2, 2, 2)
    decoder.convolution_form = form
    assert relative_error(joined(decoder.stream(latents)), small_decoder("ltx-2")(latents)) <= 1e-5


@pytest.mark.slow
def test_ltx_2_3_at_full_width():
    assert LTX_2_3.parameters == 407_169_072
    decoder = VideoDecoder(LTX_2_3).init_random()
    latents = random_latents(decoder, 1, 2, 1, 1)
    video = decoder(latents)
    assert video.shape == (1, 3, 9, 32, 32) and video.dtype == mx.float32
    assert mx.isfinite(video).all() and 0.01 < video.std().item() < 10
