"""Outputs that a killed process left are continued: the same frames, none of them encoded twice."""

import os
import random
import shutil
import subprocess
import sys
import time
import wave
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from disk_use import watched

from mlx_vae_tiling.media import movie, npy
from mlx_vae_tiling.media.video import open_video, unfinished_frames

av = pytest.importorskip("av")

KILLS = int(os.environ.get("KILLS", 3))
"""Of each case of the slow test; those of whole decodes are in test_runtime_resume."""

FPS = Fraction(24000, 1001)
VIDEOS = {
    "h264": ("a.mp4", None),
    "hevc": ("a.mp4", "hevc"),
    "prores": ("a.mov", None),
    "mov": ("a.mov", "h264"),
}
IMAGES = {"npy": ("a.npy", None), "png": ("%04d.png", None)}
every_video = pytest.mark.parametrize(("name", "codec"), VIDEOS.values(), ids=VIDEOS.keys())
every_output = pytest.mark.parametrize(
    ("name", "codec"), (VIDEOS | IMAGES).values(), ids=(VIDEOS | IMAGES).keys()
)

PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[4])
from test_media_resume import FPS, picture
from mlx_vae_tiling.media.video import open_video

path, codec, count = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
with open_video(path, codec=codec, fps=FPS, resume=True) as video:
    print("kept", video.frames_kept, flush=True)
    for first in range(video.frames_kept, count, 5):
        video.write(picture(range(first, min(first + 5, count))))
        print("written", flush=True)
        time.sleep(0.01)
"""


def picture(numbers) -> np.ndarray:
    """Frames (f, 64, 96, 3) with a pattern that moves, some grain, and their number in black and white."""
    frames = []
    for number in numbers:
        y, x = np.mgrid[:64, :96]
        waves = np.stack([np.sin(x / 17 + y / 23 + 0.2 * number + k) for k in range(3)], axis=-1)
        frame = 128 + 80 * waves + np.random.default_rng(number).normal(0, 4, (64, 96, 1))
        bits = [(number >> bit) & 1 for bit in range(12)]
        frame[:8] = np.repeat(bits, 8)[None, :, None] * 255
        frames.append(np.clip(np.round(frame), 0, 255).astype(np.uint8))
    return np.stack(frames)


def numbers_of(frames: np.ndarray) -> list[int]:
    bits = frames[:, 2:6, :, 1].reshape(len(frames), 4, 12, 8)[..., 2:6].mean(axis=(1, 3)) > 127
    return [int(sum(int(bit) << place for place, bit in enumerate(row))) for row in bits]


def read(path, fps=FPS) -> tuple[np.ndarray, list[float]]:
    """Frames of a finished output and their times."""
    if str(path).endswith(".npy"):
        frames = np.load(path)
        return frames, [i / fps for i in range(len(frames))]
    if "%" in str(path):
        files = sorted(os.listdir(path.parent))
        images = [next(av.open(str(path.parent / file)).decode(video=0)).to_ndarray() for file in files]
        return np.stack(images), [i / fps for i in range(len(files))]
    with av.open(str(path), options={"err_detect": "explode"}) as container:
        decoded = list(container.decode(video=0))
    assert not any(frame.is_corrupt for frame in decoded)
    return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]), [float(f.time) for f in decoded]


def packets(path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(container.streams.video[0]) if packet.size]


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((first.astype(float) - second.astype(float)) ** 2)))


def check(path, count: int, reference: np.ndarray | None = None, fps=FPS) -> None:
    """A finished output holds frames 0 to count - 1, in order, in time, as good as an uninterrupted one."""
    frames, times = read(path, fps)
    assert numbers_of(frames) == list(range(count))
    assert times == pytest.approx([float(i / fps) for i in range(count)], abs=2e-4)
    source = picture(range(count))
    if path.suffix in (".mp4", ".mov"):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.frames == count
            assert float(stream.duration * stream.time_base) == pytest.approx(
                float(count / fps), abs=1e-3
            )  # edit lists count in milliseconds
            assert stream.average_rate == fps
            dts = [packet.dts for packet in container.demux(stream) if packet.size]
            assert all(before < after for before, after in pairwise(dts))
        if reference is not None:
            assert psnr(frames, source) > psnr(reference, source) - 0.3
            worst = min(psnr(frame, truth) for frame, truth in zip(frames, source, strict=True))
            assert worst > min(psnr(frame, truth) for frame, truth in zip(reference, source, strict=True)) - 2
    else:
        np.testing.assert_array_equal(frames, source)
    if path.suffix == ".npy":
        assert path.stat().st_size == source.nbytes + 128
    assert not [file for file in os.listdir(path.parent) if "partial" in file]


def options(name, codec, fps=FPS) -> dict:
    return {"codec": codec, "fps": fps} if name.endswith((".mp4", ".mov")) else {}


def killed(path, codec, count: int, fps=FPS) -> None:
    """Leave beside `path` what a process leaves that is killed after `count` frames."""
    copy = path.parent / "copy"
    copy.mkdir()

    def batches():
        yield picture(range(count))
        for file in path.parent.glob("*.partial.*"):
            shutil.copy(file, copy)

    open_video(path, **options(path.name, codec, fps))._save(batches())
    for file in path.parent.glob("*.partial.*"):
        file.unlink()
    for file in copy.iterdir():
        shutil.move(file, path.parent)
    copy.rmdir()


@every_output
def test_what_a_kill_left_is_continued(tmp_path, name, codec):
    path = tmp_path / name
    (tmp_path / "whole").mkdir()
    with open_video(tmp_path / "whole" / name, **options(name, codec)) as video:
        video.write(picture(range(150)))
    assert numbers_of(read(tmp_path / "whole" / name)[0]) == list(range(150))
    reference = read(tmp_path / "whole" / name)[0]
    shutil.rmtree(tmp_path / "whole")
    killed(path, codec, 130)
    with open_video(path, resume=True, **options(name, codec)) as video:
        kept = video.frames_kept
        assert 48 <= kept <= 130
        kept_packets = (
            packets(tmp_path / f"a.partial{path.suffix}")[:kept] if codec or name == "a.mp4" else []
        )
        video.write(picture(range(kept, 150)))
    check(path, 150, reference)
    if kept_packets:  # not encoded again
        assert [len(packet) for packet in packets(path)[:kept]] == [len(packet) for packet in kept_packets]
        assert packets(path)[:kept] == kept_packets


@every_video
def test_a_file_cut_anywhere_is_continued(tmp_path, name, codec):
    fps = Fraction(4)  # 8 frames in a group of pictures
    killed(tmp_path / name, codec, 48, fps)
    partial = tmp_path / f"a.partial{os.path.splitext(name)[1]}"
    whole, draw = partial.read_bytes(), random.Random(0)
    counts = []
    for cut in sorted([0, 1, 40, 90, *(draw.randrange(len(whole)) for _ in range(7)), len(whole)]):
        (tmp_path / name).unlink(missing_ok=True)
        partial.write_bytes(whole[:cut])
        with open_video(tmp_path / name, resume=True, **options(name, codec, fps)) as video:
            counts.append(video.frames_kept)
            video.write(picture(range(video.frames_kept, 50)))
        check(tmp_path / name, 50, fps=fps)
    assert counts == sorted(counts)
    assert counts[:3] == [0, 0, 0]
    assert len(set(counts)) >= 3


@every_video
def test_every_cut_leaves_something_that_can_be_read(tmp_path, name, codec):
    killed(tmp_path / name, codec, 80, Fraction(4))
    partial = next(tmp_path.glob("*.partial.*"))
    whole, begins, at = partial.read_bytes(), [], 0
    while at < len(whole):
        begins.append(at)
        at += int.from_bytes(whole[at : at + 4], "big")
    begins = begins[:8] + begins[-4:]
    counts = []
    for cut in sorted({cut for begin in begins for cut in range(max(0, begin - 2), begin + 20)}):
        partial.write_bytes(whole[:cut])
        counts.append((unfinished_frames(tmp_path / name) or ("", 0))[1])
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] > 20


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_packets_are_kept_up_to_the_first_missing_frame(tmp_path, monkeypatch, codec):
    with monkeypatch.context() as patch:  # fragments that end within a group of pictures
        patch.setattr(movie, "_MUXER_OPTIONS", {**movie._MUXER_OPTIONS, "frag_duration": "200000"})
        killed(tmp_path / "a.mp4", codec, 120)
    partial, kept = tmp_path / "a.partial.mp4", set()
    whole = partial.read_bytes()
    for cut in range(len(whole) // 2, len(whole) + 1, len(whole) // 14):
        (tmp_path / "a.mp4").unlink(missing_ok=True)
        partial.write_bytes(whole[:cut])
        with open_video(tmp_path / "a.mp4", codec=codec, fps=FPS, resume=True) as video:
            kept.add(video.frames_kept)
            video.write(picture(range(video.frames_kept, 122)))
        check(tmp_path / "a.mp4", 122)
    assert len(kept) > 3


def test_frames_are_flushed_to_the_disk_every_half_second(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(movie, "flush_to_disk", flushed.append)
    with open_video(tmp_path / "a.mp4", fps=10) as video:
        video.write(picture(range(100)))
    assert len(flushed) == 20


@pytest.mark.parametrize("missing", [0, 1, 500])
@every_video
def test_killed_while_the_file_was_being_closed(tmp_path, name, codec, missing):
    killed(tmp_path / name, codec, 80, Fraction(4))
    partial = tmp_path / f"a.partial{os.path.splitext(name)[1]}"
    growing = partial.read_bytes()
    with (
        pytest.raises(KeyboardInterrupt),
        open_video(tmp_path / name, overwrite=True, **options(name, codec, Fraction(4))) as video,
    ):
        video.write(picture(range(80)))
        raise KeyboardInterrupt
    closed = partial.read_bytes()
    begin = growing.index(b"moov") - 4
    assert closed[begin : begin + 8] == growing[begin : begin + 8]  # hidden in the data of a closed file
    # The table of all frames is written behind the fragments before they are hidden.
    partial.write_bytes(growing[:begin] + closed[begin : len(closed) - missing])
    with open_video(tmp_path / name, resume=True, **options(name, codec, Fraction(4))) as video:
        assert video.frames_kept == 80
    check(tmp_path / name, 80, fps=Fraction(4))


@pytest.mark.parametrize(("old", "new", "kept"), [(80, 60, 80), (60, 80, 80), (60, 0, 60), (0, 60, 60)])
def test_a_killed_continuation_never_loses_what_there_was(tmp_path, old, new, kept):
    for count, target in ((old, "a.partial.mp4"), (new, "a.partial.partial.mp4")):
        (tmp_path / target).write_bytes(b"")
        if count:
            (tmp_path / str(count)).mkdir()
            with (
                pytest.raises(KeyboardInterrupt),
                open_video(tmp_path / str(count) / "a.mp4", fps=FPS) as video,
            ):
                video.write(picture(range(count)))
                raise KeyboardInterrupt
            os.replace(tmp_path / str(count) / "a.partial.mp4", tmp_path / target)
            (tmp_path / str(count)).rmdir()
    with open_video(tmp_path / "a.mp4", fps=FPS, resume=True) as video:
        assert video.frames_kept == kept
        video.write(picture(range(kept, 82)))
    check(tmp_path / "a.mp4", 82)


def test_what_a_continued_file_keeps_lies_there_until_it_is_overtaken(tmp_path):
    killed(tmp_path / "a.mp4", None, 130)
    video = open_video(tmp_path / "a.mp4", fps=FPS, resume=True)
    before, seen = video.frames_kept, []

    def batches():
        for first in range(before, before + 240, 5):
            yield picture(range(first, first + 5))
            files = sorted(os.listdir(tmp_path))
            copies = tmp_path / "copies"
            copies.mkdir()
            for file in files:
                shutil.copy(tmp_path / file, copies)
            taken = sum(os.path.getsize(tmp_path / file) for file in files)
            seen.append((len(files), unfinished_frames(copies / "a.mp4")[1], taken))
            shutil.rmtree(copies)

    video._save(batches())
    files, kept, taken = zip(*seen, strict=True)
    assert max(taken) <= 2 * os.path.getsize(tmp_path / "a.partial.mp4")
    assert min(kept) >= before
    assert list(kept) == sorted(kept)
    assert (files[0], files[-1]) == (2, 1)


@pytest.mark.parametrize(("old", "new"), [(130, 131), (130, 300)])
@pytest.mark.parametrize(("name", "codec"), [VIDEOS["h264"], VIDEOS["prores"]])
def test_the_disk_never_holds_more_than_twice_a_continued_video(tmp_path, name, codec, old, new, monkeypatch):
    killed(tmp_path / name, codec, old)
    with monkeypatch.context() as patch:
        taken = watched(tmp_path, patch)
        with open_video(tmp_path / name, resume=True, **options(name, codec)) as video:
            for first in range(video.frames_kept, new, 5):
                video.write(picture(range(first, min(first + 5, new))))
    assert os.listdir(tmp_path) == [name]
    assert len(taken) > 50 and max(taken) <= 2 * os.path.getsize(tmp_path / name)


def test_the_disk_has_the_frames_before_the_header_counts_them(tmp_path, monkeypatch):
    flushed = []

    def flush(file):
        header = np.load(tmp_path / "a.partial.npy", mmap_mode="r").shape[0]
        frames = (os.path.getsize(tmp_path / "a.partial.npy") - 128) // (64 * 96 * 3)
        flushed.append((header, frames))

    monkeypatch.setattr(npy, "flush_to_disk", flush)
    with open_video(tmp_path / "a.npy") as video:
        video.write(picture(range(3)))
        video.write(picture(range(3, 5)))
    assert flushed == [(0, 3), (3, 3), (3, 5), (5, 5)]


@pytest.mark.parametrize("extra", [0, 1, 1000, 64 * 96 * 3, 64 * 96 * 3 * 4 + 5])
def test_an_array_keeps_what_its_header_counts(tmp_path, extra):
    killed(tmp_path / "a.npy", None, 20)
    with open(tmp_path / "a.partial.npy", "ab") as file:
        file.write(b"\x55" * extra)
    with open_video(tmp_path / "a.npy", resume=True) as video:
        assert video.frames_kept == 20
        video.write(picture(range(20, 23)))
    check(tmp_path / "a.npy", 23)


@pytest.mark.parametrize(("missing", "kept"), [(1, 19), (64 * 96 * 3 * 5, 15), (10**9, 0)])
def test_an_array_that_lacks_frames_keeps_the_whole_ones(tmp_path, missing, kept):
    killed(tmp_path / "a.npy", None, 20)
    partial = tmp_path / "a.partial.npy"
    os.truncate(partial, max(0, partial.stat().st_size - missing))
    with open_video(tmp_path / "a.npy", resume=True) as video:
        assert video.frames_kept == kept
        video.write(picture(range(kept, 23)))
    check(tmp_path / "a.npy", 23)


@pytest.mark.parametrize("count", range(126, 134))
@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_no_frame_is_lost_at_the_end(tmp_path, codec, count):
    with open_video(tmp_path / "a.mp4", codec=codec, fps=FPS) as video:
        video.write(picture(range(count)))
    check(tmp_path / "a.mp4", count)


@every_output
def test_nothing_but_the_end_was_missing(tmp_path, name, codec):
    with pytest.raises(KeyboardInterrupt), open_video(tmp_path / name, **options(name, codec)) as video:
        video.write(picture(range(30)))
        raise KeyboardInterrupt
    assert unfinished_frames(tmp_path / name)[1] == 30
    with open_video(tmp_path / name, resume=True, **options(name, codec)) as video:
        assert video.frames_kept == 30
    check(tmp_path / name, 30)
    assert unfinished_frames(tmp_path / name) is None


@every_video
def test_a_closed_video_that_lacks_nothing_is_only_renamed(tmp_path, name, codec):
    with pytest.raises(KeyboardInterrupt), open_video(tmp_path / name, **options(name, codec)) as video:
        video.write(picture(range(30)))
        raise KeyboardInterrupt
    closed = (tmp_path / f"a.partial{os.path.splitext(name)[1]}").stat()
    with open_video(tmp_path / name, resume=True, **options(name, codec)):
        pass
    assert (tmp_path / name).stat().st_ino == closed.st_ino
    check(tmp_path / name, 30)


@pytest.mark.parametrize("with_sound", [False, True])
def test_a_closed_video_gets_the_sound_that_it_is_continued_with(tmp_path, with_sound):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0\1" * 8000)
    sound = {"audio": tmp_path / "sound.wav", "clip_seconds": 1.0}
    before, after = ({}, sound) if with_sound else (sound, {})
    with pytest.raises(KeyboardInterrupt), open_video(tmp_path / "a.mp4", fps=24, **before) as video:
        video.write(picture(range(24)))
        raise KeyboardInterrupt
    with open_video(tmp_path / "a.mp4", fps=24, resume=True, **after) as video:
        assert video.frames_kept == 24
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(container.streams.audio) == with_sound
    check(tmp_path / "a.mp4", 24, fps=Fraction(24))


@every_output
def test_interrupted_again_and_again(tmp_path, name, codec):
    for end in (1, 2, 9, 40, 41, 100):
        with (
            pytest.raises(KeyboardInterrupt),
            open_video(tmp_path / name, resume=True, **options(name, codec)) as video,
        ):
            video.write(picture(range(video.frames_kept, end)))
            raise KeyboardInterrupt
        assert unfinished_frames(tmp_path / name)[1] == end
    with open_video(tmp_path / name, resume=True, **options(name, codec)) as video:
        video.write(picture(range(100, 101)))
    check(tmp_path / name, 101)


CHANGES = {
    "rate": ("a.mp4", {}, {"fps": 25}, "u1", (64, 96)),
    "rate of prores": ("a.mov", {}, {"fps": 25}, "u1", (64, 96)),
    "codec": ("a.mp4", {}, {"codec": "hevc"}, "u1", (64, 96)),
    "quality": ("a.mp4", {"quality": 18}, {"quality": 30}, "u1", (64, 96)),
}


@pytest.mark.parametrize(("name", "before", "after", "dtype", "size"), CHANGES.values(), ids=CHANGES.keys())
def test_other_settings_are_refused_at_once(tmp_path, name, before, after, dtype, size):
    with pytest.raises(KeyboardInterrupt), open_video(tmp_path / name, **before) as video:
        video.write(picture(range(8)))
        raise KeyboardInterrupt
    partial = tmp_path / f"a.partial{os.path.splitext(name)[1]}"
    content = partial.read_bytes()
    with pytest.raises(ValueError, match=r"a\.partial\.m.* was begun with another.*overwrite=True"):
        open_video(tmp_path / name, resume=True, **after)
    assert partial.read_bytes() == content


@every_output
@pytest.mark.parametrize(("size", "dtype"), [((64, 98), "u1"), ((66, 96), "u1"), ((64, 96), "u2")])
def test_other_frames_are_refused(tmp_path, name, codec, size, dtype):
    if dtype == "u2" and codec != "hevc" and name in ("a.mp4", "a.mov"):
        size = (66, 98)  # H.264 and ProRes have the same pictures from 8 and 16 bits
    with pytest.raises(KeyboardInterrupt), open_video(tmp_path / name, **options(name, codec)) as video:
        video.write(picture(range(8)))
        raise KeyboardInterrupt
    with (
        pytest.raises(ValueError, match=r"partial.* was begun with .* got .*overwrite=True"),
        open_video(tmp_path / name, resume=True, **options(name, codec)) as video,
    ):
        video.write(np.zeros((1, *size, 3), dtype))
    with open_video(tmp_path / name, resume=True, **options(name, codec)) as video:
        assert video.frames_kept == 8
        video.write(picture(range(8, 10)))
    check(tmp_path / name, 10)


def start(path, codec, count) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, path, codec or "", count, os.path.dirname(__file__)]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)


def run_and_kill(path, codec, count, draw) -> tuple[int, bool]:
    """How many frames the process found, and whether it was killed before it had ended."""
    with start(path, codec, count) as process:
        kept = int(process.stdout.readline().split()[1])
        for _ in range(draw.randrange(count // 5)):
            process.stdout.readline()
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
    return kept, process.returncode != 0


@pytest.mark.slow
@every_output
def test_kill_and_continue(tmp_path, name, codec):
    count, draw, kills, inside = 400, random.Random(1), 0, 0
    (tmp_path / "whole").mkdir()
    with start(tmp_path / "whole" / name, codec, count) as process:
        process.communicate()
    reference, _ = read(tmp_path / "whole" / name)
    largest = sum(file.stat().st_size for file in (tmp_path / "whole").iterdir())
    while kills < KILLS:
        folder, before = tmp_path / str(kills), 0
        folder.mkdir()
        while True:
            kept, was_killed = run_and_kill(folder / name, codec, count, draw)
            assert kept >= before
            before = kept
            kills += was_killed
            inside += kept > 0
            assert sum(file.stat().st_size for file in folder.iterdir()) <= 2.1 * largest + 4096
            partial = [file for file in os.listdir(folder) if "partial" in file]
            if not was_killed or (os.listdir(folder) and not partial):
                break
        check(folder / name, count, reference)
        shutil.rmtree(folder)
    assert inside > KILLS / 4
