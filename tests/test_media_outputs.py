"""Where outputs lie: what is there already, what names mean, and what a clip of two frames does."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mlx_vae_tiling.media.places import partial_path, same_file
from mlx_vae_tiling.media.space import disk_bytes
from mlx_vae_tiling.media.video import open_video, unfinished_frames

av = pytest.importorskip("av")

NAMES = ["a.mp4", "a.mov", "a.npy", "%d.png", "folder/"]
every_name = pytest.mark.parametrize("name", NAMES)


def noise(count: int, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def write(path, frames, **options) -> None:
    with open_video(path, **options) as video:
        for begin in range(0, len(frames), 4):
            video.write(frames[begin : begin + 4])


def read(path) -> np.ndarray:
    """Frames of an output as RGB; of a folder or pattern all the PNG files beside it, by name."""
    path = str(path)
    if path.endswith(".npy"):
        return np.load(path)
    if path.endswith((".mp4", ".mov")):
        with av.open(f"file:{path}") as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    folder = os.path.dirname(path)
    files = sorted(os.listdir(folder), key=lambda name: (len(name), name))
    assert not [name for name in files if "partial" in name]
    images = [next(av.open(os.path.join(folder, name)).decode(video=0)) for name in files]
    return np.stack([image.to_ndarray(format="rgb24") for image in images])


def snapshot(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@every_name
def test_what_is_there_is_refused_and_untouched(tmp_path, name):
    write(f"{tmp_path}/{name}", noise(3))
    before = snapshot(tmp_path)
    for resume in (False, True):
        with pytest.raises(
            FileExistsError, match=r"overwrite=True, --overwrite.* another name: '.*(a\.|png)"
        ):
            open_video(f"{tmp_path}/{name}", resume=resume)
    assert snapshot(tmp_path) == before


@every_name
def test_a_longer_output_is_replaced_whole(tmp_path, name):
    path = f"{tmp_path}/{name}"
    write(path, noise(9))
    write(path, noise(5, seed=1), overwrite=True)
    frames = read(path)
    assert len(frames) == 5
    if name not in ("a.mp4", "a.mov"):
        np.testing.assert_array_equal(frames, noise(5, seed=1))


@every_name
def test_the_old_output_lies_there_until_the_new_one_is_complete(tmp_path, name):
    path = f"{tmp_path}/{name}"
    write(path, noise(6))
    before = snapshot(tmp_path)
    with pytest.raises(KeyboardInterrupt), open_video(path, overwrite=True) as video:
        video.write(noise(4, seed=1))
        raise KeyboardInterrupt
    after = snapshot(tmp_path)
    assert {file: after[file] for file in before} == before
    assert all(".partial." in file for file in set(after) - set(before))
    assert unfinished_frames(path)[1] == 4


@every_name
def test_a_name_is_given_to_what_is_on_the_disk(tmp_path, name, monkeypatch):
    """After a loss of power, too: a file is flushed as it is complete, then renamed, then its folder is."""
    events, fsync, replace = [], os.fsync, os.replace

    def flushed(file):
        found = os.fstat(file)
        events.append(("flush", found.st_ino, found.st_size))
        fsync(file)

    def renamed(source, target):
        found = os.stat(source)
        assert ("flush", found.st_ino, found.st_size) in events, (source, target)
        events.append(("rename", os.stat(os.path.dirname(target)).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write(f"{tmp_path}/{name}", noise(3))
    assert read(f"{tmp_path}/{name}").shape[0] == 3
    renames = [event for event in events if event[0] == "rename"]
    assert len(renames) == (1 if name.startswith("a.") else 3)
    assert events[-1][:2] == ("flush", renames[-1][1])


@every_name
def test_an_unfinished_output_is_refused_continued_or_begun_again(tmp_path, name):
    path = f"{tmp_path}/{name}"
    with pytest.raises(KeyboardInterrupt), open_video(path) as video:
        video.write(noise(4))
        raise KeyboardInterrupt
    with pytest.raises(FileExistsError, match=r"resume=True, --resume.*overwrite=True, --overwrite.*partial"):
        open_video(path)
    with open_video(path, resume=True, overwrite=True) as video:
        assert video.frames_kept == 4
        video.write(noise(6)[4:])
    assert len(read(path)) == 6
    with pytest.raises(KeyboardInterrupt), open_video(path, overwrite=True) as video:
        assert video.frames_kept == 0
        video.write(noise(4))
        raise KeyboardInterrupt
    with open_video(path, overwrite=True) as video:
        assert (video.frames_kept, unfinished_frames(path)) == (0, None)
        video.write(noise(2, seed=1))
    assert len(read(path)) == 2


@every_name
def test_other_files_of_a_folder_are_left(tmp_path, name):
    others = ["frame_1.png", "frame_00001.jpg", "frame_000x1.png", "b_1.png", "a.mp4.txt", "x1.png"]
    folder = tmp_path / "folder" if name == "folder/" else tmp_path
    folder.mkdir(exist_ok=True)
    for other in others:
        (folder / other).write_bytes(b"mine")
    write(f"{tmp_path}/{name}", noise(3))
    write(f"{tmp_path}/{name}", noise(2), overwrite=True)
    assert all((folder / other).read_bytes() == b"mine" for other in others)


def test_renaming_of_images_is_taken_up_where_it_was_killed(tmp_path):
    write(tmp_path / "%d.png", noise(8))
    with pytest.raises(KeyboardInterrupt), open_video(tmp_path / "%d.png", overwrite=True) as video:
        video.write(noise(6, seed=1))
        raise KeyboardInterrupt
    os.remove(tmp_path / "7.png")
    os.remove(tmp_path / "6.png")
    for number in (0, 1, 2):
        os.replace(tmp_path / f"{number}.partial.png", tmp_path / f"{number}.png")
    assert unfinished_frames(tmp_path / "%d.png")[1] == 6
    for number in (4, 5):
        os.remove(tmp_path / f"{number}.png")
    with pytest.raises(FileExistsError, match="--overwrite"):  # 3.png is of the old sequence still
        open_video(tmp_path / "%d.png", resume=True)
    with open_video(tmp_path / "%d.png", resume=True, overwrite=True) as video:
        assert video.frames_kept == 6
    np.testing.assert_array_equal(read(tmp_path / "%d.png"), noise(6, seed=1))


@pytest.mark.parametrize("cut", [0, 20, 300])
def test_half_an_image_is_not_kept(tmp_path, cut):
    with pytest.raises(KeyboardInterrupt), open_video(tmp_path / "%d.png") as video:
        video.write(noise(6))
        raise KeyboardInterrupt
    half = tmp_path / "3.partial.png"
    half.write_bytes(half.read_bytes()[:cut])
    with open_video(tmp_path / "%d.png", resume=True) as video:
        assert video.frames_kept == 3
        assert sorted(os.listdir(tmp_path)) == [f"{number}.partial.png" for number in range(3)]
        video.write(noise(5)[3:])
    np.testing.assert_array_equal(read(tmp_path / "%d.png"), noise(5))


COLONS = ["shot:1.mp4", "file:a.mp4", "tee:a.mp4", "concat:b.mov", "pipe:1.mov", "http:x.npy", "data:%d.png"]


@pytest.mark.parametrize("name", COLONS)
def test_names_are_names_of_local_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(name, noise(3))
    made = sorted(name % i if "%" in name else name for i in range(3 if "%" in name else 1))
    assert sorted(os.listdir(tmp_path)) == made
    if "%" not in name:
        assert len(read(tmp_path / name)) == 3


def test_links_are_followed_and_kept(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("a.mp4", "a.npy"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        write(tmp_path / name, noise(3))
        write(tmp_path / name, noise(2), overwrite=True)
        assert (tmp_path / name).is_symlink()
        assert len(read(tmp_path / name)) == 2
    assert sorted(os.listdir(tmp_path / "disk")) == ["a.mp4", "a.npy"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize("name", ["a.mp4", "a.npy"])
def test_a_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=r"a pipe, socket or disk cannot be written.*a\."):
        open_video(tmp_path / name)


def test_same_file(tmp_path):
    first, second = tmp_path / "a.npy", tmp_path / "b.npy"
    first.write_bytes(b"")
    (tmp_path / "link.npy").symlink_to(first)
    os.link(first, tmp_path / "hard.npy")
    (tmp_path / "dangling.npy").symlink_to(second)
    assert same_file(first, f"{tmp_path}/../{tmp_path.name}/a.npy")
    assert same_file(first, tmp_path / "link.npy")
    assert same_file(tmp_path / "hard.npy", first)
    assert same_file(tmp_path / "dangling.npy", second)
    assert not same_file(first, second)
    second.write_bytes(b"")
    assert not same_file(first, second)


@pytest.mark.parametrize("codec", ["h264", "hevc"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_clips_of_a_few_frames(tmp_path, codec, count, suffix):
    code = (
        "import sys, numpy as np\n"
        "from mlx_vae_tiling.media.video import open_video\n"
        "with open_video(sys.argv[1], codec=sys.argv[2], fps=25) as video:\n"
        "    noise = np.random.default_rng(0).integers(0, 256, (int(sys.argv[3]), 64, 64, 3), np.uint8)\n"
        "    video.write(noise)\n"
    )
    path = str(tmp_path / f"a{suffix}")
    subprocess.run([sys.executable, "-c", code, path, codec, str(count)], check=True, timeout=60)
    with av.open(path) as container:
        times = [frame.time for frame in container.decode(video=0)]
        assert times == pytest.approx([i / 25 for i in range(count)], abs=1e-4)
        assert container.duration == pytest.approx(count / 25 * 1e6, abs=100)


SIZES = {"a.npy": {}, "%d.png": {}, "a.mov": {}, "a.mp4": {}, "b.mp4": {"codec": "hevc"}}


@pytest.mark.parametrize(("name", "options"), SIZES.items())
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_space_of_noise_is_enough_for_anything(tmp_path, name, options, dtype):
    frames = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (6, 128, 192, 3), dtype, endpoint=True)
    told = disk_bytes(name, frames.shape, dtype, **options)
    write(tmp_path / name, frames, **options)
    taken = sum(file.stat().st_size for file in tmp_path.iterdir())
    raw = frames.nbytes
    if name in ("a.npy", "%d.png"):
        assert taken <= told <= 1.05 * raw + 4096
    else:
        assert told < raw / 3
    if name == "a.mov":
        assert taken <= told
    assert unfinished_frames(tmp_path / name) is None


def test_partial_names():
    assert partial_path("/a.b/clip.MP4") == "/a.b/clip.partial.MP4"
    assert partial_path("x/frame_%05d.png") == "x/frame_%05d.partial.png"


def test_no_thread_is_left():
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("write ")]


@every_name
@pytest.mark.parametrize("left", [b"", b"half a header"])
def test_what_holds_no_frame_is_in_nobodys_way(tmp_path, name, left):
    path = f"{tmp_path}/{name}"
    (tmp_path / "folder").mkdir()
    beside = partial_path(f"{path}frame_%05d.png" if name == "folder/" else path)
    with open(beside % 0 if "%" in beside else beside, "wb") as file:
        file.write(left)
    assert unfinished_frames(path) is None
    write(path, noise(2))
    assert not [found for found in snapshot(tmp_path) if "partial" in found]


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.npy", "a_%d.png"])
def test_asking_what_is_kept_removes_nothing(tmp_path, name):
    """Somebody else may be about to write its first frame."""
    beside = Path(partial_path(str(tmp_path / name)).replace("%d", "0"))
    beside.write_bytes(b"begun")
    assert unfinished_frames(tmp_path / name) is None
    assert beside.read_bytes() == b"begun"
