"""Two processes with one output at the same instant: one decodes, and one is told."""

import os
import subprocess
import sys

import numpy as np
import pytest

RACES, STARTS = 100, 2

WORKER = """
import sys
import mlx.core as mx
from vae_cases import random_latents, small_decoder
from mlx_vae_tiling import decode_to_file, plan_decode

decoder = small_decoder("ltx-2.3")
latents = random_latents(decoder, 1, 2, 2, 3)
plan = plan_decode(decoder, latents.shape, memory_limit="1GB")
print("ready", flush=True)
for line in sys.stdin:
    try:
        decode_to_file(decoder, latents, line.strip(), plan=plan)
        print("decoded", flush=True)
    except (BlockingIOError, FileExistsError) as error:
        print("told", error, flush=True)
"""

ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}


def lines_of(workers):
    return [worker.stdout.readline().strip() for worker in workers]


@pytest.mark.slow
def test_one_of_two_decodes_and_one_is_told(tmp_path):
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(2)
    ]
    try:
        assert lines_of(workers) == ["ready", "ready"]
        frames, at_once = [], 0
        for race in range(RACES):
            path = tmp_path / f"{race}.npy"
            for worker in workers if race % 2 else workers[::-1]:
                worker.stdin.write(f"{path}\n")
                worker.stdin.flush()
            outcomes = sorted(lines_of(workers))
            assert outcomes[0] == "decoded" and outcomes[1].startswith("told"), (race, outcomes)
            at_once += "another process is decoding" in outcomes[1]
            frames.append(np.load(path))
            assert [entry.name for entry in tmp_path.iterdir()] == [path.name], race
            path.unlink()
        assert all((other == frames[0]).all() for other in frames) and frames[0].std() > 10
        # The others were told by the output that was there already.
        assert at_once > RACES / 2
    finally:
        for worker in workers:
            worker.stdin.close()
            worker.wait()
            worker.stdout.close()


@pytest.mark.slow
def test_one_of_two_commands_decodes_and_one_is_told(tmp_path):
    for start in range(STARTS):
        path = tmp_path / f"{start}.npy"
        command = [sys.executable, "-m", "mlx_vae_tiling", "decode", "demo", "--vae", "demo", "-o", str(path)]
        command += ["--frames", "0:9"]
        runs = [
            subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
            )
            for _ in range(2)
        ]
        told = [run.communicate()[1] for run in runs]
        codes = [run.returncode for run in runs]
        assert codes.count(0) == 1, (codes, told)
        (error,) = (text for text, code in zip(told, codes, strict=True) if code)
        assert "another process is decoding" in error or "exists already" in error
        assert error.splitlines()[-1].startswith("mlx-vae-tiling: error: ") and "Traceback" not in error
        assert np.load(path).ndim == 4
        assert not path.with_name(f"{path.name}.partial").exists()
