"""What was measured on a machine is what its plans take, and a resumed decode what its first run took."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from vae_cases import joined, random_latents, small_decoder

from mlx_vae_tiling import TilingConfig, Window, decode_to_file, plan_decode
from mlx_vae_tiling.media.writer import VideoWriter
from mlx_vae_tiling.runtime.planning import forms
from mlx_vae_tiling.runtime.planning.forms import expected_seconds, in_blocks
from mlx_vae_tiling.runtime.tuning.choices import Trial, Tuning
from mlx_vae_tiling.runtime.tuning.measure import machine_of, work_of
from mlx_vae_tiling.vae.backends import CPU, CUDA, METAL
from mlx_vae_tiling.vae.build import build_decoder
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
    pair = plan_decode(decoder, (2, *SHAPE[1:]), memory_limit="34GB", dtype="bfloat16", backend="metal")
    assert expected_seconds(decoder, pair, tuning) == pytest.approx(
        2 * expected_seconds(decoder, planned(decoder), tuning)
    )
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


RESUMED = {"one window": 2_400_000, "windows": 900_000}
"""Budgets for the latents below."""


@pytest.fixture
def half():
    """In bfloat16, in which forms differ visibly."""
    decoder = small_decoder("ltx-2.3")
    decoder = VideoDecoder(decoder.config).init_random()
    decoder.set_dtype(mx.bfloat16)
    return decoder


def measured(decoder, shape, form):
    """A machine on which a form is the fastest at every level."""
    tuning, everything = Tuning(), Window().region(*decoder.output_shape(shape)[2:])
    for work in work_of(decoder.steps(decoder.options()), everything, 1):
        trials = [Trial(name, 1.0 - 0.5 * (name == form), 1e-3, 1e12) for name in METAL.forms]
        tuning.record(machine_of(METAL, decoder.dtype), work.level, trials)
    return tuning


def interrupt(monkeypatch, decode, pieces=2):
    """Ctrl-C after so many pieces were written."""
    write, written = VideoWriter.write, []

    def interrupting(self, frames):
        write(self, frames)
        written.append(1)
        if len(written) == pieces:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VideoWriter, "write", interrupting)
        decode()


@pytest.mark.parametrize("limit", RESUMED)
@pytest.mark.parametrize(("first", "second"), [("gemm", "winograd_time"), (None, "gemm")])
def test_a_resumed_decode_keeps_the_forms_it_was_begun_with(
    half, limit, first, second, monkeypatch, tmp_path
):
    """On the CPU, with Metal's policy: what is measured between a kill and a resume changes no frame."""
    latents = random_latents(half, 1, 4, 4, 3).astype(mx.bfloat16)

    def decode(form, name, **options):
        tuning = measured(half, latents.shape, form)
        monkeypatch.setattr(forms, "load_tuning", lambda: tuning)
        plan = plan_decode(half, latents.shape, memory_limit=RESUMED[limit], backend="metal")
        assert (len(plan.parts) > 1) == (limit == "windows")
        return decode_to_file(half, latents, tmp_path / name, plan=plan, **options)

    expected = decode(first, "first.npy").plan.backend
    other = decode(second, "second.npy").plan.backend
    assert (np.load(tmp_path / "first.npy") != np.load(tmp_path / "second.npy")).any()
    interrupt(monkeypatch, lambda: decode(first, "out.npy"))
    report = decode(second, "out.npy", resume=True)
    assert report.resumed_frames > 0 and report.plan.backend == expected != other
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), np.load(tmp_path / "first.npy"))


@pytest.fixture
def begun(half, monkeypatch, tmp_path):
    """A decode with Metal's policy that ended early: what goes on with it."""
    latents = random_latents(half, 1, 4, 4, 3).astype(mx.bfloat16)

    def decode(backend=METAL, **options):
        plan = plan_decode(half, latents.shape, memory_limit=RESUMED["one window"], backend=backend)
        return decode_to_file(half, latents, tmp_path / "out.npy", plan=plan, **options)

    interrupt(monkeypatch, decode)
    return decode


def test_resuming_on_another_device_or_with_another_pinned_form_is_refused(half, begun):
    for backend in (CPU, CUDA):
        with pytest.raises(ValueError, match="begun with, but backend differs"):
            begun(backend, resume=True)
    half.convolution_form = "gemm"
    with pytest.raises(ValueError, match="begun with, but convolution_form differs"):
        begun(resume=True)
    half.convolution_form = None
    assert begun(resume=True).plan.backend == METAL


@pytest.mark.parametrize(
    "arithmetic",
    [
        {},
        [],
        None,
        {"form": None},
        {"form": "unheard of", "block_bytes": 1, "tuned": []},
        {"form": None, "block_bytes": "many", "tuned": []},
        {"form": None, "block_bytes": float("inf"), "tuned": []},
        {"form": None, "block_bytes": 1, "tuned": [[128, 128]]},
        {"form": None, "block_bytes": 1, "tuned": [[128, 128, None]]},
        {"form": None, "block_bytes": 1, "tuned": 3},
    ],
)
def test_a_journal_with_damaged_forms_is_refused(begun, arithmetic, tmp_path):
    place = tmp_path / "out.npy.partial" / "journal.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"arithmetic": arithmetic}))
    with pytest.raises(ValueError, match=r"journal.json cannot be read \(.*\); delete"):
        begun(resume=True)


@pytest.mark.parametrize(
    "backend", [CPU, CUDA, replace(METAL, form="gemm"), replace(METAL, tuned=(((8, 4), "winograd32"),))]
)
def test_arithmetic_survives_a_file(backend):
    plain = {"cpu": CPU, "metal": METAL, "cuda": CUDA}[backend.name]
    assert plain.computing_as(json.loads(json.dumps(backend.arithmetic))) == backend


@pytest.mark.parametrize("limit", RESUMED)
def test_a_report_says_how_far_off_the_expected_time_was(half, limit, monkeypatch, tmp_path):
    """Of a resumed decode, for the frames that were decoded now."""
    latents, path = random_latents(half, 1, 4, 4, 3).astype(mx.bfloat16), tmp_path / "out.npy"
    tuning = measured(half, latents.shape, None)
    monkeypatch.setattr(forms, "load_tuning", lambda: tuning)
    plan = plan_decode(half, latents.shape, memory_limit=RESUMED[limit], backend="metal")
    whole = expected_seconds(half, plan, tuning)
    interrupt(monkeypatch, lambda: decode_to_file(half, latents, path, plan=plan), 1)
    report = decode_to_file(half, latents, path, plan=plan, resume=True)
    assert 0 < report.expected_seconds < whole
    if limit == "one window":
        assert report.expected_seconds == pytest.approx((1 - report.resumed_frames / report.frames) * whole)
    ratio = report.decoding_seconds / report.expected_seconds
    assert 0 < report.decoding_seconds < report.seconds and f"{ratio:.2f} times the" in str(report)
    monkeypatch.setattr(forms, "load_tuning", Tuning)
    plain = decode_to_file(half, latents[:, :, :1], path, overwrite=True)
    assert plain.expected_seconds is None and "expected" not in str(plain)


def test_where_there_are_no_convolutions_no_time_is_expected():
    """A diffusion decoder's work is attention."""
    decoder = build_decoder(PUBLISHED["ltx-2.5"].config)
    shape = (1, 128, 3, 8, 8)
    plan = plan_decode(decoder, shape, memory_limit="34GB", dtype="bfloat16", backend="metal")
    assert expected_seconds(decoder, plan, Tuning()) is None


MIB = 2**20


@pytest.mark.parametrize(
    ("size", "limit", "pinned", "block"),
    [
        ((5, 34, 60), "34GB", False, 512),
        ((5, 68, 120), "34GB", False, 2048),
        ((5, 68, 120), "16GB", False, 1024),  # an eighth of the budget at most
        ((5, 16, 24), "1.6GB", False, 256),
        ((5, 16, 24), "1.6GB", True, 256),
    ],
)
def test_blocks_are_as_large_as_pays_and_small_where_that_saves_windows(
    size, limit, pinned, block, decoder, monkeypatch
):
    decoder.cast(mx.bfloat16)
    shape = (1, 128, *size)
    tuning = measured(decoder, shape, "winograd32")
    monkeypatch.setattr(forms, "load_tuning", lambda: tuning)
    decoder.convolution_form = "winograd32" if pinned else None
    plan = plan_decode(decoder, shape, memory_limit=limit, dtype="bfloat16", backend="metal")
    assert plan.fits and len(plan.parts) == 1 and plan.backend.block_bytes == block * MIB
    assert plan.backend.form_of(128, 128) == "winograd32"
    fixed = replace(plan.backend, block_bytes=512 * MIB)
    other = plan_decode(decoder, shape, memory_limit=limit, dtype="bfloat16", backend=fixed)
    assert (other.fits and len(other.parts) == 1) == (block >= 512)


def test_other_forms_have_no_blocks(decoder):
    everything = whole(decoder)
    for backend in (CPU, CUDA, METAL, replace(METAL, form="gemm")):
        assert in_blocks(backend, everything, 10**10) == [backend]


def test_where_nothing_fits_the_smallest_plan_is_told(decoder, tuning):
    shape = (1, 128, 2, 8, 8)
    plan = plan_decode(decoder, shape, memory_limit="0.9GB", dtype="bfloat16", backend="metal")
    plain = plan_decode(decoder, shape, memory_limit="0.9GB", dtype="bfloat16", backend=METAL)
    assert not plan.fits and plan.peak_bytes <= plain.peak_bytes
