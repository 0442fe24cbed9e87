"""Diffusion and tiny decoders in plans, files, the stage and the command: the same runtime as any other."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import write
from diffusion_cases import SMALL, small_decoder
from planning import measured_peak
from tiny_cases import reference_decoder as tiny_decoder
from tiny_cases import stored_tensors

from mlx_vae_tiling import (
    DecodeBatch,
    DecodingArgs,
    DecodingStage,
    DiffusionDecoder,
    DiffusionDecoderConfig,
    TilingConfig,
    TinyDecoder,
    TinyDecoderConfig,
    VideoDecoder,
    Window,
    decode_frames,
    decode_to_file,
    plan_decode,
)
from mlx_vae_tiling.cli import main
from mlx_vae_tiling.media import video
from mlx_vae_tiling.vae.backends import CPU

pytestmark = pytest.mark.cpu

DIFFUSION = replace(
    SMALL,
    head_dim=16,
    stage_channels=(64, 32, 32, 32, 32),
    stage_depths=(1, 1, 1, 1, 1),
    upsamples=(((1, 2, 2), 2), ((2, 1, 1), 1), ((2, 2, 2), 1), ((2, 2, 2), 1)),
)
TINY = TinyDecoderConfig((48, 32, 24, 16), 1, latent_channels=8)
WIDE = TinyDecoderConfig((128, 64, 32, 16), 1, wide=True, latent_channels=8)

# A config, the size of its latents, a dtype and a budget: one window, several, and small chunks.
PEAKS = [
    (DIFFUSION, (6, 4, 5), mx.float32, "1GB"),
    (DIFFUSION, (5, 4, 5), mx.float32, "22MB"),
    (DIFFUSION, (5, 4, 5), mx.bfloat16, "1GB"),
    (TINY, (6, 6, 8), mx.float32, "1GB"),
    (TINY, (6, 6, 8), mx.bfloat16, "3MB"),
    (WIDE, (6, 6, 8), mx.float32, "1GB"),
    (WIDE, (6, 6, 8), mx.float32, "6MB"),
]


def new_decoder(config, dtype=mx.float32):
    kind = DiffusionDecoder if isinstance(config, DiffusionDecoderConfig) else TinyDecoder
    decoder = kind(config).init_random()
    decoder.cast(dtype)
    return decoder


@pytest.mark.parametrize(("config", "size", "dtype", "limit"), PEAKS)
def test_predicted_peak(config, size, dtype, limit):
    decoder = new_decoder(config, dtype)
    latents = mx.random.normal((1, 8, *size)).astype(dtype)
    backend = CPU.opened()
    plan = plan_decode(decoder, latents.shape, memory_limit=limit, backend=backend)
    assert plan.fits
    assert 0.9 <= measured_peak(decoder, latents, plan) / plan.peak_bytes <= 1.1
    assert backend.held_workspace_bytes == plan.workspace_bytes


@pytest.mark.parametrize("frames", [5, 9])
def test_what_is_joined_is_there_twice(frames):
    """Of a decoder that holds many frames for its last stage, that is more than any chunk takes."""
    kernels = (*DIFFUSION.stage_kernels[:4], (frames, 3, 3))
    decoder = new_decoder(replace(DIFFUSION, stage_kernels=kernels))
    latents = mx.random.normal((1, 8, 5, 4, 5))
    mx.eval(latents, decoder.parameters())
    plan = plan_decode(decoder, latents.shape, memory_limit="1GB", backend=CPU, chunk=(1, 1))
    planned = plan.peak_bytes - plan.workspace_bytes
    assert measured_peak(decoder, latents, plan) - plan.workspace_bytes == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("config", [DIFFUSION, TINY])
def test_the_peak_does_not_grow_with_the_length(config):
    plans = [
        plan_decode(config, (1, 8, frames, 4, 5), memory_limit="1GB", backend=CPU) for frames in (40, 400)
    ]
    chunks = {plan.latent_frames_per_step for plan in plans}
    fixed = [
        plan_decode(config, (1, 8, frames, 4, 5), memory_limit="1GB", backend=CPU, chunk=(1, None))
        for frames in (40, 400)
    ]
    assert len(chunks) <= 2 and fixed[0].peak_bytes == fixed[1].peak_bytes


def test_a_long_video_of_full_hd_fits_in_32_gb():
    config, shape = DiffusionDecoderConfig(), (1, 128, 16, 34, 60)
    plan = plan_decode(config, shape, memory_limit="32GB", backend="metal")
    assert plan.fits and len(plan.parts) == 1 and plan.recompute == 1
    assert plan.latents_to_first_frame == 16 and "latent frames" in str(plan)
    smaller = plan_decode(config, shape, memory_limit="8GB", backend="metal")
    assert smaller.fits and len(smaller.parts) > 1 and smaller.recompute > 1


def test_steps_are_planned():
    decoder = new_decoder(DIFFUSION)
    once, twice = (
        plan_decode(decoder, (1, 8, 5, 4, 5), memory_limit="1GB", num_inference_steps=n) for n in (1, 2)
    )
    assert twice.operations > once.operations and twice.state_bytes > once.state_bytes
    latents = mx.random.normal((1, 8, 5, 4, 5))
    with pytest.raises(ValueError, match="the plan is for 2 inference steps, got 1"):
        decode_frames(decoder, latents, plan=twice, num_inference_steps=1)


def as_frames(video):
    return np.array(mx.round(mx.clip(video[0] / 2 + 0.5, 0, 1) * 255).astype(mx.uint8).transpose(1, 2, 3, 0))


def largest_step(one, other):
    return np.abs(one.astype(int) - other.astype(int)).max()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_budget_and_a_window_change_no_frame(steps):
    decoder, latents = small_decoder(), mx.random.normal((1, 8, 3, 4, 5), key=mx.random.key(0))
    noise = mx.random.normal((1, 3, 17, 128, 160), key=mx.random.key(1))
    options = {"noise": noise, "num_inference_steps": steps}
    planning = {"num_inference_steps": steps, "backend": CPU}
    window = plan_decode(decoder, latents.shape, memory_limit="1GB", chunk=(1, 1), **planning)
    plan = plan_decode(decoder, latents.shape, memory_limit=window.peak_bytes - 1, **planning)
    expected = as_frames(mx.concatenate(list(decoder.stream(latents, **options)), axis=2))
    assert len(plan.parts) > 1
    assert (
        largest_step(np.concatenate(list(decode_frames(decoder, latents, plan=plan, **options))), expected)
        <= 1
    )
    window = Window(slice(3, 14), slice(10, 100))
    part = np.concatenate(list(decode_frames(decoder, latents, window=window, **options)))
    assert largest_step(part, expected[3:14, 10:100]) <= 1


def test_a_resumed_file_has_the_same_bytes(tmp_path):
    decoder, latents = small_decoder(), mx.random.normal((1, 8, 4, 4, 4), key=mx.random.key(0))
    decode_to_file(decoder, latents, tmp_path / "a.npy", seed=5)
    frames = decode_frames(decoder, latents, seed=5)
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.concatenate(list(frames)))
    noise = mx.random.normal((1, 3, 25, 128, 128), key=mx.random.key(1))
    decode_to_file(decoder, latents, tmp_path / "b.npy", noise=noise)
    expected = np.concatenate(list(decode_frames(decoder, latents, noise=noise)))
    assert np.array_equal(np.load(tmp_path / "b.npy"), expected)
    assert not np.array_equal(np.load(tmp_path / "a.npy"), expected)


@pytest.mark.parametrize("given", [False, True], ids=["of a seed", "as an array"])
def test_a_decode_that_was_ended_goes_on_with_its_noise(given, tmp_path, monkeypatch):
    decoder, latents = small_decoder(), mx.random.normal((1, 8, 5, 4, 4), key=mx.random.key(0))
    array = mx.random.normal((1, 3, 33, 128, 128), key=mx.random.key(1))
    options = {"noise": array} if given else {"seed": 5}
    plan = plan_decode(decoder, latents.shape, memory_limit="1GB", chunk=(1, 4))
    expected = np.concatenate(list(decode_frames(decoder, latents, plan=plan, **options)))
    path, write_frames, written = tmp_path / "frames.npy", video.VideoWriter.write, []

    def write_some(self, frames):
        write_frames(self, frames)
        written.append(len(frames))
        if sum(written) > 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(video.VideoWriter, "write", write_some)
        with pytest.raises(KeyboardInterrupt):
            decode_to_file(decoder, latents, path, plan=plan, **options)
    assert 8 < sum(written) < 33
    other = {"noise": array + 1} if given else {"seed": 6}
    with pytest.raises(ValueError, match=r"begun with, but (noise|seed) differs"):
        decode_to_file(decoder, latents, path, plan=plan, resume=True, **other)
    report = decode_to_file(decoder, latents, path, plan=plan, resume=True, **options)
    assert np.array_equal(np.load(path), expected)
    assert (report.resumed_frames, report.frames) == (sum(written), 33)


def test_blended_tiles_share_one_noise():
    decoder, latents = small_decoder(), mx.random.normal((1, 8, 3, 4, 6), key=mx.random.key(0))
    whole = mx.concatenate(list(decoder.stream(latents, seed=2)), axis=2)
    tiles = decoder.decode_tiled(latents, TilingConfig.spatial_only(128, 96), seed=2)
    assert tiles.shape == whole.shape
    middle = (tiles - whole)[..., 16:112, 40:150]
    assert mx.sqrt(mx.mean(middle**2)).item() < 0.5 * mx.sqrt(mx.mean(whole**2)).item()


@pytest.mark.parametrize("sign", [float("nan"), float("-inf")])
def test_noise_that_is_not_finite_is_named_before_anything_is_decoded(sign, monkeypatch):
    decoder = small_decoder()
    latents = mx.zeros((1, decoder.config.latent_channels, 3, 3, 3))
    noise = mx.zeros(decoder.output_shape(latents.shape))
    noise[0, 1, 5, 7, 9] = sign
    monkeypatch.setattr(type(decoder), "run", None)
    with pytest.raises(ValueError, match=r"noise must be finite, got NaN or infinity in the frames \[5\]"):
        decode_frames(decoder, latents, noise=noise, memory_limit="1GB")


@pytest.mark.parametrize("dtype", [mx.int32, mx.bool_])
def test_noise_of_integers_is_refused(dtype):
    decoder = small_decoder()
    latents = mx.zeros((1, decoder.config.latent_channels, 3, 3, 3))
    noise = mx.zeros(decoder.output_shape(latents.shape), dtype)
    for decode in (decode_frames, type(decoder).stream):
        with pytest.raises(
            ValueError, match=r"noise must be float32, float16 or bfloat16, got mlx.core.(int|b)"
        ):
            decode(decoder, latents, noise=noise)


def test_an_array_of_noise_is_for_diffusion_decoders():
    with pytest.raises(
        ValueError, match="noise as an array is for diffusion decoders; this one takes a seed"
    ):
        list(
            decode_frames(
                tiny_decoder("taeltx2_3"), mx.zeros((1, 8, 1, 1, 1)), noise=mx.zeros((1, 3, 1, 32, 32))
            )
        )


def test_trajectories_are_previewed_by_a_tiny_decoder(tmp_path):
    path = write(tmp_path / "taeltx2_3.safetensors", stored_tensors("taeltx2_3"))
    trajectory = mx.random.normal((1, 2, 8, 2, 2, 3), key=mx.random.key(0))
    batch = DecodeBatch(
        latents=trajectory[:, -1], return_trajectory_decoded=True, trajectory_latents=trajectory
    )
    stage = DecodingStage(small_decoder())
    batch = stage(batch, DecodingArgs(model_paths={"preview": path}))
    for step, frames in enumerate(batch.trajectory_decoded):
        expected = tiny_decoder("taeltx2_3")(trajectory[:, step]) / 2 + 0.5
        np.testing.assert_allclose(frames, np.array(expected), rtol=0, atol=1e-5)
    assert mx.abs(batch.output - mx.array(batch.trajectory_decoded[-1])).max().item() > 0.1
    other = write(tmp_path / "vae.safetensors", {"x": mx.zeros((1,))})
    with pytest.raises(ValueError, match="no LTX video decoder"):
        stage(batch, DecodingArgs(model_paths={"preview": other}))


def test_the_command_previews(tmp_path, capsys):
    path = write(tmp_path / "taeltx2_3.safetensors", stored_tensors("taeltx2_3"))
    np.save(tmp_path / "latents.npy", np.zeros((1, 8, 2, 2, 3), np.float32))
    output = tmp_path / "out.npy"
    arguments = ["decode", str(tmp_path / "latents.npy"), "-o", str(output), "-q"]
    assert main([*arguments, "--preview", str(path)]) == 0
    assert np.load(output).shape == (9, 64, 96, 3)
    assert main([*arguments]) != 0
    assert "needs --vae SOURCE, or --preview SOURCE" in capsys.readouterr().err
    assert main([*arguments, "--preview", "demo"]) != 0
    assert "--preview takes a tiny decoder (TAEHV), and demo is none" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ltx-2.5", "ltx-2.5-conv", "taeltx_2", "taeltx2_3_wide", "ltx-2.3-pruna"])
def test_versions_are_planned_by_name(name, capsys):
    assert main(["plan", "--shape", "4x8x12", "--vae", name, "--memory", "8GB"]) == 0
    assert "25 frames of 384x256" in capsys.readouterr().out


def test_what_is_not_decoded_is_said():
    assert isinstance(new_decoder(TINY), TinyDecoder) and not isinstance(new_decoder(TINY), VideoDecoder)
    with pytest.raises(ValueError, match=r"latents must have shape \(B, 8, F, H, W\)"):
        new_decoder(TINY)(mx.zeros((1, 4, 1, 1, 1)))


def test_noise_that_was_made_in_one_thread_is_used_in_another():
    """What was only scheduled in the first thread cannot be computed in the second."""
    decoder, latents = small_decoder(), mx.random.normal((1, 8, 2, 4, 4), key=mx.random.key(0))
    noise = mx.random.normal((1, 3, 9, 128, 128), key=mx.random.key(1))
    expected = np.concatenate(list(decode_frames(decoder, latents, noise=noise)))
    pieces = decode_frames(decoder, latents + 0, noise=noise + 0)
    streamed = decoder.stream(latents + 0, noise=noise + 0)
    with ThreadPoolExecutor(1) as pool:
        frames = np.concatenate(pool.submit(list, pieces).result())
        received = pool.submit(list, streamed).result()
    np.testing.assert_array_equal(frames, expected)
    assert largest_step(as_frames(mx.concatenate(received, axis=2)), expected) <= 1
