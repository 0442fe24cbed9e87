"""Frames are read back from what is written, and from what others write; damage is one clear error."""

import os

import numpy as np
import pytest

from mlx_vae_tiling.media.saved_frames import read_frames
from mlx_vae_tiling.media.video import open_video

av = pytest.importorskip("av")


def smooth(count, height=48, width=64):
    """Frames that a codec keeps well: a gradient that moves."""
    f, y, x = np.meshgrid(*map(np.arange, (count, height, width)), indexing="ij")
    return np.stack([2 * y + 3 * f, 3 * x, 255 - 2 * y - f], axis=3).clip(0, 255).astype(np.uint8)


def write(path, frames, **options):
    with open_video(path, **options) as video:
        video.write(frames)


def joined(saved):
    return np.concatenate(list(saved.pieces))


@pytest.mark.parametrize("name", ["a.npy", "folder/", "frame_%05d.png"])
def test_exact_outputs_are_read_back_to_the_bit(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (19, 12, 16, 3), np.uint8)
    write(name, frames)
    saved = read_frames(name)
    assert saved.count == 19 and np.array_equal(joined(saved), frames)
    assert all(len(piece) <= 8 for piece in read_frames(name).pieces)


@pytest.mark.parametrize(
    ("name", "options"), [("a.mp4", {"quality": 4}), ("a.mov", {}), ("a:b.mp4", {"quality": 4})]
)
def test_videos_are_read_back_in_the_right_colours(name, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = smooth(11)
    write(name, frames, **options)
    found = joined(read_frames(name))
    assert found.shape == frames.shape and found.dtype == np.uint8
    # Chroma has half the size, and limited range fewer levels. Another matrix of colours is off by 20.
    assert np.abs(found.astype(int) - frames).mean() < 2


def test_images_of_other_programs_are_taken_in_the_order_of_their_numbers(tmp_path):
    for number in (1, 2, 10):
        frame = np.full((1, 12, 12, 3), 20 * number, np.uint8)
        write(tmp_path / "%d.png", frame)
        os.rename(tmp_path / "0.png", tmp_path / f"ComfyUI_{number}_.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert joined(read_frames(tmp_path))[:, 0, 0, 0].tolist() == [20, 40, 200]


def array_file(path, array):
    np.save(path, array)


def broken(path, data):
    path.write_bytes(data)


BAD = {
    "nothing": ("none.mp4", lambda path: None, FileNotFoundError, "none.mp4"),
    "no array": ("none.npy", lambda path: None, FileNotFoundError, "none.npy"),
    "no images": ("%d.png", lambda path: None, FileNotFoundError, "no PNG images"),
    "an empty folder": ("folder", os.mkdir, FileNotFoundError, "no PNG images"),
    "a pattern without a number": ("a.png", lambda path: None, ValueError, "must number its frames"),
    "latents": (
        "a.npy",
        lambda p: array_file(p, np.zeros((1, 128, 2, 3, 4))),
        ValueError,
        "must hold uint8 frames",
    ),
    "floats": ("a.npy", lambda p: array_file(p, np.zeros((2, 12, 12, 3))), ValueError, "got float64"),
    "no frames": (
        "a.npy",
        lambda p: array_file(p, np.zeros((0, 12, 12, 3), np.uint8)),
        ValueError,
        "must hold",
    ),
    "objects": ("a.npy", lambda p: array_file(p, np.array([None])), ValueError, "cannot be read as an array"),
    "text as array": ("a.npy", lambda p: broken(p, b"frames"), ValueError, "cannot be read as an array"),
    "text as video": ("a.mp4", lambda p: broken(p, b"frames"), ValueError, "cannot be read as a video"),
    "text as image": ("0.png", lambda p: broken(p, b"frames"), ValueError, "cannot be read as a PNG image"),
    "a pipe": ("a.mp4", os.mkfifo, ValueError, "is no file of frames"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read(name, tmp_path):
    file, make, kind, message = BAD[name]
    make(tmp_path / file)
    with pytest.raises(kind, match=message):
        joined(read_frames(tmp_path / ("%d.png" if file == "0.png" else file)))


def test_a_cut_array_is_an_error(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 12, 12, 3), np.uint8))
    data = (tmp_path / "a.npy").read_bytes()
    for length in (0, 5, 60, 500):
        (tmp_path / "a.npy").write_bytes(data[:length])
        with pytest.raises(ValueError, match="cannot be read as an array"):
            read_frames(tmp_path / "a.npy")


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"mlx_vae_tiling\[video\]"):
        joined(read_frames(tmp_path / "a.mp4"))
