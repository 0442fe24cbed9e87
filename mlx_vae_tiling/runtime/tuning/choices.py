"""Which form of the convolution is best on this machine: measured once, kept in a small file.

The arithmetic of choosing, and the file; whoever calls brings the measurements. Nothing is measured or
read when this is imported.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ERROR_BOUNDS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}
"""Root mean square error over that of the reference's values, by dtype.

One accumulator in float32, then a bias, leaves 3e-4 in float16 and 2.4e-3 in bfloat16, Winograd along time
and sums of shifted products up to twice that; Winograd in half precision leaves 7e-3 and 5.5e-2.
"""

FASTER_BY = 1.05
"""How much faster than the default a form has to be to take its place: timings repeat to a few per cent."""

VERSION = 1


class TuningWarning(UserWarning):
    """What was measured can be neither read nor kept."""


class Level(NamedTuple):
    """A convolution as the decoder uses it, whatever the number of frames.

    Frames must not depend on how a stream is cut, so neither does the form.
    """

    height: int
    width: int
    channels_in: int
    channels_out: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.channels_in} to {self.channels_out}"


class Machine(NamedTuple):
    """What a measurement holds for."""

    device: str
    mlx_version: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.device}, MLX {self.mlx_version}, {self.dtype}"


class Trial(NamedTuple):
    """A form, measured.

    Args:
        form: Its name.
        seconds: Of one convolution; infinity where it was not worth a measurement.
        error: Root mean square error over that of the values of a float32 reference on the same device.
        operations: Multiplications and additions of that convolution as defined, whatever the form does.
    """

    form: str
    seconds: float
    error: float
    operations: float


def accurate(trials: Iterable[Trial], bound: float) -> list[Trial]:
    """The trials whose error is a number up to the bound, the fastest first."""
    kept = [trial for trial in trials if 0 <= trial.error <= bound and trial.seconds > 0]
    return sorted(kept, key=lambda trial: trial.seconds)


def choose(trials: Iterable[Trial], bound: float, default: str) -> str:
    """The fastest accurate form; the default unless one is clearly faster, or the default inaccurate."""
    kept = accurate(trials, bound)
    if not kept:
        return default
    ours = next((trial for trial in kept if trial.form == default), None)
    if ours is not None and ours.seconds < FASTER_BY * kept[0].seconds:
        return default
    return kept[0].form


@dataclass
class Tuning:
    """Measurements by machine and level.

    Args:
        trials: Those of each machine's levels, by their `str`.
    """

    trials: dict[str, dict[str, list[Trial]]] = field(default_factory=dict)

    def record(self, machine: Machine, level: Level, trials: Sequence[Trial]) -> None:
        self.trials.setdefault(str(machine), {})[str(level)] = list(trials)

    def of(self, machine: Machine, level: Level) -> list[Trial]:
        return self.trials.get(str(machine), {}).get(str(level), [])

    def form(self, machine: Machine, level: Level, default: str) -> str:
        """The form that a decode takes; the default where nothing was measured."""
        return choose(self.of(machine, level), ERROR_BOUNDS[machine.dtype], default)

    def seconds(self, machine: Machine, work: Mapping[tuple[Level, str], float]) -> float | None:
        """How long convolutions take.

        Args:
            machine: Where.
            work: Operations by level and form.

        Returns:
            Seconds at the measured rates; None if one of them was not measured.
        """
        total = 0.0
        for (level, form), operations in work.items():
            trial = next((trial for trial in self.of(machine, level) if trial.form == form), None)
            if trial is None or not math.isfinite(trial.seconds):
                return None
            total += operations * trial.seconds / trial.operations
        return total


def tune(
    tuning: Tuning,
    machine: Machine,
    levels: Iterable[Level],
    measure: Callable[[Level], Sequence[Trial]],
    *,
    seconds: float,
    clock: Callable[[], float],
) -> list[Level]:
    """Measures every level that has no measurement, as long as there is time.

    Args:
        tuning: Gets the trials.
        machine: Where this runs.
        levels: In the order of their importance.
        measure: Measures the forms at a level.
        seconds: After this, no further level is begun.
        clock: Tells the time in seconds.

    Returns:
        The levels that were measured.
    """
    began, measured = clock(), []
    for level in levels:
        if tuning.of(machine, level):
            continue
        if clock() - began >= seconds:
            break
        tuning.record(machine, level, measure(level))
        measured.append(level)
    return measured


def default_path() -> Path:
    """Where measurements are kept: a file in the user's cache."""
    return Path.home() / ".cache" / "mlx_vae_tiling" / "tuning.json"


def load_tuning(path: str | os.PathLike[str] | None = None) -> Tuning:
    """Reads what was measured before.

    Args:
        path: The file; by default `default_path()`.

    Returns:
        The measurements: none if there is no file, and none, with a warning, if it cannot be read.
    """
    file = default_path() if path is None else Path(path)
    try:
        with open(file, encoding="utf-8") as opened:
            return _parsed(json.load(opened))
    except FileNotFoundError:
        return Tuning()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Always from here, so that a decode, which asks several times, is told once.
        warnings.warn(f"measurements in {file} are ignored: {error!r}; delete the file", TuningWarning, 1)
        return Tuning()


def save_tuning(tuning: Tuning, path: str | os.PathLike[str] | None = None) -> None:
    """Writes the measurements as a whole or not at all.

    A cache that cannot be written is no reason to fail: that is a warning.
    """
    file = default_path() if path is None else Path(path)
    kept = {
        machine: {level: [trial._asdict() for trial in trials] for level, trials in levels.items()}
        for machine, levels in asdict(tuning)["trials"].items()
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as written:
            json.dump({"version": VERSION, "trials": kept}, written, indent=1)
        os.replace(written.name, file)
    except OSError as error:
        warnings.warn(f"measurements cannot be kept in {file}: {error}", TuningWarning, 1)


def _parsed(data: Any) -> Tuning:
    if data["version"] != VERSION:
        raise ValueError(f"version must be {VERSION}, got {data['version']!r}")
    trials = {
        machine: {level: [_trial(**trial) for trial in trials] for level, trials in levels.items()}
        for machine, levels in data["trials"].items()
    }
    return Tuning(trials)


def _trial(form: str, seconds: float, error: float, operations: float) -> Trial:
    numbers = float(seconds), float(error), float(operations)
    if not isinstance(form, str) or not numbers[0] > 0 or not numbers[2] > 0:
        raise ValueError(f"a trial must have a form, seconds and operations, got {form!r}, {numbers}")
    return Trial(form, *numbers)
