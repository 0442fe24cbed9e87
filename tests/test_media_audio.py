"""The sound of a clip beside its pictures: copied or encoded, shifted, cut, and checked for its length."""

import os
import subprocess
import sys
import textwrap
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mlx_vae_tiling.media.audio import open_sound
from mlx_vae_tiling.media.video import open_video

av = pytest.importorskip("av")

FPS = 24
COPIED = {
    ("wav", "a.mov"): "pcm_s16le",
    ("wav", "a.mp4"): "aac",
    ("m4a", "a.mp4"): "aac",
    ("m4a", "a.mov"): "aac",
    ("flac", "a.mp4"): "flac",
    ("flac", "a.mov"): "aac",
    ("mp3", "a.mp4"): "mp3",
    ("mkv", "a.mp4"): "aac",
    ("aac", "a.mp4"): "aac",
    ("opus", "a.mp4"): "opus",
    ("opus", "a.mov"): "aac",
}


def chirp(seconds: float, rate: int = 48000, channels: int = 2) -> np.ndarray:
    """(channels, samples) in [-1, 1]: a tone whose pitch says the time, with a click every quarter second."""
    t = np.arange(round(seconds * rate)) / rate
    tone = 0.4 * np.sin(2 * np.pi * (200 * t + 60 * t**2))
    tone[(np.arange(len(t)) % (rate // 4)) < rate // 200] += 0.4
    return np.stack([tone, 0.5 * tone][:channels])


def save_sound(path: Path, samples: np.ndarray, rate: int = 48000, late: float = 0) -> Path:
    """Write .wav with the wave module, .m4a, .flac, .mp3 and .mkv (AAC beside a picture) with PyAV."""
    integers = np.round(samples * 32767).astype("<i2")
    if path.suffix == ".wav":
        with wave.open(str(path), "wb") as file:
            file.setparams((len(samples), 2, rate, 0, "NONE", ""))
            file.writeframes(integers.T.tobytes())
        return path
    codec = {".flac": "flac", ".mp3": "libmp3lame", ".opus": "libopus"}.get(path.suffix, "aac")
    layout = "stereo" if len(samples) == 2 else "mono"
    with av.open(str(path), "w") as container:
        if path.suffix == ".mkv":
            picture = container.add_stream("libx264", rate=1, width=32, height=32, pix_fmt="yuv420p")
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(integers.T.reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, round(late * rate), Fraction(1, rate)
        if path.suffix == ".mkv":
            image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
            container.mux([*picture.encode(image), *picture.encode(None)])
        resampler = av.AudioResampler(stream.codec_context.format.name, layout, rate)
        for converted in resampler.resample(frame):
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    return path


def read_sound(path, rate: int = 48000) -> tuple[str, np.ndarray, float]:
    """Codec, samples (channels, n) as a player gives them out, and the time of the first."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        frames = list(container.decode(stream))
        begin = float(frames[0].pts * frames[0].time_base)
        resampler = av.AudioResampler("fltp", stream.codec_context.layout.name, rate)
        pieces = [piece.to_ndarray() for frame in [*frames, None] for piece in resampler.resample(frame)]
        return stream.codec_context.codec.canonical_name, np.concatenate(pieces, axis=1), begin


def write_video(path, count: int, audio, **options) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    with open_video(path, fps=FPS, audio=audio, **options) as video:
        for first in range(video.frames_kept, count, 10):
            video.write(frames[first : first + 10])


def misplaced(found: np.ndarray, begin: float, expected: np.ndarray, rate: int = 48000) -> tuple[int, float]:
    """By how many samples what is heard lags what should be, and their correlation then."""
    shift = round(begin * rate)
    heard = np.zeros(expected.shape[1])
    n = min(found.shape[1], expected.shape[1] - max(shift, 0))
    heard[max(shift, 0) : max(shift, 0) + n] = found[0, max(-shift, 0) : max(-shift, 0) + n][: len(heard)]
    spectrum = np.fft.rfft(heard, 2 * len(heard)) * np.conj(np.fft.rfft(expected[0], 2 * len(heard)))
    lags = np.fft.irfft(spectrum)
    lag = int(np.argmax(lags))
    lag = lag if lag < len(heard) else lag - 2 * len(heard)
    return lag, float(np.corrcoef(np.roll(heard, -lag), expected[0])[0, 1])


@pytest.mark.parametrize(("kind", "name"), COPIED)
@pytest.mark.parametrize("start", [0.0, 0.75, 1.0 + 1 / 3])
def test_sound_is_in_its_place(tmp_path, kind, name, start):
    sound = save_sound(tmp_path / f"s.{kind}", chirp(4))
    write_video(tmp_path / name, 48, sound, audio_start_seconds=np.float32(start), clip_seconds=4)
    codec, found, begin = read_sound(tmp_path / name)
    assert codec == COPIED[kind, name]
    first = round(start * 48000)
    expected = chirp(4)[:, first : first + 2 * 48000]
    lag, likeness = misplaced(found, begin, expected)
    # An .aac file does not say that its encoder began 1024 samples early; .mkv counts in milliseconds.
    assert abs(lag - (1024 if kind == "aac" else 0)) <= (48 if kind == "mkv" else 2)
    assert likeness > 0.98
    assert found.shape[1] / 48000 + begin == pytest.approx(2, abs=0.05)
    with av.open(str(tmp_path / name)) as container:
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx(
            [i / FPS for i in range(48)], abs=1e-3
        )


def test_copied_packets_are_the_same_bytes(tmp_path):
    sound = save_sound(tmp_path / "s.m4a", chirp(3))
    write_video(tmp_path / "a.mp4", 48, sound, clip_seconds=3)

    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(audio=0) if packet.size]

    copied = packets(tmp_path / "a.mp4")
    assert len(copied) == pytest.approx(2 * 48000 / 1024, abs=2)
    assert packets(sound)[: len(copied)] == copied
    write_video(tmp_path / "b.mp4", 24, sound, audio_start_seconds=1, clip_seconds=3)
    copied = packets(tmp_path / "b.mp4")
    assert len(copied) == pytest.approx(48000 / 1024, abs=3)  # one before the start, parts of two
    assert b"".join(copied) in b"".join(packets(sound))


def test_sound_that_begins_later_than_its_pictures(tmp_path):
    sound = save_sound(tmp_path / "s.mkv", chirp(1.5), late=0.5)
    write_video(tmp_path / "a.mp4", 48, sound)
    _, found, begin = read_sound(tmp_path / "a.mp4")
    expected = np.concatenate([np.zeros((2, 24000)), chirp(1.5)], axis=1)
    lag, likeness = misplaced(found, begin, expected)
    assert abs(lag) <= 48
    assert likeness > 0.98


def test_names_with_colons_are_local_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.rename(save_sound(tmp_path / "s.wav", chirp(1)), "file:s.wav")
    write_video("tee:a.mp4", 24, "file:s.wav")
    assert sorted(os.listdir()) == ["file:s.wav", "tee:a.mp4"]


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
@pytest.mark.parametrize("kind", ["wav", "m4a"])
def test_sound_that_begins_later(tmp_path, name, kind):
    sound = save_sound(tmp_path / f"s.{kind}", chirp(1.5))
    write_video(tmp_path / name, 48, sound, audio_start_seconds=-0.5, clip_seconds=1.5)
    _, found, begin = read_sound(tmp_path / name)
    expected = np.concatenate([np.zeros((2, 24000)), chirp(1.5)], axis=1)
    lag, likeness = misplaced(found, begin, expected)
    assert abs(lag) <= 2
    assert likeness > 0.98


@pytest.mark.parametrize(("rate", "channels"), [(44100, 2), (22050, 1), (48000, 1), (192000, 2), (37000, 2)])
def test_rates_and_channels(tmp_path, rate, channels):
    sound = save_sound(tmp_path / "s.wav", chirp(2, rate, channels), rate)
    write_video(tmp_path / "a.mp4", 48, sound)
    codec, found, begin = read_sound(tmp_path / "a.mp4")
    assert (codec, len(found)) == ("aac", channels)
    lag, likeness = misplaced(found, begin, chirp(2, 48000, channels))
    assert abs(lag) <= 2
    assert likeness > 0.98


def test_the_container_decides(tmp_path):
    wav = save_sound(tmp_path / "s.wav", chirp(1))
    assert open_sound(wav, 0, ".mov").copied
    assert not open_sound(wav, 0, ".mp4").copied
    assert open_sound(wav, 0, ".mp4").seconds == pytest.approx(1)


LENGTHS = {
    "longer": (3.0, 0.0, None, r"s\.wav has 3\.00 s of sound for a clip of 2\.00 s: what is over is cut off"),
    "shorter": (1.0, 0.0, None, r"s\.wav has 1\.00 s of sound for a clip of 2\.00 s: the end is silent"),
    "shorter than the clip": (3.0, 1.0, 4.0, r"3\.00 s of sound for a clip of 4\.00 s: the end is silent"),
    "ends early": (3.0, 2.0, None, r"3\.00 s of sound for a clip of 4\.00 s"),
}


@pytest.mark.parametrize(("seconds", "start", "clip", "message"), LENGTHS.values(), ids=LENGTHS.keys())
def test_a_length_that_does_not_fit_is_warned_of(tmp_path, seconds, start, clip, message):
    sound = save_sound(tmp_path / "s.wav", chirp(seconds))
    with pytest.warns(UserWarning, match=message) as caught:
        write_video(tmp_path / "a.mp4", 48, sound, audio_start_seconds=start, clip_seconds=clip)
    assert len(caught) == 1
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].frames == 48
        length = float(container.streams.audio[0].duration * container.streams.audio[0].time_base)
    assert length == pytest.approx(min(2, seconds - start), abs=0.05)


def test_a_fitting_length_is_not(tmp_path):
    sound = save_sound(tmp_path / "s.wav", chirp(4.05))
    write_video(tmp_path / "a.mp4", 24, sound, audio_start_seconds=1.5, clip_seconds=4)
    write_video(tmp_path / "b.mp4", 96, sound)


@pytest.mark.parametrize("kind", ["wav", "m4a"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_sound_of_a_continued_video(tmp_path, kind, name):
    sound = save_sound(tmp_path / f"s.{kind}", chirp(6))
    frames = np.random.default_rng(0).integers(0, 256, (120, 32, 32, 3), np.uint8)
    options = {"fps": FPS, "audio": sound, "audio_start_seconds": 0.5, "clip_seconds": 6}
    for end in (50, 51, 100):
        with pytest.raises(KeyboardInterrupt), open_video(tmp_path / name, resume=True, **options) as video:
            video.write(frames[video.frames_kept : end])
            raise KeyboardInterrupt
    with open_video(tmp_path / name, resume=True, **options) as video:
        assert video.frames_kept == 100
        video.write(frames[100:])
    _, found, begin = read_sound(tmp_path / name)
    lag, likeness = misplaced(found, begin, chirp(6)[:, 24000 : 24000 + 5 * 48000])
    assert abs(lag) <= 2
    assert likeness > 0.98
    with av.open(str(tmp_path / name)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([i / FPS for i in range(120)], abs=1e-3)


def test_short_sound_does_not_hold_pictures_back(tmp_path):
    sound = save_sound(tmp_path / "s.wav", chirp(1))
    script = """
        import os, sys
        import numpy as np
        from mlx_vae_tiling.media.video import open_video
        frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
        video = open_video(sys.argv[1], fps=24, audio=sys.argv[2], clip_seconds=1)
        for _ in range(60):
            video.write(frames)
        while video._queue.qsize(): pass
        os._exit(9)
    """
    path = str(tmp_path / "a.mp4")
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script), path, sound]).returncode == 9
    with open_video(path, fps=24, resume=True, audio=sound, clip_seconds=1) as video:
        assert video.frames_kept >= 144
    assert len(os.listdir(tmp_path)) == 2


FAILURES = {
    "missing": ("gone.wav", b"", {}, FileNotFoundError, r"no such file with sound: '.*gone\.wav'"),
    "folder": (".", b"", {}, ValueError, "audio must be a file with sound"),
    "text": ("s.wav", b"hello, this is no sound", {}, ValueError, r"s\.wav cannot be read"),
    "empty": ("s.wav", b"", {}, ValueError, r"s\.wav cannot be read"),
    "numpy start": (
        "no.wav",
        b"",
        {"audio_start_seconds": np.float32(1)},
        ValueError,
        r"no\.wav cannot be read",
    ),
    "start": ("ok.wav", None, {"audio_start_seconds": float("nan")}, ValueError, "must be a number, got nan"),
    "text start": ("ok.wav", None, {"audio_start_seconds": "x"}, ValueError, "must be a number, got 'x'"),
}


@pytest.mark.parametrize(
    ("name", "content", "options", "kind", "message"), FAILURES.values(), ids=FAILURES.keys()
)
def test_what_has_no_sound_is_refused_at_once(tmp_path, name, content, options, kind, message):
    if content is None:
        save_sound(tmp_path / name, chirp(1))
    elif not name.startswith(("gone", ".")):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message):
        open_video(tmp_path / "a.mp4", audio=tmp_path / name, **options)
    assert not (tmp_path / "a.partial.mp4").exists()


def test_a_video_without_sound_the_output_itself_and_arrays(tmp_path):
    write_video(tmp_path / "a.mp4", 3, None)
    with pytest.raises(ValueError, match=r"a\.mp4 has none"):
        open_video(tmp_path / "b.mp4", audio=tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="another file than the output"):
        open_video(tmp_path / "a.mp4", audio=tmp_path / "a.mp4", overwrite=True)
    with pytest.raises(ValueError, match=r"audio is for \.mp4 and \.mov"):
        open_video(tmp_path / "a.npy", audio=tmp_path / "a.mp4")


def test_a_start_in_the_far_past_is_silence(tmp_path):
    sound = save_sound(tmp_path / "s.wav", chirp(1))
    write_video(tmp_path / "a.mp4", 24, sound, audio_start_seconds=-1e9, clip_seconds=1)
    _, found, begin = read_sound(tmp_path / "a.mp4")
    assert found.shape[1] / 48000 + begin == pytest.approx(1, abs=0.05)
    assert np.abs(found).max() < 1e-3
