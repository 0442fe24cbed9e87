"""What was measured on a machine is what its plans take."""

from dataclasses import replace

import mlx.core as mx
import pytest
from vae_cases import joined, random_latents, small_decoder

from mlx_vae_tiling import TilingConfig, Window, plan_decode
from mlx_vae_tiling.runtime import forms
from mlx_vae_tiling.runtime.forms import expected_seconds
from mlx_vae_tiling.runtime.measure import machine_of, work_of
from mlx_vae_tiling.runtime.tuning import Trial, Tuning
from mlx_vae_tiling.vae.backends import METAL
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.published import PUBLISHED

SHAPE = (1, 128, 5, 34, 60)
SECONDS = {"folded": 1.0, "winograd32": 0.5, "winograd_time": 0.6}


@pytest.fixture
def decoder():
    return VideoDecoder(PUBLISHED["ltx-2"].config)


def whole(decoder):
    return Window().region(*decoder.output_shape(SHAPE)[2:])


@pytest.fixture
def tuning(decoder, monkeypatch):
    """Trials of 10**12 operations at every level; "winograd32" is inaccurate where channels differ."""
    tuning = Tuning()
    for work in work_of(decoder.steps(decoder.options()), whole(decoder), 1):
        same = work.level.channels_in == work.level.channels_out
        trials = [
            Trial(form, seconds, 1e-3 if same or form != "winograd32" else 1.0, 1e12)
            for form, seconds in SECONDS.items()
        ]
        tuning.record(machine_of(METAL, mx.bfloat16), work.level, trials)
    monkeypatch.setattr(forms, "load_tuning", lambda: tuning)
    return tuning


def planned(decoder, **options):
    defaults = {"memory_limit": "34GB", "dtype": "bfloat16", "backend": "metal"}
    return plan_decode(decoder, SHAPE, **defaults | options)


@pytest.mark.usefixtures("tuning")
def test_a_plan_takes_the_fastest_accurate_form_of_each_level(decoder):
    plan = planned(decoder)
    widths = (128, 256, 512, 1024)
    alike = {(width, width): "winograd32" for width in widths}
    others = {(width, 4 * width): "winograd_time" for width in widths[1:]}
    ends = {(128, 1024): "winograd_time", (128, 48): "winograd_time"}
    assert dict(plan.backend.tuned) == alike | others | ends
    assert plan.peak_bytes != planned(decoder, no_tune=True).peak_bytes


@pytest.mark.usefixtures("tuning")
def test_where_nothing_is_tuned(decoder):
    assert planned(decoder, no_tune=True).backend == METAL
    assert planned(decoder, dtype="float32").backend == METAL  # measured in bfloat16
    assert planned(decoder, backend=METAL).backend is METAL
    decoder.convolution_form = "gemm"
    assert planned(decoder).backend.tuned == () and planned(decoder).backend.form == "gemm"


def test_nothing_measured(decoder, monkeypatch):
    monkeypatch.setattr(forms, "load_tuning", Tuning)
    assert planned(decoder).backend == METAL


def test_a_form_that_needs_more_windows_is_not_taken(decoder, tuning):
    """The fastest form's block is half a gigabyte."""
    plain = planned(decoder, no_tune=True, memory_limit="3GB")
    chosen = planned(decoder, memory_limit="3GB")
    assert chosen.fits == plain.fits and len(chosen.parts) <= len(plain.parts)


def test_seconds_are_operations_over_measured_rates(decoder, tuning):
    steps = decoder.steps(decoder.options())
    for plan in (planned(decoder), planned(decoder, window=Window(height=slice(0, 500)))):
        seconds = expected_seconds(decoder, plan, tuning)
        expected = sum(
            SECONDS[plan.backend.form_of(work.level.channels_in, work.level.channels_out)] * work.operations
            for part in plan.parts
            for work in work_of(steps, part.inside, 1)
        )
        assert seconds == pytest.approx(expected / 1e12)
        assert plan.operations / 2e12 < seconds < plan.operations / 1e12
    blended = planned(decoder, tiling=TilingConfig.default())
    assert expected_seconds(decoder, blended, tuning) == pytest.approx(blended.operations / 1e12)
    del tuning.trials[str(machine_of(METAL, mx.bfloat16))]
    assert expected_seconds(decoder, plan, tuning) is None


def test_tuned_forms_give_the_same_frames():
    """On the CPU, with Metal's policy."""
    small = small_decoder("ltx-2")
    latents = random_latents(small, 1, 3, 2, 3)
    expected = joined(small.stream(latents))
    pairs = {
        (work.level.channels_in, work.level.channels_out)
        for work in work_of(
            small.steps(small.options()), Window().region(*small.output_shape(latents.shape)[2:]), 1
        )
    }
    cycle = ["gemm", "winograd_time", "folded"]
    tuned = tuple((pair, cycle[i % 3]) for i, pair in enumerate(sorted(pairs)))
    frames = joined(small.stream(latents, backend=replace(METAL, tuned=tuned)))
    assert mx.abs(frames - expected).max().item() <= 1e-5 * (expected.max() - expected.min()).item()
