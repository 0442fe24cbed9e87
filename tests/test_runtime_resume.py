"""A decode that is killed again and again, at any moment, continues to the same bytes."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from vae_cases import random_latents, small_decoder

from mlx_vae_tiling.runtime.plan import plan_decode
from mlx_vae_tiling.runtime.run import decode_to_file

TESTS = Path(__file__).parent
# Decodes to a file in a process of its own.
PROGRAM = """
import sys
import mlx.core as mx
from mlx_vae_tiling.runtime.run import decode_to_file
from vae_cases import small_decoder

folder, limit = sys.argv[1], int(sys.argv[2])
decoder = small_decoder("ltx-2.3")
decoder.load_weights(folder + "/weights.safetensors")
latents = mx.load(folder + "/latents.safetensors")["latents"]
print("ready", flush=True)
decode_to_file(decoder, latents, folder + "/out.npy", memory_limit=limit, resume=True)
"""


def limit_for(decoder, latents, windows):
    """A memory limit under which the decode takes this many windows."""
    limit = 10**9
    while len(plan_decode(decoder, latents.shape, memory_limit=limit).parts) < windows:
        limit = int(0.97 * limit)
    return limit


def killed_inside(folder, limit, delay):
    """Starts a decode, kills it this many seconds after its start; whether it was still running."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        running = process.poll() is None
        process.kill()
    assert running or process.returncode == 0
    return running


@pytest.mark.slow
@pytest.mark.parametrize(("windows", "times"), [(1, 20), (2, 10)])
def test_killed_and_resumed(tmp_path, windows, times):
    decoder = small_decoder("ltx-2.3")
    latents = random_latents(decoder, 1, 24, 4, 6)
    limit = limit_for(decoder, latents, windows)
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), dict(tree_flatten(decoder.parameters())))
    mx.save_safetensors(str(tmp_path / "latents.safetensors"), {"latents": latents})
    began = time.perf_counter()
    decode_to_file(decoder, latents, tmp_path / "whole.npy", memory_limit=limit)
    duration = time.perf_counter() - began
    whole = np.load(tmp_path / "whole.npy")
    chance = random.Random(windows)
    kills = resumed = 0
    while kills < times:
        kills += killed_inside(tmp_path, limit, chance.uniform(0, 0.7 * duration))
        resumed += (tmp_path / "out.npy.partial").exists()
        if not (tmp_path / "out.npy.partial").exists() and (tmp_path / "out.npy").exists():
            assert np.array_equal(np.load(tmp_path / "out.npy"), whole)
            (tmp_path / "out.npy").unlink()
    assert resumed >= kills // 2
    decode_to_file(decoder, latents, tmp_path / "out.npy", memory_limit=limit, resume=True)
    assert np.array_equal(np.load(tmp_path / "out.npy"), whole)
