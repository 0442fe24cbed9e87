"""`bench` runs, tells what it measured, and measures what is there."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from vae_cases import VERSIONS, small_decoder

from mlx_vae_tiling import plan_decode
from mlx_vae_tiling.cli import main
from mlx_vae_tiling.runtime import bench
from mlx_vae_tiling.runtime.tuning.choices import ERROR_BOUNDS, Level, load_tuning
from mlx_vae_tiling.runtime.tuning.measure import (
    machine_of,
    measure_form,
    pass_rates,
    product_rate,
    sample_of,
    work_of,
)
from mlx_vae_tiling.vae.backends import METAL, current_backend


def test_quick_bench_prints_a_table(capsys):
    assert main(["bench", "--quick"]) == 0
    printed, told = capsys.readouterr()
    for text in (
        "matrix product",
        current_backend().forms[0],
        "GB/s",
        "as planned",
        "Paste all of this into an issue",
    ):
        assert text in printed
    assert "decode, whole" in told


def test_a_decoder_of_another_kind_is_decoded_only(capsys):
    arguments = ["--version", "taeltx2_3", "--size", "64x64", "--latent-frames", "2", "--dtype", "float32"]
    assert main(["bench", "--quick", "--json", *arguments]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["forms"] == [] and fields["bytes_per_second"] == {}
    assert [one["frames"] for one in fields["decodes"]] == [9, 9]


def test_bench_as_json_keeps_forms_and_draws(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("HOME", str(tmp_path))
    plot = tmp_path / "memory.png"
    assert main(["bench", "--quick", "--json", "--tune", "--plot", str(plot), "--memory", "1GB"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in fields["decodes"]] == ["whole", "as planned"]
    for one in fields["decodes"]:
        assert one["frames"] == 17 and one["plan"]["peak_bytes"] == pytest.approx(one["peak_bytes"], rel=0.02)
    forms = fields["forms"]
    assert len(forms) == 2 and {trial["form"] for trial in forms[0]["trials"]} == set(current_backend().forms)
    kept = load_tuning().of(machine_of(current_backend(), mx.float16), Level(**forms[0]["level"]))
    assert [trial._asdict() for trial in kept] == forms[0]["trials"]
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "none/memory.png"], "none: no such directory to write in, create it first"),
        (["--plot", "memory.txt"], "a picture must end in "),
        (["--latent-frames", "0"], "--latent-frames must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(options, message, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("mlx_vae_tiling.cli.bench.bench", None)
    assert main(["bench", "--quick", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100x96"], "--size must be WxH in multiples of 32, from 64 on, got '100x96'"),
        (["--size", "96"], "--size must be WxH"),
        (["--latent-frames", "-1"], "--latent-frames must be at least 1, got -1"),
        (["--vae", "demo", "--version", "ltx-2"], "give one of them"),
        (["--memory", "1KB"], "no plan fits"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["bench", "--quick", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("version", VERSIONS)
def test_work_is_that_of_the_plan(version):
    decoder = small_decoder(version)
    plan = plan_decode(decoder, (1, decoder.config.latent_channels, 3, 3, 4), memory_limit="1GB")
    work = work_of(decoder.steps(decoder.options()), plan.output, 2)
    assert sum(one.operations for one in work) == plan.operations
    last = next(one for one in work if one.level.channels_out == 48)
    assert (last.level.height, last.level.width, last.frames) == (24, 32, 16)


@pytest.mark.parametrize("form", METAL.forms)
def test_errors_of_forms_are_measured(form):
    """Against float32: those of half precision are as large as they are known to be."""
    level = Level(6, 7, 32, 16)
    assert measure_form(METAL, form, sample_of(METAL, level, 2, mx.float32), 1).error < 1e-6
    trial = measure_form(METAL, form, sample_of(METAL, level, 2, mx.bfloat16), 1)
    assert 1e-3 < trial.error <= ERROR_BOUNDS["bfloat16"]
    assert trial.operations == 54 * 32 * 16 * 6 * 7 * 2 and trial.seconds > 0


def test_rates_are_positive():
    assert product_rate(64, mx.float32) > 0
    assert all(one.bytes_per_second > 0 for one in pass_rates(Level(4, 6, 8, 8), 3, mx.float32))


def test_policies_of_metal_are_compared():
    """On the CPU, with Metal's policy: every variant decodes all frames."""
    decoder = small_decoder("ltx-2.3")
    latents = mx.random.normal((1, decoder.config.latent_channels, 3, 4, 4), key=mx.random.key(1))
    tuned = replace(METAL, tuned=(((16, 16), "gemm"), ((8, 8), "winograd_time")), block_bytes=10**8)
    plan = plan_decode(decoder, latents.shape, memory_limit="30MB", backend=tuned)
    decodes = [bench._decode(decoder, latents, *variant) for variant in bench._variants(decoder, plan, False)]
    names = [one.name for one in decodes]
    assert {"whole", "as planned", "nothing waited for", "cache of one chunk", "no cache"} <= set(names)
    assert any(name.endswith("windows") for name in names) and any("blended" in name for name in names)
    assert all(one.frames == 17 for one in decodes)
    policies = [one.plan.backend for one in decodes]
    assert all((policy.tuned, policy.block_bytes) == (tuned.tuned, 10**8) for policy in policies)
    waited = {one.name for one in decodes if one.evaluation_seconds}
    assert "as planned" in waited and "nothing waited for" not in waited
