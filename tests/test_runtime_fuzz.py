"""Dozens of damaged journals and unfinished outputs: resumed to the right frames, or one clear error."""

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fuzzing import bounded
from test_runtime_resume import assert_shows
from vae_cases import random_latents, small_decoder

from mlx_vae_tiling import DecodePlan, VideoDecoder, decode_to_file, plan_decode
from mlx_vae_tiling.runtime.job import Job
from mlx_vae_tiling.runtime.resuming.journal_file import read_told, write_told

pytestmark = pytest.mark.fuzz

SIZE, FRAMES, CUT = (3, 2, 3), 17, 9
"""Latents, frames, and how many of them were decoded when the decode was interrupted."""

LIMITS = {1: 2_400_000, 2: 1_850_000}
"""By the number of windows."""

NAMES = ["out.npy", "out/", "out.mp4", "out.mov"]
VALUES = [None, "", "x", [], {}, [[]], [None], "9" * 5000, -1, 0, 1, 3, 18, 10**6, 2**63, 10**30, 0.5]
VALUES += [float("inf"), float("nan"), True, [0] * 10_000]


@dataclass
class Begun:
    """An interrupted decode: where it is, its output's name, what it was begun with, and what it becomes."""

    home: Path
    name: str
    decoder: VideoDecoder
    latents: mx.array
    plan: DecodePlan
    expected: np.ndarray

    @property
    def output(self):
        return f"{self.home}/{self.name}"

    @property
    def store(self):
        return self.home / f"{self.name.rstrip('/')}.partial"

    @property
    def journal(self):
        return self.store / "journal.json"

    @property
    def frames(self):
        """Where frames are: of several windows in the store, of one in the unfinished output."""
        kept = self.store / "frames"
        if kept.exists():
            return kept
        return sorted(path for path in self.home.rglob("*.partial.*") if path.is_file())[-1]

    def resume(self, **options):
        return decode_to_file(
            self.decoder, self.latents, self.output, **{"plan": self.plan, "resume": True, **options}
        )


def frames_in(output):
    if output.endswith("/"):
        import av

        images = [av.open(str(path)) for path in sorted(Path(output).glob("*.png"))]
        return np.stack([next(image.decode(video=0)).to_ndarray(format="rgb24") for image in images])
    return np.load(output)


def interrupt(patch, case):
    """Ends the decode, as Ctrl-C does, when so many frames of its last window are there."""
    decode, last = Job.decode, case.plan.parts[-1]

    def cut(self, part, done=0, report=None):
        for frames in decode(self, part, done, report):
            yield frames
            done += len(frames)
            if part == last and done >= CUT:
                raise KeyboardInterrupt

    with patch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Job, "decode", cut)
        case.resume(resume=False)


@pytest.fixture(params=[(name, windows) for name in NAMES for windows in LIMITS], scope="module")
def begun(request, tmp_path_factory):
    name, windows = request.param
    decoder = small_decoder("ltx-2.3")
    latents = random_latents(decoder, 1, *SIZE)
    plan = plan_decode(decoder, latents.shape, memory_limit=LIMITS[windows])
    assert plan.fits and len(plan.parts) == windows and plan.latent_frames_per_step == 1
    home = tmp_path_factory.mktemp("begun")
    decode_to_file(decoder, latents, home / "whole.npy", plan=plan)
    expected = np.load(home / "whole.npy")
    (home / "whole.npy").unlink()
    case = Begun(home, name, decoder, latents, plan, expected)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, case)
    return case


# Damages: they change the case's files, and are told what to draw from.


def told(case, draw, change):
    """The journal with something else in it, well written."""
    found = read_told(case.store)
    change(found)
    write_told(case.store, found)


def other_counts(case, draw):
    def change(found):
        if found["done"]:
            found["done"][draw.randrange(len(found["done"]))] = draw.choice([FRAMES, FRAMES + 5, 10**6])
        else:
            found["done"] = [5]

    told(case, draw, change)


def other_fingerprint(case, draw):
    def change(found):
        name = draw.choice(sorted(found["fingerprint"]))
        found["fingerprint"][name] = draw.choice(["", "x", found["fingerprint"][name][::-1]])

    told(case, draw, change)


def other_shape(case, draw):
    told(case, draw, lambda found: found.update(shape=[FRAMES, 96, 64, 3]))


def wrong_value(case, draw):
    """Anything, anywhere in it."""
    found = json.loads(case.journal.read_text())
    at = found
    while True:
        key = draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list) or not at[key] or draw.random() < 0.2:
            break
        at = at[key]
    before = at[key]
    at[key] = draw.choice([value for value in VALUES if value != before or type(value) is not type(before)])
    case.journal.write_text(json.dumps(found))


def missing_value(case, draw):
    found = json.loads(case.journal.read_text())
    del found[draw.choice(sorted(found))]
    case.journal.write_text(json.dumps(found))


def truncated(case, draw):
    os.truncate(case.journal, draw.randrange(case.journal.stat().st_size))


def nested(case, draw):
    depth = draw.choice([900, 100_000])
    case.journal.write_text(draw.choice(["[" * depth, "[" * depth + "]" * depth, '{"parts":' * depth]))


def no_text(case, draw):
    case.journal.write_bytes(draw.choice([b"\xff\xfe\x00", b"\0" * 4096, draw.randbytes(300)]))


def endless(case, draw):
    """Far more than there is memory."""
    os.truncate(case.journal, 2**36)


def journal_is_a_pipe(case, draw):
    case.journal.unlink()
    os.mkfifo(case.journal)


def journal_is_a_folder(case, draw):
    case.journal.unlink()
    case.journal.mkdir()


def journal_is_a_link(case, draw):
    """To itself, to nothing, or to the journal moved elsewhere."""
    moved = case.home / "moved"
    case.journal.rename(moved)
    case.journal.symlink_to(draw.choice([case.journal.name, "nowhere", moved]))


def store_is_a_link(case, draw):
    moved = case.home / "moved"
    case.store.rename(moved)
    case.store.symlink_to(draw.choice(["nowhere", case.store.name, moved, "/dev/null"]))


def no_journal(case, draw):
    case.journal.unlink()


def half_replaced(case, draw):
    """A kill between writing the new journal and renaming it."""
    (case.store / "journal.json.new").write_bytes(case.journal.read_bytes()[: draw.choice([0, 100, 10**6])])


def lock_is_a_folder(case, draw):
    (case.store / "lock").unlink(missing_ok=True)
    (case.store / "lock").mkdir()


def no_lock(case, draw):
    (case.store / "lock").unlink(missing_ok=True)


def frames_cut(case, draw):
    os.truncate(case.frames, draw.randrange(case.frames.stat().st_size))


def frames_gone(case, draw):
    case.frames.unlink()


def frames_are_a_folder(case, draw):
    frames = case.frames
    frames.unlink()
    frames.mkdir()


def frames_of_a_stranger(case, draw):
    case.frames.write_bytes(draw.choice([b"", b"GIF89a", draw.randbytes(5000), b"\x93NUMPY\x01\x00\xff\xff"]))


def frames_with_more(case, draw):
    """A kill while the next frames were written."""
    with open(case.frames, "ab") as file:
        file.write(draw.choice([b"\0", draw.randbytes(100_000)]))


DAMAGES = [
    other_counts,
    other_fingerprint,
    other_shape,
    wrong_value,
    wrong_value,
    wrong_value,
    missing_value,
    truncated,
    nested,
    no_text,
    endless,
    journal_is_a_pipe,
    journal_is_a_folder,
    journal_is_a_link,
    store_is_a_link,
    no_journal,
    half_replaced,
    lock_is_a_folder,
    no_lock,
    frames_cut,
    frames_gone,
    frames_are_a_folder,
    frames_of_a_stranger,
    frames_with_more,
]
HARMLESS = {half_replaced, no_lock, None}


def assert_right(case):
    if case.name.endswith((".mp4", ".mov")):
        assert_shows(case.output, case.expected)
    else:
        assert (frames_in(case.output) == case.expected).all()


def test_damaged_journals(begun, tmp_path):
    """Every damage to every kind of output, either to one with a single window or to one with several."""
    outcomes, kind = [], NAMES.index(begun.name) + len(begun.plan.parts)
    for number, damage in enumerate([None, *DAMAGES]):
        if damage and (number + kind) % 2:
            continue
        case = Begun(tmp_path / str(number), *list(vars(begun).values())[1:])
        shutil.copytree(begun.home, case.home, symlinks=True)
        (case.store / "of others").write_text("keep me")
        what = damage.__name__ if damage else "none"
        if damage:
            damage(case, random.Random(f"{case.name} {len(case.plan.parts)} {number}"))
        outcome = bounded(case.resume)
        where = f"{case.name}, {len(case.plan.parts)} windows: {number} {what}: {outcome.error!r:.400}"
        outcome.check(where)
        if outcome.error is None:
            assert_right(case)
        else:
            assert damage not in HARMLESS, where
            assert str(case.home) in str(outcome.error), where
        others = [path for path in case.home.rglob("of others") if path.is_file()]
        assert [path.read_text() for path in others] == ["keep me"], where
        outcomes.append(outcome.error is None)
    assert outcomes[0] and 1 < sum(outcomes) < len(outcomes) - 4


def test_there_are_fifty():
    assert len(DAMAGES) * len(NAMES) * len(LIMITS) / 2 >= 50
