"""Arguments of the Python API that are nearly right: they work, or are one clear error."""

import mlx.core as mx
import numpy as np
import pytest
from vae_cases import random_latents, small_decoder

from mlx_vae_tiling import (
    DiffusionDecoder,
    TinyDecoder,
    TinyDecoderConfig,
    VideoDecoder,
    Window,
    decode_frames,
    decode_to_file,
    fetch_vae,
    plan_decode,
    verify_decode,
)
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.options import DecodeOptions
from mlx_vae_tiling.vae.published import PUBLISHED


@pytest.fixture(scope="module")
def decoder():
    return small_decoder("ltx-2.3")


@pytest.fixture(scope="module")
def latents(decoder):
    return random_latents(decoder, 1, 2, 2, 2)


def frames(decoder, latents, **options):
    return np.concatenate(list(decode_frames(decoder, latents, memory_limit="1GB", **options)))


def test_integers_of_numpy_are_integers(decoder, latents):
    three = np.int64(3)
    window = Window(slice(np.int32(0), three), slice(np.uint8(0), np.int64(40)))
    cut = frames(decoder, latents, window=window, seed=three)
    assert np.array_equal(cut, frames(decoder, latents, window=Window(slice(0, 3), slice(0, 40)), seed=3))
    halo = plan_decode(decoder, latents.shape, tiling=np.int64(2), memory_limit="1GB")
    assert halo == plan_decode(decoder, latents.shape, tiling=2, memory_limit="1GB")
    assert frames(decoder, latents, bits=np.int64(16)).dtype == np.uint16
    options = DecodeOptions(False, (), 0.0, three, True)
    assert repr(options) == repr(DecodeOptions(False, (), 0.0, 3, True))  # which a resumed decode compares


WRONG = {
    "window of a tuple": ({"window": (0, 3)}, TypeError, r"window must be a Window or None, got \(0, 3\)"),
    "float in a window": ({"window": Window(slice(0.0, 3.0))}, TypeError, "a slice of integers, got slice"),
    "window of an integer": ({"window": Window(3)}, TypeError, "frames must be a slice or None, got 3"),
    "float as halo": ({"tiling": 1.5}, ValueError, "from 0 on, got 1.5"),
    "text as halo": ({"tiling": "auto"}, ValueError, "a TilingConfig such as .* from 0 on, got 'auto'"),
    "bool as halo": ({"tiling": True}, ValueError, "from 0 on, got True"),
    "float as seed": ({"seed": 1.0}, ValueError, "seed must be an integer"),
    "bool as seed": ({"seed": True}, ValueError, "seed must be an integer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_one_clear_error(decoder, latents, name):
    options, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        frames(decoder, latents, **options)


@pytest.mark.parametrize("call", [plan_decode, decode_frames, verify_decode])
@pytest.mark.parametrize("given", ["demo", None, 3])
def test_what_is_no_decoder_is_refused(latents, call, given):
    second = latents.shape if call is plan_decode else latents
    options = {"tiling": 1} if call is verify_decode else {}
    with pytest.raises(TypeError, match=r"decoder .*got a (str|NoneType|int); load_decoder loads"):
        call(given, second, **options)


def test_a_plan_has_its_own_memory_limit_tiling_and_window(decoder, latents):
    plan = plan_decode(decoder, latents.shape, memory_limit="1GB", window=Window(slice(0, 3)))
    for name, given in {"memory_limit": "2GB", "tiling": 1, "window": Window(slice(0, 5))}.items():
        with pytest.raises(ValueError, match=f"a plan has its own {name}, got .*; pass that to plan_decode"):
            decode_frames(decoder, latents, plan=plan, **{name: given})
    assert sum(map(len, decode_frames(decoder, latents, plan=plan))) == 3


def test_a_plan_for_another_decoder_is_one_short_line(latents):
    plan = plan_decode(small_decoder("0.9.1"), latents.shape, memory_limit="1GB")
    with pytest.raises(ValueError, match=r"^the plan is for a decoder of another architecture; .{,40}$"):
        decode_frames(small_decoder("ltx-2.3"), latents, plan=plan)


@pytest.mark.parametrize("group", [3, "two"])
def test_what_is_no_group_is_refused(decoder, latents, group):
    with pytest.raises(TypeError, match=f"group must be what mx.distributed.init.. returns, .*{group}"):
        decode_frames(decoder, latents, group=group)


@pytest.mark.parametrize("kind", [VideoDecoder, DiffusionDecoder, TinyDecoder])
@pytest.mark.parametrize("given", ["demo", None, PUBLISHED["ltx-2.3"]])
def test_what_is_no_config_is_refused(kind, given):
    with pytest.raises(TypeError, match=r"config must be a \w+Config \(load_decoder takes names.*, got "):
        kind(given)


def test_a_tiny_config_of_other_types_is_refused():
    with pytest.raises(TypeError, match="widths must be 4 positive integers, got 16"):
        TinyDecoderConfig(16)
    with pytest.raises(TypeError, match="widths and blocks must be positive integers, got '8'"):
        TinyDecoderConfig((16, 16, 8, "8"))


@pytest.mark.parametrize("kind", ["ltx-2.3", "ltx-2.5", "tiny"])
def test_random_weights_take_the_seeds_that_noise_takes(kind):
    decoder = small_tiny() if kind == "tiny" else build_decoder(PUBLISHED[kind].config)
    for seed in (-1, "x", 2**64):
        with pytest.raises(ValueError, match=f"seed must be an integer from 0 to .*, got {seed!r}"):
            decoder.init_random(seed)


@pytest.mark.parametrize(
    ("chunk", "kind", "message"),
    [
        ((0, None), ValueError, "latent_frames must be at least 1, got 0"),
        ((1, 0), ValueError, "max_chunk_frames must be at least 1, got 0"),
        (("a", 2), TypeError, "latent_frames must be a whole number, got 'a'"),
    ],
)
def test_chunks_of_nothing_are_refused(decoder, latents, chunk, kind, message):
    with pytest.raises(kind, match=message):
        plan_decode(decoder, latents.shape, chunk=chunk)


WRONG_FILES = {
    "bytes": (b"out.npy", {}, r"path must be text or a path, got b'out.npy'"),
    "nothing": (None, {}, "path must be text or a path, got None"),
    "text as quality": ("out.mp4", {"quality": "best"}, "quality must be a number or None, got 'best'"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_arguments_of_a_file_are_one_clear_error(decoder, latents, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, options, message = WRONG_FILES[name]
    with pytest.raises(TypeError, match=message):
        decode_to_file(decoder, latents, path, memory_limit="1GB", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["repo_id", "filename", "revision"])
def test_what_is_fetched_is_named_by_text(name):
    with pytest.raises(TypeError, match=f"{name} must be text.*, got 3"):
        fetch_vae(**{"repo_id": "owner/name", name: 3})


def test_a_decoder_takes_what_the_tiling_of_mlx_video_passes(decoder, latents):
    whole = decoder(latents)
    assert mx.array_equal(
        decoder(latents, causal=False, timestep=None, debug=False, chunked_conv=True), whole
    )


def test_a_tiny_decoder_has_no_steps():
    tiny = small_tiny()
    with pytest.raises(ValueError, match="num_inference_steps is for diffusion decoders, got 4"):
        tiny.options(num_inference_steps=4)
    assert tiny.options(num_inference_steps=1) == tiny.options()


def small_tiny():
    return TinyDecoder(TinyDecoderConfig((16, 16, 8, 8)))
