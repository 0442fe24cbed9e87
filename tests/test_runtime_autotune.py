"""Forms are measured once, before a decode that gains by it: on the CPU, with Metal's policy."""

import io
import math
from contextlib import redirect_stderr

import mlx.core as mx
import numpy as np
import pytest
from vae_cases import random_latents, small_decoder

from mlx_vae_tiling import DecodingArgs, DecodingStage, decode_frames, decode_to_file, plan_decode
from mlx_vae_tiling.cli import main
from mlx_vae_tiling.runtime import autotune
from mlx_vae_tiling.runtime.autotune import measure_forms, part_of, plan_to_run, tune_for
from mlx_vae_tiling.runtime.tuning.choices import Level, Trial, default_path, load_tuning
from mlx_vae_tiling.runtime.tuning.measure import machine_of
from mlx_vae_tiling.vae import backends
from mlx_vae_tiling.vae.backends import METAL
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.published import PUBLISHED

LONG, SHORT = (1, 128, 16, 16, 24), (1, 128, 5, 16, 24)
"""LTX-2 at 768x512: 121 frames, 6.0e13 operations, and 33."""


@pytest.fixture(autouse=True)
def measured(monkeypatch, tmp_path):
    """A home of its own; every level that is measured, on which "gemm" is the fastest form."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    levels = []

    def measure(backend, level, frames, dtype, operations, room):
        levels.append(level)
        return [Trial(form, 1.0 - 0.5 * (form == "gemm"), 1e-6, 1e12) for form in METAL.forms]

    monkeypatch.setattr(autotune, "measure_forms", measure)
    monkeypatch.setattr(autotune, "rate_of", lambda *given: 1e13)
    return levels


@pytest.fixture
def metal(monkeypatch):
    """The default device has Metal's policy, and every decode is long."""
    monkeypatch.setattr(backends, "current_backend", lambda: METAL)
    monkeypatch.setattr(autotune, "LONG_OPERATIONS", 1)


@pytest.fixture
def decoder():
    return small_decoder("ltx-2.3")


@pytest.fixture
def latents(decoder):
    return random_latents(decoder, 1, 3, 2, 3)


def run_plan(decoder, shape, **options):
    told = []
    given = {"backend": "metal", "memory_limit": "34GB", "dtype": "bfloat16", **options}
    return plan_to_run(decoder, shape, tell=told.append, **given), told


def test_a_long_decode_is_measured_once_and_takes_what_is_best(measured):
    decoder = VideoDecoder(PUBLISHED["ltx-2"].config)
    plan, (line,) = run_plan(decoder, LONG)
    assert plan.operations > 5e13 and line.startswith(f"measuring 9 kinds of convolution on {machine_name()}")
    assert "\n" not in line and "--no-tune" in line
    # Those with most operations first: what time does not suffice for matters least.
    assert measured[0] == Level(128, 192, 128, 128) and len(set(measured)) == 9
    assert set(dict(plan.backend.tuned).values()) == {"gemm"} and len(plan.backend.tuned) == 9
    assert set(load_tuning().trials[str(machine_of(METAL, mx.bfloat16))]) == {str(one) for one in measured}
    again, told = run_plan(decoder, LONG)
    assert again == plan and told == [] and len(measured) == 9


def machine_name():
    return str(machine_of(METAL, mx.bfloat16))


@pytest.mark.parametrize(
    ("shape", "form", "options"),
    [
        (SHORT, None, {}),
        (LONG, "gemm", {}),
        (LONG, None, {"no_tune": True}),
        (LONG, None, {"backend": "cpu"}),
        (LONG, None, {"backend": "cuda"}),
    ],
)
def test_where_nothing_is_measured(shape, form, options, measured):
    decoder = VideoDecoder(PUBLISHED["ltx-2"].config)
    decoder.convolution_form = form
    plan, told = run_plan(decoder, shape, **options)
    assert told == [] and measured == [] and not default_path().exists()
    assert plan.backend.form == form and plan.backend.arithmetic.get("tuned", []) == []


def test_nothing_is_measured_for_a_decode_that_does_not_fit(decoder, latents, metal, measured):
    assert not run_plan(decoder, latents.shape, memory_limit=1000, dtype="float32")[0].fits and measured == []


def test_what_is_measured_is_not_begun_after_two_seconds(measured, monkeypatch):
    """Each level takes 0.45 seconds of a stand-in clock."""
    decoder = VideoDecoder(PUBLISHED["ltx-2"].config)
    plan = plan_decode(decoder, LONG, backend="metal", memory_limit="34GB", dtype="bfloat16")

    def clock():
        return 0.45 * len(measured)

    assert len(tune_for(decoder, plan, [].append, clock)) == 5 == len(measured)
    assert len(tune_for(decoder, plan, [].append, lambda: clock() - 5 * 0.45)) == 4
    assert tune_for(decoder, plan, pytest.fail) == []


def test_every_way_to_decode_measures_first(decoder, latents, metal, measured, tmp_path):
    for decode in (
        lambda: list(decode_frames(decoder, latents, memory_limit="1GB")),
        lambda: decode_to_file(decoder, latents, tmp_path / "out.npy", memory_limit="1GB", overwrite=True),
        lambda: DecodingStage(decoder).decode(latents, DecodingArgs(memory_limit="1GB")),
    ):
        decode()
        assert len(measured) == 9 and default_path().exists()
        decode()
        assert len(measured) == 9
        default_path().unlink()
        measured.clear()


def test_no_way_to_decode_measures_when_told_not_to(decoder, latents, metal, measured, tmp_path):
    list(decode_frames(decoder, latents, memory_limit="1GB", no_tune=True))
    decode_to_file(decoder, latents, tmp_path / "out.npy", memory_limit="1GB", no_tune=True)
    DecodingStage(decoder).decode(latents, DecodingArgs(memory_limit="1GB", no_tune=True))
    plan = plan_decode(decoder, latents.shape, memory_limit="1GB")
    list(decode_frames(decoder, latents, plan=plan))
    assert measured == [] and not default_path().exists()


@pytest.mark.parametrize("progress", [False, True])
def test_it_is_told_where_progress_is(decoder, latents, metal, progress):
    told = io.StringIO()
    with redirect_stderr(told):
        list(decode_frames(decoder, latents, memory_limit="1GB", progress=progress))
    assert ("measuring 9 kinds of convolution" in told.getvalue()) == progress


@pytest.fixture
def command(decoder, latents, monkeypatch, tmp_path):
    """Decodes small latents by the command."""
    monkeypatch.setattr("mlx_vae_tiling.cli.decoding.load_decoder", lambda *given, **more: decoder)
    np.save(tmp_path / "in.npy", np.array(latents))
    arguments = ["decode", str(tmp_path / "in.npy"), "--vae", "demo", "-o", str(tmp_path / "out.npy")]
    return lambda *more: main([*arguments, "--overwrite", "--memory", "1GB", *more])


def test_the_command_measures_announces_and_says_how_far_off_it_was(metal, measured, command, capsys):
    assert command() == 0
    out, err = capsys.readouterr()
    assert err.count("measuring") == 1 and "mlx-vae-tiling: measuring" in err
    assert "s of convolutions, at the rates measured here" in err and "decode, about" in err
    assert "decoding took" in out and "s of convolutions expected" in out
    assert command("--no-tune") == 0
    assert "measuring" not in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--no-tune"]])
def test_an_unreadable_file_is_told_in_one_line_and_measured_anew(more, metal, measured, command, capsys):
    default_path().parent.mkdir(parents=True)
    default_path().write_text("{")
    assert command(*more) == 0
    err = capsys.readouterr().err
    assert err.count("tuning.json are ignored") == 1 and "mlx-vae-tiling: warning: measurements in" in err
    assert bool(measured) == (not more)
    assert command() == 0
    assert ("are ignored" in capsys.readouterr().err) == bool(more) and measured


LEVEL = Level(12, 9, 32, 16)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_forms_are_timed_and_compared(dtype):
    trials = measure_forms(METAL, LEVEL, 4, dtype, 1e9, 10**9)
    assert [trial.form for trial in trials] == ["stock", "folded", "gemm", "winograd_time"]
    for trial in trials:
        assert 0 < trial.seconds < 10 and 0 <= trial.error < 5e-3
        assert trial.operations == 54 * 32 * 16 * 12 * 9 * 4


def test_a_form_that_is_inaccurate_is_not_timed_but_for_the_default(monkeypatch):
    timed = []
    monkeypatch.setattr(autotune, "error_of", lambda backend, form, sample: 1.0)
    monkeypatch.setattr(autotune, "seconds_of", lambda backend, form, *more: timed.append(form) or 0.1)
    trials = measure_forms(METAL, LEVEL, 4, mx.float32, 1e9, 10**9)
    assert timed == ["folded"] and all(trial.error == 1.0 for trial in trials)
    assert [trial.seconds for trial in trials] == [math.inf, 0.1, math.inf, math.inf]


def test_a_form_there_is_no_room_for_or_at_which_the_device_fails_is_out(monkeypatch):
    assert all(trial.seconds == math.inf for trial in measure_forms(METAL, LEVEL, 4, mx.float32, 1e9, 1000))

    def fail(backend, form, *more):
        if form == "gemm":
            raise RuntimeError("[METAL] Command buffer execution failed")
        return 0.1

    monkeypatch.setattr(autotune, "seconds_of", fail)
    trials = {trial.form: trial for trial in measure_forms(METAL, LEVEL, 4, mx.float32, 1e9, 10**9)}
    assert trials["gemm"][1:3] == (math.inf, math.inf) and trials["folded"].seconds == 0.1
    monkeypatch.setattr(autotune, "seconds_of", lambda *given: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        measure_forms(METAL, LEVEL, 4, mx.float32, 1e9, 10**9)


@pytest.mark.parametrize(
    ("level", "frames", "operations", "part"),
    [
        (Level(272, 480, 128, 128), 8, 1e12, (272, 8)),
        (Level(272, 480, 128, 128), 8, 3e11, (272, 2)),
        (Level(272, 480, 128, 128), 8, 1e11, (117, 2)),
        (Level(272, 480, 128, 128), 8, 1e9, (9, 2)),  # for 4096 positions, from which MLX takes Winograd
        (Level(272, 480, 128, 48), 8, 1e9, (3, 2)),
        (Level(34, 60, 1024, 1024), 1, 1e12, (34, 1)),
    ],
)
def test_a_part_is_large_enough_for_its_kernels(level, frames, operations, part):
    cut, count = part_of(METAL, level, frames, mx.bfloat16, operations)
    assert (cut.height, count) == part and cut[1:] == level[1:]
