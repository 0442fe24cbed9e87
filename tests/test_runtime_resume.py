"""A decode that is killed at random moments and resumed gives the frames of an uninterrupted one."""

import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from mlx_vae_tiling.runtime.run import kept_frames

KILLS = 10
"""Of each case; there are two."""

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
decode_to_file(decoder, latents, path, plan=plan, resume=True)
"""


def start(path, limit, windows):
    command = [sys.executable, "-c", PROGRAM, str(path), str(limit), str(windows)]
    return subprocess.Popen(command, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})


def done_frames(path):
    try:
        return sum(json.loads((path.with_name(path.name + ".partial") / "journal.json").read_text())["done"])
    except FileNotFoundError:
        return 0


def kill_at_random(process, path, draw):
    """Kills at some moment of the decode, or sometimes before it; False if the decode was complete."""
    before, early = done_frames(path), draw.random() < 0.15
    while process.poll() is None and not early and done_frames(path) == before:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.3))
    process.kill()
    return process.wait() != 0


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "windows"), [(1_700_000, 1), (1_400_000, 2)])
def test_kill_and_resume(limit, windows, tmp_path):
    draw, kills, inside, decodes = random.Random(windows), 0, 0, 0
    assert start(tmp_path / "expected.npy", limit, windows).wait() == 0
    expected = (tmp_path / "expected.npy").read_bytes()
    assert np.load(tmp_path / "expected.npy").std() > 10
    while kills < KILLS:
        path = tmp_path / f"{decodes}.npy"
        while kills < KILLS and kill_at_random(start(path, limit, windows), path, draw):
            kills += 1
            kept = kept_frames(path)
            inside += kept is not None and 0 < kept[1] < 1
        assert start(path, limit, windows).wait() == 0
        assert path.read_bytes() == expected
        assert kept_frames(path) is None
        decodes += 1
    assert inside > KILLS / 2
