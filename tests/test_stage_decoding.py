"""The decoding stage: the decoder's own frames, FastVideo's shapes, loading and freeing, trajectories."""

import gc
import shutil
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from common import measure
from mlx.utils import tree_flatten
from vae_cases import random_latents, small_decoder

from mlx_vae_tiling.checkpoints.load import load_decoder
from mlx_vae_tiling.checkpoints.locate import DEMO
from mlx_vae_tiling.runtime.planning.planner import plan_decode
from mlx_vae_tiling.stage import decoding as stage_module
from mlx_vae_tiling.stage.arguments import DecodeBatch, DecodingArgs, PipelineConfig
from mlx_vae_tiling.stage.decoding import DecodingStage
from mlx_vae_tiling.stage.verification import VerificationResult, array_of_rank, without_nan
from mlx_vae_tiling.vae.decoder import VideoDecoder

# Of frames in [0, 1], in float32. Measured: 1e-6, where streams and windows sum in another order.
TOLERANCE = 5e-6
PRECISIONS = {"fp32": mx.float32, "fp16": mx.float16, "bf16": mx.bfloat16, None: None}


class Pipeline:
    """Holds modules as FastVideo's pipelines do."""

    def __init__(self):
        self.modules = {}

    def add_module(self, name, module):
        self.modules[name] = module


class Enlarging:
    """A VAE that shows the first three channels, four times as large."""

    def decode(self, latents):
        self.seen = latents
        return mx.repeat(mx.repeat(latents[:, :3], 4, axis=3), 4, axis=4)


def tiny_decoder(version="ltx-2.3"):
    """The same one each time; not to be changed."""
    decoder = small_decoder(version, base_channels=4)
    mx.eval(decoder.parameters())
    return decoder


def fresh_decoder(version="ltx-2.3", dtype=mx.float32):
    decoder = VideoDecoder(tiny_decoder(version).config).init_random(seed=1)
    decoder.set_dtype(dtype)
    mx.eval(decoder.parameters())
    return decoder


def arguments(vae_precision=None, vae_tiling=True, **others):
    return DecodingArgs(pipeline_config=PipelineConfig(vae_precision, vae_tiling), **others)


def fastvideo_arguments(**others):
    defaults = {
        "disable_autocast": False,
        "pipeline_config": SimpleNamespace(vae_precision="fp32", vae_tiling=True, dit_precision="bf16"),
        "output_type": "pil",
        "vae_cpu_offload": False,
        "model_loaded": {"transformer": True, "vae": False},
        "model_paths": {"transformer": "nowhere", "vae": "demo"},
    }
    return SimpleNamespace(**{**defaults, **others})


def trajectory_batch(steps, shape=(1, 8, 2, 2, 2), **others):
    trajectory = mx.random.normal((shape[0], steps, *shape[1:]))
    return DecodeBatch(
        latents=trajectory[:, -1], return_trajectory_decoded=True, trajectory_latents=trajectory, **others
    )


def unit_range(frames):
    return np.clip(np.array(frames.astype(mx.float32), np.float64) / 2 + 0.5, 0, 1)


def assert_video(video, expected, tolerance=TOLERANCE):
    assert isinstance(video, mx.array) and video.dtype == mx.float32
    assert video.shape == expected.shape
    np.testing.assert_allclose(np.array(video), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tiling", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 3, 3, 2)])
@pytest.mark.parametrize("version", ["0.9.1", "ltx-2.3"])
def test_decode_gives_the_decoders_frames_in_the_unit_range(version, shape, tiling):
    decoder = tiny_decoder(version)
    latents = random_latents(decoder, *shape)
    expected = unit_range(decoder(latents))
    assert expected.min() == 0 and expected.max() == 1
    assert_video(DecodingStage(decoder).decode(latents, arguments(vae_tiling=tiling)), expected)


@pytest.mark.parametrize("args", [DecodingArgs(), SimpleNamespace()], ids=["defaults", "no attributes"])
@pytest.mark.parametrize("convert", [lambda z: z, lambda z: np.array(z, np.float64)], ids=["mlx", "numpy"])
def test_decode_needs_nothing_but_latents(args, convert):
    decoder = tiny_decoder()
    latents = random_latents(decoder, 1, 2, 2, 2)
    assert_video(DecodingStage(decoder).decode(convert(latents), args), unit_range(decoder(latents)))


@pytest.mark.cpu
@pytest.mark.parametrize("count", [1, 4])
def test_a_limit_is_kept_by_windows_and_includes_the_frames(count):
    decoder = small_decoder("ltx-2.3")
    latents = random_latents(decoder, 1, 3, 4, 4)
    frame_bytes = 4 * int(np.prod(decoder.output_shape(latents.shape)))
    limit = 64_000_000
    while len(plan_decode(decoder, latents.shape, memory_limit=limit).windows) < count:
        limit = int(0.9 * limit)
    mx.eval(latents)
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory() - decoder.config.parameters * 4
    args = arguments(memory_limit=limit + frame_bytes)
    video = DecodingStage(decoder).decode(latents, args)
    assert mx.get_peak_memory() - before <= 1.05 * (limit + frame_bytes)
    assert_video(video, unit_range(decoder(latents)))


@pytest.mark.parametrize("tiling", [True, False])
@pytest.mark.parametrize(
    ("scaling", "shift"),
    [
        (0.5, None),
        (None, 0.25),
        (2.0, -1.0),
        (np.linspace(1, 2, 8), mx.linspace(-1, 1, 8)),
        (mx.arange(1, 9), [0.5] * 8),
        (np.full((1, 8, 1, 1, 1), 3.0), mx.array(0.5)),
    ],
    ids=["scale", "shift", "both", "per channel", "array and list", "broadcast"],
)
def test_latents_are_divided_by_the_scaling_factor_then_shifted(scaling, shift, tiling):
    vae = Enlarging()
    vae.scaling_factor, vae.shift_factor = scaling, shift
    latents = mx.random.normal((2, 8, 2, 3, 4))
    DecodingStage(vae).decode(latents, arguments(vae_tiling=tiling))
    factor, offset = (
        np.array(default if given is None else given, np.float64).reshape(1, -1, 1, 1, 1)
        for given, default in ((scaling, 1), (shift, 0))
    )
    expected = np.array(latents, np.float64) / factor + offset
    np.testing.assert_allclose(np.array(vae.seen), expected, rtol=1e-6, atol=1e-6)


def test_factors_set_on_a_decoder_count():
    decoder = fresh_decoder()
    latents = random_latents(decoder, 1, 2, 2, 2)
    expected = unit_range(decoder(latents / 2 + 1))
    decoder.scaling_factor, decoder.shift_factor = 2.0, 1.0
    assert_video(DecodingStage(decoder).decode(latents, arguments()), expected)


@pytest.mark.parametrize("stored", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("disable_autocast", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_cast_unless_autocast_is_disabled(precision, disable_autocast, stored):
    decoder, expected = fresh_decoder(dtype=stored), fresh_decoder(dtype=stored)
    wanted = PRECISIONS[precision]
    if wanted is not None and not disable_autocast:
        expected.set_dtype(wanted)
    latents = random_latents(decoder, 1, 2, 2, 2)
    args = arguments(precision, disable_autocast=disable_autocast)
    video = DecodingStage(decoder).decode(latents, args)
    assert decoder.dtype == expected.dtype
    assert {value.dtype for _, value in tree_flatten(decoder.per_channel_statistics)} == {stored}
    expected.per_channel_statistics.set_dtype(stored)
    # In half precision, sums in another order may differ by the last of its bits.
    tolerance = TOLERANCE if decoder.dtype == mx.float32 else 0.05
    assert_video(video, unit_range(expected(latents.astype(wanted or mx.float32))), tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_latents_are_cast_for_other_vaes(precision):
    vae = Enlarging()
    vae.scaling_factor = np.float64(2)
    latents = mx.ones((1, 3, 1, 2, 2), mx.float16)
    DecodingStage(vae).decode(latents, arguments(precision))
    assert vae.seen.dtype == (PRECISIONS[precision] or mx.float16)


@pytest.mark.cpu
def test_cast_weights_are_held_once():
    decoder = fresh_decoder()
    before, latents = mx.get_active_memory(), random_latents(decoder, 1, 1, 1, 1)
    DecodingStage(decoder).decode(latents, arguments("bf16"))
    gc.collect()
    freed = 2 * decoder.config.parameters - 4 * latents.size
    assert before - mx.get_active_memory() == pytest.approx(freed, rel=0.1)


VAES = {
    "method": lambda: Enlarging(),
    "function": lambda: Enlarging().decode,
    "sample": lambda: SimpleNamespace(decode=lambda z: SimpleNamespace(sample=Enlarging().decode(z))),
    "numpy": lambda: lambda z: np.array(Enlarging().decode(z)),
    "float16": lambda: lambda z: Enlarging().decode(z).astype(mx.float16),
}


@pytest.mark.parametrize("name", VAES)
def test_anything_that_decodes_is_a_vae(name):
    latents = mx.random.normal((1, 4, 2, 3, 2)).astype(mx.float16).astype(mx.float32)
    video = DecodingStage(VAES[name]()).decode(latents, DecodingArgs())
    assert_video(video, unit_range(Enlarging().decode(latents)), 1e-6)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (arguments(vae_tiling=True), [True]),
        (arguments(vae_tiling=False), []),
        (SimpleNamespace(pipeline_config=SimpleNamespace()), [True]),
    ],
    ids=["tiling", "whole", "default"],
)
def test_other_vaes_are_told_to_tile(args, told):
    vae, calls = Enlarging(), []
    vae.enable_tiling = lambda: calls.append(True)
    DecodingStage(vae).decode(mx.zeros((1, 3, 1, 2, 2)), args)
    assert calls == told


@pytest.mark.cpu
def test_a_whole_decode_is_in_memory_twice_at_most():
    latents = mx.zeros((1, 3, 16, 32, 32))
    mx.eval(latents)
    stage = DecodingStage(lambda z: mx.concatenate([z + i for i in range(8)], axis=2))
    peak = measure(lambda: stage.decode(latents, arguments())).peak_bytes
    assert peak <= 2.2 * 8 * latents.nbytes


def test_fastvideos_batches_and_arguments_fit():
    pipeline, args = Pipeline(), fastvideo_arguments()
    stage = DecodingStage(None, pipeline)
    batch = SimpleNamespace(latents=mx.random.normal((1, 128, 2, 2, 2)), prompt="a cat", logging_info=None)
    assert stage(batch, args) is batch
    assert_video(batch.output, unit_range(load_decoder("demo", dtype="fp32")(batch.latents)))
    assert args.model_loaded == {"transformer": True, "vae": True}
    assert pipeline.modules == {"vae": stage.vae}
    loaded = stage.vae
    assert stage(batch, args).output is not None and stage.vae is loaded


@pytest.mark.cpu
@pytest.mark.parametrize("source", ["demo", "file"])
def test_offloading_frees_the_vae_and_the_next_call_loads_it_again(source, tmp_path):
    path = "demo" if source == "demo" else shutil.copy(DEMO, tmp_path / "vae.safetensors")
    pipeline, outputs = Pipeline(), []
    stage = DecodingStage(None, pipeline)
    args = fastvideo_arguments(vae_cpu_offload=True, model_paths={"vae": path})
    batch = DecodeBatch(latents=mx.random.normal((1, 128, 2, 2, 2)))
    mx.eval(batch.latents)
    for _ in range(2):
        before = mx.get_active_memory()
        outputs.append(stage(batch, args).output)
        assert stage.vae is None and pipeline.modules == {} and args.model_loaded["vae"] is False
        gc.collect()
        assert mx.get_active_memory() - before <= outputs[-1].nbytes + 2**12
        assert mx.get_cache_memory() < 2**16
    assert mx.array_equal(*outputs)


@pytest.mark.parametrize(
    ("autocast", "precision", "dtype"),
    [(True, "bf16", mx.bfloat16), (True, None, None), (False, "bf16", None)],
)
def test_a_lazy_vae_is_loaded_in_its_precision(monkeypatch, autocast, precision, dtype):
    calls, decoder = [], tiny_decoder()
    monkeypatch.setattr(stage_module, "load_decoder", lambda *a, **k: calls.append((a, k)) or decoder)
    stage = DecodingStage(Enlarging())
    args = arguments(
        precision, disable_autocast=not autocast, model_loaded={"vae": False}, model_paths={"vae": "x"}
    )
    stage._load(args)
    assert calls == [(("x",), {"dtype": dtype})] and stage.vae is decoder


def test_latents_pass_through_without_a_vae():
    batch = DecodeBatch(latents=mx.zeros((1, 4, 1, 2, 2)))
    stage = DecodingStage(None)
    assert stage(batch, fastvideo_arguments(output_type="latent", model_paths={})).output is batch.latents
    assert stage.vae is None


def test_the_pipeline_is_not_kept_alive():
    pipeline = Pipeline()
    stage = DecodingStage(None, pipeline)
    assert stage.pipeline() is pipeline
    del pipeline
    gc.collect()
    assert stage.pipeline() is None
    args = fastvideo_arguments(vae_cpu_offload=True)
    assert stage(DecodeBatch(latents=mx.zeros((1, 128, 1, 1, 1))), args).output.shape == (1, 3, 1, 32, 32)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_a_trajectory_is_decoded_step_by_step_with_one_load(output_type, monkeypatch):
    loads, decoder = [], tiny_decoder()
    monkeypatch.setattr(stage_module, "load_decoder", lambda *a, **k: loads.append(a) or decoder)
    batch = trajectory_batch(3, (2, 8, 2, 2, 2), trajectory_timesteps=[900, 500, 100])
    args = arguments(
        output_type=output_type, vae_cpu_offload=True, model_loaded={"vae": False}, model_paths={"vae": "x"}
    )
    stage = DecodingStage(None)
    stage(batch, args)
    assert len(loads) == 1 and stage.vae is None and len(batch.trajectory_decoded) == 3
    for step, frames in enumerate(batch.trajectory_decoded):
        assert isinstance(frames, np.ndarray) and frames.dtype == np.float32
        assert_video(mx.array(frames), unit_range(decoder(batch.trajectory_latents[:, step])))
    if output_type == "pil":
        assert np.array_equal(np.array(batch.output), batch.trajectory_decoded[-1])


@pytest.mark.cpu
@pytest.mark.parametrize("tiling", [True, False])
def test_eight_steps_have_the_peak_of_one(tiling):
    decoder = tiny_decoder()
    peaks = []
    for steps in (1, 8):
        batch = trajectory_batch(steps, (1, 8, 3, 3, 3))
        mx.eval(batch.latents, batch.trajectory_latents)
        gc.collect()
        peaks.append(
            measure(lambda b=batch: DecodingStage(decoder)(b, arguments(vae_tiling=tiling))).peak_bytes
        )
    assert peaks[1] == pytest.approx(peaks[0], rel=0.03)


@pytest.mark.parametrize(("error", "expected"), [(MemoryError, RuntimeError), (ValueError, ValueError)])
def test_a_failing_step_is_named_and_those_before_it_are_kept(error, expected):
    def failing(latents):
        if latents.max().item() > 10:
            raise error("too large")
        return latents

    batch = trajectory_batch(4, (1, 3, 1, 2, 2), trajectory_timesteps=mx.array([0.9, 0.7, 0.5, 0.3]))
    batch.trajectory_latents[:, 2] = 11
    with pytest.raises(expected, match=r"step 2 \(timestep .*0\.5.*too large; the 2 steps before"):
        DecodingStage(failing)(batch, DecodingArgs())
    assert batch.output is not None and len(batch.trajectory_decoded) == 2


def test_verification_names_the_step():
    batch = trajectory_batch(4)
    batch.trajectory_latents[:, 2, 5, 1, 0, 0] = float("nan")
    stage = DecodingStage(tiny_decoder())
    with pytest.raises(ValueError, match=r"input .*trajectory_latents\[:, 2\] must be without nan"):
        stage(batch, DecodingArgs())
    assert stage(batch, DecodingArgs(enable_stage_verification=False)).trajectory_decoded is not None
    assert stage.verify_output(batch, DecodingArgs()).get_failed_fields() == ["trajectory_decoded[2]"]


GOOD = np.zeros((1, 3, 2, 2, 2))
BAD = {
    "None": None,
    "a list": [1.0],
    "rank 4": GOOD[0],
    "NaN": np.where(np.arange(16).reshape(1, 1, 4, 2, 2) == 13, np.nan, 0),
    "NaN in MLX": mx.array(np.where(np.arange(16).reshape(1, 1, 4, 2, 2) == 2, np.nan, 0)).astype(
        mx.bfloat16
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_verification_fails(name):
    stage, args = DecodingStage(lambda z: z), DecodingArgs()
    assert stage.verify_input(DecodeBatch(latents=BAD[name]), args).get_failed_fields() == ["latents"]
    assert stage.verify_output(DecodeBatch(output=BAD[name]), args).get_failed_fields() == ["output"]
    with pytest.raises(ValueError, match="input of DecodingStage fails in latents: latents must be"):
        stage(DecodeBatch(latents=BAD[name]), args)


@pytest.mark.parametrize(
    "good", [GOOD, mx.array(GOOD), mx.array(GOOD, mx.bfloat16)], ids=["numpy", "mlx", "bf16"]
)
def test_verification_passes(good):
    result = DecodingStage(None).verify_input(DecodeBatch(latents=good), DecodingArgs())
    assert result.is_valid() and result.get_failed_fields() == [] and result.get_failure_summary() == ""


def test_output_is_verified_unless_told_otherwise():
    stage = DecodingStage(lambda z: z * float("nan"))
    with pytest.raises(ValueError, match=r"output of DecodingStage fails in output: .* \(1, 3, 2, 2, 2\)"):
        stage(DecodeBatch(latents=GOOD), SimpleNamespace())
    assert stage(DecodeBatch(latents=GOOD), SimpleNamespace(enable_stage_verification=False))


def test_results_collect_checks_and_stop_at_the_first_failure_of_a_field():
    def positive_int(value):
        return isinstance(value, int) and value > 0

    def above_zero(value):
        return value > 0

    result = VerificationResult().add_check("steps", 3, positive_int).add_check("fps", 0, [positive_int])
    result.add_check("seed", None, above_zero).add_check("latents", None, [array_of_rank(5), without_nan])
    assert not result.is_valid()
    assert result.get_failed_fields() == ["fps", "seed", "latents"]
    fps, seed, latents = result.get_failure_summary().split("; ")
    assert fps == "fps must be positive int, got a int" and latents.endswith("array of rank 5, got None")
    assert "TypeError" in seed


ERRORS = [
    ("no VAE", None, {}, {}, "decode needs a VAE, got None"),
    ("no function", 3, {}, {}, "must be a function or have one as decode, got a int"),
    ("no array", lambda z: None, {}, {}, "must return an array .*, got None"),
    ("rank 4", lambda z: z[0], {}, {}, r"must return an array .* \(3, 2, 2, 2\)"),
    ("scaling", Enlarging(), {"scaling_factor": [1.0, 2.0]}, {}, r"one per channel \(3\), got 2"),
    ("text", Enlarging(), {"scaling_factor": "x"}, {}, r"vae.scaling_factor must be one .*, got 'x'"),
    ("precision", Enlarging(), {}, {"vae_precision": "int8"}, "fp32, fp16, bf16 or None, got 'int8'"),
]


@pytest.mark.parametrize(
    ("vae", "factors", "config", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_errors_of_decode(vae, factors, config, message):
    for name, value in factors.items():
        setattr(vae, name, value)
    with pytest.raises(ValueError, match=message):
        DecodingStage(vae).decode(mx.zeros((1, 3, 2, 2, 2)), arguments(**config))


@pytest.mark.parametrize(
    ("latents", "args", "message"),
    [
        (mx.zeros((1, 8, 2, 2)), {}, r"array \(B, C, F, H, W\), got an array of shape \(1, 8, 2, 2\)"),
        ("latents", {}, "got a str"),
        (mx.zeros((1, 7, 2, 2, 2)), {}, r"\(B, 8, F, H, W\).*7"),
        (mx.zeros((1, 7, 2, 2, 2)), {"vae_tiling": False}, r"\(B, 8, F, H, W\).*7"),
        (mx.zeros((1, 8, 2, 2, 2), mx.int32), {}, "float32, float16 or bfloat16"),
        (mx.zeros((1, 8, 2, 2, 2)), {"memory_limit": "1MB"}, "no plan fits in 1.00 MB.*decode_to_file"),
        (mx.zeros((1, 8, 2, 2, 2)), {"memory_limit": "much"}, "'8GB'"),
    ],
)
def test_errors_of_decode_with_a_decoder(latents, args, message):
    with pytest.raises(ValueError, match=message):
        DecodingStage(tiny_decoder()).decode(latents, arguments(**args))


@pytest.mark.parametrize(
    ("vae", "batch", "args", "message"),
    [
        (None, {}, {}, r"model_paths must have 'vae' .*got \[\]"),
        (Enlarging(), {}, {"model_loaded": {"vae": False}}, "or pass a VAE to DecodingStage"),
        (Enlarging(), {"return_trajectory_decoded": True}, {}, "trajectory_latents must be .*got None"),
        (
            Enlarging(),
            {
                "return_trajectory_decoded": True,
                "trajectory_latents": GOOD[None],
                "trajectory_timesteps": [1, 2, 3],
            },
            {},
            "one entry for each of 1 steps, got 3",
        ),
        (
            Enlarging(),
            {
                "return_trajectory_decoded": True,
                "trajectory_latents": GOOD[None],
                "trajectory_timesteps": 5,
            },
            {},
            "trajectory_timesteps must be a sequence or None, got 5",
        ),
    ],
)
def test_errors_of_forward(vae, batch, args, message):
    with pytest.raises(ValueError, match=message):
        DecodingStage(vae).forward(DecodeBatch(latents=GOOD, **batch), DecodingArgs(**args))


@pytest.mark.parametrize("name", vars(DecodingArgs()))
def test_none_is_the_default(name):
    batch, args = DecodeBatch(latents=GOOD), SimpleNamespace(**{name: None})
    expected = DecodingStage(Enlarging())(DecodeBatch(latents=GOOD), DecodingArgs()).output
    assert mx.array_equal(DecodingStage(Enlarging())(batch, args).output, expected)
    if name in ("model_paths", "model_loaded"):
        with pytest.raises(ValueError, match="model_paths must have 'vae'"):
            DecodingStage(None)(DecodeBatch(latents=GOOD), args)


def test_defaults_are_not_shared():
    stage = DecodingStage(None)
    with pytest.raises(ValueError, match="model_paths"):
        stage.forward(DecodeBatch(latents=GOOD), SimpleNamespace())
    args = SimpleNamespace(model_paths={"vae": "demo"}, vae_cpu_offload=True)
    for _ in range(2):
        stage.forward(DecodeBatch(latents=mx.zeros((1, 128, 1, 1, 1))), args)
    assert DecodingArgs().model_loaded == {} and stage.vae is None


class Config(SimpleNamespace):
    """The config of FastVideo's VAEs, with statistics or None in their place."""


def statistics(channels=4):
    return {
        "latents_mean": np.linspace(-1, 1, channels).tolist(),
        "latents_std": np.linspace(0.5, 2, channels).tolist(),
    }


def denormalized_by_hand(latents, latents_mean, latents_std):
    shape = (1, -1, 1, 1, 1)
    return np.array(latents, np.float64) * np.reshape(latents_std, shape) + np.reshape(latents_mean, shape)


@pytest.mark.parametrize("tiling", [True, False])
def test_statistics_of_the_config_come_before_factors(tiling):
    vae = Enlarging()
    vae.config, vae.scaling_factor, vae.shift_factor = Config(**statistics()), 7.0, 3.0
    latents = mx.random.normal((2, 4, 2, 3, 4))
    DecodingStage(vae).decode(latents, arguments(vae_tiling=tiling))
    expected = denormalized_by_hand(latents, **statistics())
    np.testing.assert_allclose(np.array(vae.seen), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("missing", ["latents_mean", "latents_std"])
def test_half_of_the_statistics_are_none(missing):
    vae = Enlarging()
    vae.config, vae.scaling_factor = Config(**{**statistics(), missing: None}), 2.0
    latents = mx.random.normal((1, 4, 1, 2, 2))
    DecodingStage(vae).decode(latents, DecodingArgs())
    np.testing.assert_allclose(np.array(vae.seen), np.array(latents, np.float64) / 2, rtol=1e-6)


def test_a_vae_that_denormalizes_gets_the_latents_as_they_are():
    vae = Enlarging()
    vae.config, vae.scaling_factor, vae.shift_factor = Config(**statistics()), 7.0, 3.0
    vae.handles_latent_denorm = True
    latents = mx.random.normal((1, 4, 1, 2, 2))
    DecodingStage(vae).decode(latents, DecodingArgs())
    assert mx.array_equal(vae.seen, latents)


def test_statistics_of_another_number_of_channels_are_refused():
    vae = Enlarging()
    vae.config = Config(**statistics(3))
    with pytest.raises(ValueError, match=r"vae.config.latents_std .*one per channel \(4\), got 3"):
        DecodingStage(vae).decode(mx.zeros((1, 4, 1, 2, 2)), DecodingArgs())


@pytest.mark.parametrize(
    ("decode_precision", "precision", "expected"),
    [("bf16", "fp32", mx.bfloat16), (None, "fp16", mx.float16), ("fp32", None, mx.float32)],
)
def test_the_precision_of_decoding_overrides_the_other(decode_precision, precision, expected):
    vae, config = Enlarging(), SimpleNamespace(vae_precision=precision, vae_decode_precision=decode_precision)
    for given in (config, PipelineConfig(precision, vae_decode_precision=decode_precision)):
        DecodingStage(vae).decode(mx.zeros((1, 3, 1, 2, 2), mx.float16), DecodingArgs(pipeline_config=given))
        assert vae.seen.dtype == expected


def test_a_wrong_precision_of_decoding_is_named():
    config = PipelineConfig("fp32", vae_decode_precision="fp8")
    with pytest.raises(ValueError, match=r"vae_decode_precision must be one of .*'fp8'"):
        DecodingStage(Enlarging()).decode(mx.zeros((1, 3, 1, 2, 2)), DecodingArgs(pipeline_config=config))


@pytest.mark.parametrize("kind", [tuple, list])
def test_the_first_of_what_a_vae_returns_is_the_frames(kind):
    latents = mx.random.normal((1, 4, 1, 2, 2))
    video = DecodingStage(lambda z: kind([Enlarging().decode(z), "more"])).decode(latents, DecodingArgs())
    assert_video(video, unit_range(Enlarging().decode(latents)), 1e-6)
    with pytest.raises(ValueError, match="must return an array"):
        DecodingStage(lambda z: kind()).decode(latents, DecodingArgs())


@pytest.mark.parametrize(
    "given", [mx.ones((1, 4, 1, 2, 2), mx.bfloat16), np.ones((1, 4, 1, 2, 2), np.float16)]
)
def test_latents_pass_through_in_float32(given):
    batch = DecodeBatch(latents=given)
    output = DecodingStage(None)(batch, DecodingArgs(output_type="latent")).output
    assert type(output) is type(given) and output.dtype in (mx.float32, np.float32)
    assert np.array_equal(np.array(output), np.ones((1, 4, 1, 2, 2)))


@pytest.mark.parametrize("paths", [{}, {"vae": "demo"}], ids=["no path", "a path"])
def test_offloading_keeps_a_vae_that_was_handed_in(paths):
    vae, pipeline = Enlarging(), Pipeline()
    pipeline.add_module("vae", vae)
    stage = DecodingStage(vae, pipeline)
    args = DecodingArgs(vae_cpu_offload=True, model_paths=paths)
    for _ in range(2):
        with pytest.warns(UserWarning, match="vae_cpu_offload keeps the VAE"):
            batch = stage(DecodeBatch(latents=mx.zeros((1, 3, 1, 2, 2))), args)
        assert batch.output.shape == (1, 3, 1, 8, 8)
        assert stage.vae is vae and pipeline.modules == {"vae": vae} and args.model_loaded.get("vae", True)


def test_offloading_keeps_a_vae_whose_path_is_gone():
    args = fastvideo_arguments(vae_cpu_offload=True)
    stage, batch = DecodingStage(None), DecodeBatch(latents=mx.zeros((1, 128, 1, 1, 1)))
    stage._load(args)
    args.model_paths = {}
    with pytest.warns(UserWarning, match="could not load it again"):
        stage(batch, args)
    assert stage.vae is not None and args.model_loaded["vae"] is True


def test_results_are_a_dictionary_too():
    result = VerificationResult().add_check("latents", None, array_of_rank(5)).add_check("fps", 3, bool)
    assert result.to_dict() == {"latents": False, "fps": True}
