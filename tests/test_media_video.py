import os
import subprocess
import sys
import textwrap
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_vae_tiling.media import encoders
from mlx_vae_tiling.media.video import frame_rate, open_video
from mlx_vae_tiling.media.writer import VideoWriter

av = pytest.importorskip("av")

# Suffix, codec, dtype of the frames, and what the file must be.
VIDEOS = {
    "h264": ("a.mp4", None, "u1", ("h264", "yuv420p", "avc1")),
    "h264 from 16 bits": ("a.mp4", "h264", "u2", ("h264", "yuv420p", "avc1")),
    "h264 in mov": ("a.mov", "h264", "u1", ("h264", "yuv420p", "avc1")),
    "hevc": ("a.mp4", "hevc", "u1", ("hevc", "yuv420p", "hvc1")),
    "hevc 10 bits": ("a.mp4", "hevc", "u2", ("hevc", "yuv420p10le", "hvc1")),
    "prores": ("a.mov", None, "u2", ("prores", "yuv422p10le", "apch")),
    "prores from 8 bits": ("a.mov", "prores", "u1", ("prores", "yuv422p10le", "apch")),
}
every_video = pytest.mark.parametrize(("name", "codec", "dtype", "made"), VIDEOS.values(), ids=VIDEOS.keys())


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    assert [thread for thread in threading.enumerate() if thread.name.startswith("write ")] == []


def levels(unit: np.ndarray, dtype: str) -> np.ndarray:
    return np.round(unit * np.iinfo(dtype).max).astype(dtype)


def moving_waves(frames: int, height: int, width: int) -> np.ndarray:
    """Smooth frames in [0, 1] that reach every saturated colour."""
    t, y, x = np.mgrid[:frames, :height, :width]
    waves = [np.sin(x / (23 + 7 * k) + y / (31 - 5 * k) + 0.2 * t + 2 * k) for k in range(3)]
    return np.clip(0.5 + 0.6 * np.stack(waves, axis=-1), 0, 1)


def patches() -> np.ndarray:
    """(8, 8, 3) colours in [0, 1]: the corners of the cube, greys, and random ones."""
    corners = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1]), axis=-1).reshape(8, 3)
    greys = np.repeat(np.linspace(0, 1, 8)[:, None], 3, axis=1)
    return np.concatenate([corners, greys, np.random.default_rng(0).random((48, 3))]).reshape(8, 8, 3)


def bt709(rgb: np.ndarray, bits: int) -> np.ndarray:
    """ITU-R BT.709, section 3 and 4: R'G'B' in [0, 1] to limited-range Y'CbCr."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
    scaled = 219 * luma + 16, 224 * (b - luma) / 1.8556 + 128, 224 * (r - luma) / 1.5748 + 128
    return np.stack(scaled, axis=-1) * 2 ** (bits - 8)


def inverse_bt709(ycbcr: np.ndarray, bits: int) -> np.ndarray:
    luma, cb, cr = np.moveaxis(ycbcr / 2 ** (bits - 8), -1, 0)
    luma, cb, cr = (luma - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
    r, b = luma + 1.5748 * cr, luma + 1.8556 * cb
    return np.clip(np.stack([r, (luma - 0.2126 * r - 0.0722 * b) / 0.7152, b], axis=-1), 0, 1)


def resize(plane: np.ndarray, size: int, offset: float) -> np.ndarray:
    """Linear interpolation of the last axis; sample i lies at i * step + offset of the result."""
    step = size // plane.shape[-1]
    at = (np.arange(size) - offset) / step
    low = np.clip(np.floor(at).astype(int), 0, plane.shape[-1] - 1)
    high = np.clip(low + 1, 0, plane.shape[-1] - 1)
    return plane[..., low] + np.clip(at - low, 0, 1) * (plane[..., high] - plane[..., low])


def planes(frame) -> np.ndarray:
    """(H, W, 3) Y'CbCr of a decoded frame; chroma lies at even columns and between rows."""
    dtype = "u1" if frame.format.components[0].bits == 8 else "<u2"
    full = []
    for plane in frame.planes:
        samples = np.frombuffer(plane, dtype).reshape(plane.height, -1)[:, : plane.width].astype(np.float64)
        rows = resize(samples, frame.width, 0.0).T
        full.append(resize(rows, frame.height, 0.5 if plane.height < frame.height else 0.0).T)
    return np.stack(full, axis=-1)


def read(path):
    """Frames of a file, decoded, and what its stream says."""
    with av.open(os.fspath(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        frames = list(container.decode(stream))
        return frames, SimpleNamespace(
            form=(codec.name, codec.pix_fmt, codec.codec_tag),
            frames=stream.frames,
            rate=stream.average_rate,
            tags=[int(tag) for tag in (codec.colorspace, codec.color_primaries, codec.color_trc)],
        )


def read_rgb(path) -> np.ndarray:
    frames, _ = read(path)
    return np.stack([inverse_bt709(planes(f), f.format.components[0].bits) for f in frames])


def write(path, frames, step=7, **options) -> None:
    with open_video(path, **options) as video:
        for begin in range(0, len(frames), step):
            video.write(frames[begin : begin + step])


@every_video
def test_read_back_is_near_and_complete(tmp_path, name, codec, dtype, made, capfd):
    frames = levels(moving_waves(20, 128, 192), dtype)
    quality = None if made[0] == "prores" else 8
    write(tmp_path / name, frames, codec=codec, fps="24000/1001", quality=quality)
    decoded, stream = read(tmp_path / name)
    assert stream.form == made
    assert (stream.frames, stream.rate) == (20, Fraction(24000, 1001))
    assert [float(f.time) for f in decoded] == pytest.approx([i * 1001 / 24000 for i in range(20)], abs=1e-4)
    error = read_rgb(tmp_path / name) - frames / np.iinfo(dtype).max
    assert np.abs(error).mean() * 255 < 1
    assert np.abs(error.mean(axis=(0, 1, 2))).max() * 255 < 0.3
    assert capfd.readouterr() == ("", "")


@every_video
def test_colours_are_bt709_and_tagged_so(tmp_path, name, codec, dtype, made):
    colours = levels(patches(), dtype)
    frame = colours.repeat(32, axis=0).repeat(32, axis=1)
    quality = None if made[0] == "prores" else 1
    write(tmp_path / name, frame[None].repeat(3, axis=0), codec=codec, quality=quality)
    decoded, stream = read(tmp_path / name)
    assert stream.tags == [1, 1, 1]
    assert [int(decoded[0].colorspace), int(decoded[0].color_range)] == [1, 1]
    bits = decoded[0].format.components[0].bits
    found = planes(decoded[0])[16::32, 16::32]
    expected = bt709(colours / np.iinfo(dtype).max, bits)
    # Rounding, and what the finest quantiser leaves of it: 1.5 levels of 8 bits.
    np.testing.assert_allclose(found, expected, atol=1.5 * 2 ** (bits - 8))


def test_16_bits_are_not_cut_to_8(tmp_path):
    ramp = np.linspace(0.4, 0.41, 256)[None, :, None].repeat(128, axis=0).repeat(3, axis=2)
    write(tmp_path / "a.mov", levels(ramp, "u2")[None])
    luma = planes(read(tmp_path / "a.mov")[0][0])[..., 0]
    assert len(np.unique(np.round(luma.mean(axis=0)))) >= 8  # 876 * 0.01 levels of 10 bits, 2 of 8 bits
    np.testing.assert_allclose(luma.mean(axis=0), bt709(ramp[0], 10)[:, 0], atol=1)


@pytest.mark.parametrize("size", [(1, 1), (17, 32), (32, 17), (33, 31)])
@pytest.mark.parametrize(("name", "step"), [("a.mp4", (2, 2)), ("a.mov", (1, 2))])
def test_odd_sizes_repeat_the_last_row_and_column(tmp_path, size, name, step):
    frames = levels(moving_waves(3, *size), "u1")
    write(tmp_path / name, frames)
    rgb = read_rgb(tmp_path / name)
    pads = [-n % s for n, s in zip(size, step, strict=True)]
    expected = np.pad(frames, ((0, 0), (0, pads[0]), (0, pads[1]), (0, 0)), mode="edge")
    assert rgb.shape == expected.shape
    assert np.abs(rgb * 255 - expected).mean() < 4


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("size", [(32, 48), (31, 17)])
def test_png_and_npy_are_exact(tmp_path, dtype, size):
    frames = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, *size, 3), dtype, endpoint=True)
    (tmp_path / "existing").mkdir()
    write(tmp_path / "a.npy", frames, step=2)
    write(tmp_path / "100%_%03d.png".replace("%_", "%%_"), frames, step=2)
    write(f"{tmp_path}/new/", frames, step=2)
    write(tmp_path / "existing", frames, step=2)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), frames)
    for pattern in ("100%%_%03d.png", "new/frame_%05d.png", "existing/frame_%05d.png"):
        images = [read(tmp_path / (pattern % i))[0][0] for i in range(5)]
        assert images[0].format.name == ("rgb24" if dtype == "u1" else "rgb48be")
        np.testing.assert_array_equal(np.stack([image.to_ndarray() for image in images]), frames)
    assert len(os.listdir(tmp_path / "new")) == 5


@pytest.mark.parametrize("name", ["a.npy", "a.mp4"])
def test_frames_are_copied_and_may_be_views(tmp_path, name):
    frames = levels(moving_waves(6, 32, 64), "u1")
    buffer = np.empty((1, 64, 32, 3), np.uint8)
    with open_video(tmp_path / name, quality=1 if name == "a.mp4" else None) as video:
        for frame in frames:
            buffer[0] = frame.swapaxes(0, 1)
            video.write(buffer.swapaxes(1, 2))
            buffer[:] = 0
        assert video.frames_written == 6
    found = np.load(tmp_path / name) if name == "a.npy" else read_rgb(tmp_path / name) * 255
    assert np.abs(found - frames.astype(float)).mean() < 2


RATES = {
    24: (24, 1),
    25.0: (25, 1),
    12.5: (25, 2),
    23.976: (24000, 1001),
    23.98: (24000, 1001),
    "29.97": (30000, 1001),
    59.94006: (60000, 1001),
    "24000/1001": (24000, 1001),
    Fraction(50): (50, 1),
    "1/2": (1, 2),
    15.15: (303, 20),
}


@pytest.mark.parametrize(("fps", "fraction"), RATES.items())
def test_frame_rate(tmp_path, fps, fraction):
    assert frame_rate(fps) == Fraction(*fraction)
    write(tmp_path / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8), fps=fps)
    frames, stream = read(tmp_path / "a.mp4")
    assert stream.rate == Fraction(*fraction)
    assert frames[-1].time == pytest.approx(3 / Fraction(*fraction))


@pytest.mark.parametrize("fps", [0, -1, 1001, 1e-4, float("nan"), float("inf"), "fast", "24/0", None])
def test_frame_rate_refuses(fps):
    with pytest.raises(ValueError, match=r"^fps must be"):
        frame_rate(fps)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.npy"])
def test_whatever_was_written_before_an_exception_is_kept(tmp_path, name, error):
    frames = levels(moving_waves(9, 64, 64), "u1")
    with pytest.raises(error), open_video(tmp_path / name) as video:
        video.write(frames)
        raise error
    kept = tmp_path / name.replace("a.", "a.partial.")
    assert len(np.load(kept) if name == "a.npy" else read(kept)[0]) == 9


def test_an_exception_before_the_first_frame_leaves_the_old_file(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), open_video(tmp_path / "a.mp4", overwrite=True):
        raise KeyboardInterrupt
    assert (tmp_path / "a.mp4").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.npy"])
def test_a_killed_process_leaves_a_playable_file(tmp_path, name):
    script = """
        import os, sys, time
        import numpy as np
        from mlx_vae_tiling.media.video import open_video
        video = open_video(sys.argv[1], fps=4)
        noise = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), np.uint8)
        partial = sys.argv[1].replace("a.", "a.partial.")
        while not os.path.exists(partial) or os.path.getsize(partial) < 500_000:
            video.write(noise)
        os._exit(9)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), os.fspath(tmp_path / name)]
    assert subprocess.run(command, timeout=60).returncode == 9
    kept = tmp_path / name.replace("a.", "a.partial.")
    assert os.listdir(tmp_path) == [kept.name]
    if name == "a.npy":
        assert np.load(kept).shape[0] >= 20
    else:
        assert len(read(kept)[0]) >= 8
        assert [frame.time for frame in read(kept)[0]] == [i / 4 for i in range(len(read(kept)[0]))]


def test_a_closed_file_is_not_fragmented(tmp_path):
    write(tmp_path / "a.mp4", levels(moving_waves(60, 64, 64), "u1"), fps=10)
    content = (tmp_path / "a.mp4").read_bytes()
    boxes, at = [], 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        size = size if size != 1 else int.from_bytes(content[at + 8 : at + 16], "big")
        boxes.append(content[at + 4 : at + 8])
        at += size
    assert boxes.count(b"moov") == 1
    assert b"moof" not in boxes


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.npy", "%d.png"])
@pytest.mark.parametrize("writes", [1, 8])
def test_a_full_disk_is_reported(tmp_path, name, writes):
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    full = tmp_path / name.replace("%d", "0.partial")
    if name != "%d.png":
        full.symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match=rf"No space left on device: '.*{name}'"),
        open_video(tmp_path / name) as video,
    ):
        if name == "%d.png":
            full.symlink_to("/dev/full")
        for _ in range(writes):
            video.write(noise)


def frame_batch() -> np.ndarray:
    return np.zeros((1, 8, 8, 3), np.uint8)


def test_an_error_of_the_thread_ends_the_writing():
    def save(batches):
        next(batches)
        raise MemoryError("too much")

    writer = VideoWriter("x.mp4", save)
    with pytest.raises(OSError, match=r"cannot write x\.mp4: too much") as failure:
        for _ in range(100):
            writer.write(frame_batch())
    assert isinstance(failure.value.__cause__, MemoryError)
    with pytest.raises(ValueError, match=r"before x\.mp4 is closed"):
        writer.write(frame_batch())
    writer.close()


def test_an_error_of_the_thread_is_raised_by_close():
    def save(batches):
        list(batches)
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: 'x\.mp4'"),
        VideoWriter("x.mp4", save) as w,
    ):
        w.write(frame_batch())
    with pytest.raises(OSError, match="No space") as failure, VideoWriter("x.mp4", save) as w:
        w.write(frame_batch())
        raise KeyboardInterrupt
    assert isinstance(failure.value.__context__, (KeyboardInterrupt, OSError))


def test_at_most_two_batches_wait():
    taken, go = [], threading.Event()

    def save(batches):
        for batch in batches:
            go.wait(10)
            taken.append(batch)

    writer = VideoWriter("x.mp4", save)
    source = threading.Thread(target=lambda: [writer.write(frame_batch()) for _ in range(8)])
    source.start()
    time.sleep(0.2)
    assert writer.frames_written <= 3  # one being saved, two waiting
    go.set()
    source.join(10)
    writer.close()
    assert len(taken) == 8


def test_an_encoder_that_refuses_is_passed_over(tmp_path, monkeypatch):
    hardware = encoders.Encoder("h264_nvenc", "yuv420p", "yuv420p")
    absent = encoders.Encoder("h264_of_tomorrow", "yuv420p", "yuv420p")
    software = encoders.ENCODERS["h264"][-1]
    monkeypatch.setitem(encoders.ENCODERS, "h264", (absent, hardware, software))
    write(tmp_path / "a.mp4", levels(moving_waves(3, 64, 64), "u1"))
    assert len(read(tmp_path / "a.mp4")[0]) == 3
    monkeypatch.setitem(encoders.ENCODERS, "h264", (absent,))
    with pytest.raises(OSError, match=r"b\.mp4: no encoder of h264 takes 8x8 .*h264_of_tomorrow is not in"):
        write(tmp_path / "b.mp4", frame_batch())


def test_hardware_comes_first_and_its_quality_grows_as_the_rate_factor_falls():
    assert [e[0].name for e in encoders.ENCODERS.values()] == [
        "h264_videotoolbox",
        "hevc_videotoolbox",
        "prores_ks",
    ]
    options = [encoders._quality_options("h264_videotoolbox", q) for q in (1, 18, 51)]
    assert [int(o["global_quality"]) // 118 for o in options] == [98, 65, 1]


def test_quality_trades_size(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), np.uint8)
    for codec in ("h264", "hevc"):
        sizes = []
        for quality in (1, None, 51):
            write(tmp_path / "a.mp4", frames, codec=codec, quality=quality, overwrite=True)
            sizes.append((tmp_path / "a.mp4").stat().st_size)
        assert sizes[0] > 1.3 * sizes[1] > 2 * sizes[2]


BAD_PATHS = {
    "suffix": ("a.avi", {}, ValueError, r"must end in \.mp4, \.mov, \.npy, %05d\.png or /.*a\.avi"),
    "no suffix": ("a", {}, ValueError, "must end in"),
    "png unnumbered": ("a.png", {}, ValueError, r"number its frames, as frame_%05d\.png.*a\.png"),
    "png numbered twice": ("%d_%d.png", {}, ValueError, "number its frames"),
    "png of floats": ("%f.png", {}, ValueError, "number its frames"),
    "no directory": ("none/a.mp4", {}, FileNotFoundError, "no such directory.*create it first: '.*none'"),
    "no directory for png": ("none/b/", {}, FileNotFoundError, "no such directory.*none"),
    "directory": ("taken.mp4", {}, IsADirectoryError, r"a directory has the name.*taken\.mp4"),
    "codec": ("a.mp4", {"codec": "av1"}, ValueError, "codec of .mp4 must be one of h264, hevc, got 'av1'"),
    "prores in mp4": ("a.mp4", {"codec": "prores"}, ValueError, "must be one of h264, hevc"),
    "prores quality": ("a.mov", {"quality": 18}, ValueError, "are for H.264 and HEVC"),
    "npy codec": ("a.npy", {"codec": "h264"}, ValueError, r"leave them out for .*a\.npy"),
    "png quality": ("a/", {"quality": 18}, ValueError, "leave them out"),
    "quality 0": ("a.mp4", {"quality": 0}, ValueError, r"between 1 \(best\) and 51, got 0"),
    "quality 52": ("a.mp4", {"quality": 52}, ValueError, "got 52"),
    "fps": ("a.mp4", {"fps": "x"}, ValueError, "24000/1001, got 'x'"),
}


@pytest.mark.parametrize(("name", "options", "kind", "message"), BAD_PATHS.values(), ids=BAD_PATHS.keys())
def test_bad_targets_are_refused_at_once(tmp_path, name, options, kind, message):
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(kind, match=message):
        open_video(f"{tmp_path}/{name}", **options)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="not writable"):
        open_video(tmp_path / "a.mp4")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 8, 3), "u1"),
        ((1, 8, 8, 4), "u1"),
        ((1, 3, 8, 8), "u1"),
        ((0, 8, 8, 3), "u1"),
        ((1, 8, 8, 3), "f4"),
    ],
)
def test_frames_of_another_kind(tmp_path, shape, dtype):
    with pytest.raises(ValueError, match="frames must be"), open_video(tmp_path / "a.mp4") as video:
        video.write(np.zeros(shape, dtype))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("shape", "dtype"), [((1, 8, 16, 3), "u1"), ((1, 8, 8, 3), "u2")])
def test_frames_that_change(tmp_path, shape, dtype):
    with (
        pytest.raises(
            ValueError, match=r"every frame of .*a\.npy must be \(\(8, 8, 3\).*as the first, got \(\("
        ),
        open_video(tmp_path / "a.npy") as video,
    ):
        video.write(frame_batch())
        video.write(np.zeros(shape, dtype))
    assert np.load(tmp_path / "a.partial.npy").shape == (1, 8, 8, 3)


def test_no_frames_at_all(tmp_path):
    with (
        pytest.raises(ValueError, match=r"at least one frame, none was written to .*a\.mp4"),
        open_video(tmp_path / "a.mp4"),
    ):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "%d.png", "a/"])
def test_without_pyav(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs PyAV: pip install 'mlx_vae_tiling\[video\]'"):
        open_video(f"{tmp_path}/{name}")
    write(tmp_path / "a.npy", frame_batch())


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_a_muxer_that_would_leave_the_video_empty_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setitem(av.library_versions, "libavformat", (62, 3, 100))
    with pytest.raises(ImportError, match=r"needs PyAV 17\.1 or later.*pip install -U 'av>=17\.1'; this is "):
        open_video(tmp_path / name)
    assert os.listdir(tmp_path) == []
    write(tmp_path / "%d.png", frame_batch())
