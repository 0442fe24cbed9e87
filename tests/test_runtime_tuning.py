"""Choosing a form from stand-in measurements, and the file that keeps them."""

import json
import math

import pytest

from mlx_vae_tiling.runtime.tuning.choices import (
    Level,
    Machine,
    Trial,
    Tuning,
    choose,
    load_tuning,
    save_tuning,
    tune,
)

MACHINE = Machine("Apple M3 Max", "0.32.4", "bfloat16")
LEVEL, OTHER = Level(272, 480, 128, 128), Level(136, 240, 256, 256)


def trials(**measured):
    """form=(seconds, error), of 10**12 operations each."""
    return [Trial(form, *pair, 1e12) for form, pair in measured.items()]


@pytest.mark.parametrize(
    ("measured", "form"),
    [
        ({"folded": (0.10, 1.7e-3), "winograd32": (0.06, 1.6e-3), "stock": (0.04, 5.5e-2)}, "winograd32"),
        ({"folded": (0.10, 1.7e-3), "winograd32": (0.06, 7e-3)}, "folded"),  # as TF32 might
        ({"folded": (0.10, 1.7e-3), "gemm": (0.097, 3.7e-3)}, "folded"),  # within the noise
        ({"folded": (0.10, 1.7e-3), "gemm": (0.094, 3.7e-3)}, "gemm"),
        ({"folded": (0.10, 6e-3), "gemm": (0.12, 3.7e-3)}, "gemm"),  # the default is broken here
        ({"folded": (0.10, math.nan), "gemm": (0.12, 3.7e-3)}, "gemm"),
        ({"folded": (0.10, -1.0), "gemm": (0.12, 3.7e-3)}, "gemm"),
        ({"folded": (0.10, 6e-3), "gemm": (0.12, math.inf)}, "folded"),  # nothing is accurate
        ({"winograd_time": (0.08, 5e-3)}, "winograd_time"),  # the bound itself is allowed
        ({}, "folded"),
    ],
)
def test_choice(measured, form):
    assert choose(trials(**measured), 5e-3, "folded") == form


@pytest.fixture
def tuning():
    tuning = Tuning()
    tuning.record(MACHINE, LEVEL, trials(folded=(0.1, 1e-3), winograd32=(0.06, 1e-3), gemm=(0.08, 3e-3)))
    return tuning


def test_form_of_a_decode(tuning):
    assert tuning.form(MACHINE, LEVEL, "folded") == "winograd32"
    assert tuning.form(MACHINE, OTHER, "folded") == "folded"


@pytest.mark.parametrize("change", [{"device": "Apple M5"}, {"mlx_version": "0.33.0"}, {"dtype": "float32"}])
def test_measurements_hold_for_one_machine(tuning, change):
    assert tuning.form(MACHINE._replace(**change), LEVEL, "folded") == "folded"


def test_the_bound_is_that_of_the_dtype():
    machine, tuning = MACHINE._replace(dtype="float32"), Tuning()
    tuning.record(machine, LEVEL, trials(folded=(0.1, 1e-6), winograd32=(0.05, 1e-4)))
    assert tuning.form(machine, LEVEL, "folded") == "folded"


def test_seconds_from_operations_and_rates(tuning):
    work = {(LEVEL, "winograd32"): 3e12, (LEVEL, "folded"): 2e12}
    assert tuning.seconds(MACHINE, work) == pytest.approx(3 * 0.06 + 2 * 0.1)
    assert tuning.seconds(MACHINE, {**work, (OTHER, "folded"): 1e12}) is None


def test_tuning_stops_in_time_and_measures_once():
    now, asked, tuning = [0.0], [], Tuning()

    def measure(level):
        asked.append(level)
        now[0] += 0.6
        return trials(folded=(0.1, 1e-3), gemm=(0.1, 1e-3))

    levels = [LEVEL, OTHER, Level(68, 120, 512, 512)]
    options = {"seconds": 1.0, "clock": lambda: now[0]}
    assert tune(tuning, MACHINE, levels, measure, **options) == levels[:2]
    assert asked == levels[:2]
    assert tune(tuning, MACHINE, levels, measure, **options) == levels[2:]
    assert tune(tuning, MACHINE, levels, measure, **options) == []


def test_file_keeps_what_was_measured(tuning, tmp_path):
    path = tmp_path / "some" / "tuning.json"
    assert load_tuning(path) == Tuning()
    save_tuning(tuning, path)
    assert load_tuning(path) == tuning
    assert [file.name for file in path.parent.iterdir()] == ["tuning.json"]


def written(path, **changes):
    save_tuning(Tuning({str(MACHINE): {str(LEVEL): trials(folded=(0.1, 1e-3))}}), path)
    data = json.loads(path.read_text())
    data["trials"][str(MACHINE)][str(LEVEL)][0].update(changes)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        lambda path: "",
        lambda path: "{",
        lambda path: "[]",
        lambda path: "{}",
        lambda path: '{"version": 2, "trials": {}}',
        lambda path: '{"version": 1, "trials": [1]}',
        lambda path: written(path, seconds=0),
        lambda path: written(path, seconds="soon"),
        lambda path: written(path, form=3),
        lambda path: written(path, more=3),
    ],
)
def test_unreadable_file_is_ignored_with_a_warning(text, tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text(text(path))
    with pytest.warns(UserWarning, match=r"tuning\.json are ignored.*delete the file"):
        assert load_tuning(path) == Tuning()


def test_cache_that_cannot_be_written(tuning, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be kept"):
        save_tuning(tuning, tmp_path / "file" / "tuning.json")


def test_path_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tuning(Tuning())
    assert (tmp_path / ".cache" / "mlx_vae_tiling" / "tuning.json").exists()
    assert load_tuning() == Tuning()
