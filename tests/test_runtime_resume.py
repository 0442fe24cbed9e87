"""A decode that is killed at random moments and resumed gives the frames of an uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from mlx_vae_tiling.media.png import numbers
from mlx_vae_tiling.media.video import first_file
from mlx_vae_tiling.runtime.resuming.output import kept_frames, store_folder

KILLS = int(os.environ.get("KILLS", 3))
"""Of each case; `KILLS=30 pytest tests/test_runtime_resume.py` takes ten minutes."""

FRAMES = 153

SUFFIXES = ("npy", "png", "mp4", "mov")

PROGRAM = """
import sys
from dataclasses import replace
import mlx.core as mx
from mlx_vae_tiling import VideoDecoder, decode_to_file, plan_decode
from mlx_vae_tiling.vae.blocks import ResBlocks
from mlx_vae_tiling.vae.published import PUBLISHED

path, limit, windows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = PUBLISHED["ltx-2.3"].config
blocks = (replace(b, num_layers=1) if isinstance(b, ResBlocks) else b for b in config.decoder_blocks)
config = replace(config, decoder_blocks=tuple(blocks), base_channels=4, latent_channels=8)
decoder = VideoDecoder(config).init_random()
latents = mx.random.normal((1, 8, 20, 2, 3), key=mx.random.key(0))
plan = plan_decode(decoder, latents.shape, memory_limit=limit)
assert plan.fits and len(plan.parts) == windows and (plan.max_chunk_frames or 8) <= 4, plan
decode_to_file(decoder, latents, path, plan=plan, fps=4, resume=True)
"""


def start(path, limit, windows):
    command = [sys.executable, "-c", PROGRAM, str(path), str(limit), str(windows)]
    return subprocess.Popen(command, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})


def progress(path):
    """Something that changes as frames are finished, without disturbing whoever writes them."""
    try:
        done = json.loads((store_folder(path) / "journal.json").read_text())["done"]
        beside = path.with_name(f"{path.stem}.partial{path.suffix}")
        if not done and path.suffix == ".png":
            return len(numbers(str(beside)))
        return sum(done) if done else beside.stat().st_size
    except FileNotFoundError:
        return 0


def complete(path):
    """Whether the output stands at its place with nothing left beside it."""
    return os.path.exists(first_file(path)) and not store_folder(path).exists()


def seconds_of_writing(process, path):
    """Waits for a decode; how long it took from its first frames to its end."""
    while process.poll() is None and not progress(path):
        time.sleep(0.002)
    begun = time.monotonic()
    assert process.wait() == 0
    return time.monotonic() - begun


def kill_at_random(process, path, draw, seconds):
    """Kills within so many seconds of its first frames, or before; False if the decode ended by itself."""
    before, early = progress(path), draw.random() < 0.15
    while process.poll() is None and not early and progress(path) == before:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, seconds))
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL)
    return process.returncode != 0


def images(path):
    """All numbered images (F, H, W, 3)."""
    found = []
    for number in numbers(str(path)):
        with av.open(str(path) % number) as image:
            found.append(next(image.decode(video=0)).to_ndarray(format="rgb24"))
    return np.stack(found)


def assert_shows(path, expected):
    """Every frame of a video, at its place: more like the one expected there than like any other."""
    with av.open(path) as video:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    assert frames.shape == expected.shape
    shown, wanted = (x.reshape(len(x), -1).astype(np.float32) for x in (frames, expected))
    shown, wanted = (x - x.mean(axis=1, keepdims=True) for x in (shown, wanted))
    shown, wanted = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (shown, wanted))
    assert ((shown @ wanted.T).argmax(axis=1) == np.arange(len(expected))).all()


@pytest.fixture(scope="module", params=[(2_000_000, 1), (1_800_000, 2)], ids=["window", "windows"])
def uninterrupted(request, tmp_path_factory):
    """A budget and its number of windows, the whole decode, and within how many seconds to kill another."""
    path = tmp_path_factory.mktemp("whole") / "expected.npy"
    # A third of what the machine takes: of any decode, however fast, most kills fall inside.
    seconds = seconds_of_writing(start(path, *request.param), path) / 3
    assert np.load(path).shape[0] == FRAMES and np.load(path).std() > 10
    return *request.param, path, seconds


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_kill_and_resume(suffix, uninterrupted, tmp_path):
    limit, windows, whole, seconds = uninterrupted
    expected = np.load(whole)
    draw, kills, inside, decodes = random.Random(windows), 0, 0, 0
    while kills < KILLS or inside <= KILLS / 2:
        assert kills + decodes < 9 * KILLS, "hardly any kill fell between the first and the last frame"
        path = tmp_path / (f"{decodes}_%05d.png" if suffix == "png" else f"{decodes}.{suffix}")
        while not complete(path) and kill_at_random(start(path, limit, windows), path, draw, seconds):
            kills += 1
            kept = kept_frames(path)
            inside += kept is not None and 0 < kept[1] < 1
        if suffix == "npy":
            assert path.read_bytes() == whole.read_bytes()
        elif suffix == "png":
            assert (images(path) == expected).all()
        else:
            assert_shows(path, expected)
        assert complete(path) and kept_frames(path) is None
        decodes += 1
