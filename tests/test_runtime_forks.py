"""A process that was forked from one that had used MLX is told so, where it would wait for ever."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
import mlx.core as mx
from mlx_vae_tiling import load_decoder, load_latents

{before}
child = os.fork()
if not child:
    signal.alarm(60)
    try:
        {work}
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(3)
    os._exit(0)
print(os.getpid(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
{work}
"""
LOADED = "decoder, latents = load_decoder('demo'), load_latents('demo')[:, :, :1, :2, :2]"
DECODED = "mx.eval(decoder(latents))"


def ran(before, work):
    """What the program prints, whose parent does the work too, when its child has ended."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(before=before, work=work)],
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        check=True,
    ).stdout.splitlines()


@pytest.mark.parametrize(
    ("before", "work"),
    [
        ("load_decoder('demo')", "load_decoder('demo')"),
        ("load_decoder('demo')", "load_latents('demo')"),
        (f"{LOADED}; {DECODED}", DECODED),
    ],
)
def test_work_after_a_fork_is_refused(before, work):
    error, told = ran(before, work)
    parent, code = told.split()
    assert code == "3"
    assert error == (
        f"this process was forked from process {parent} when that had used MLX, which cannot "
        'compute in both; fork before, or start processes by multiprocessing\'s method "spawn"'
    )


def test_a_fork_before_mlx_is_used_is_nothing_special():
    (told,) = ran("pass", f"{LOADED}; {DECODED}")
    assert told.split()[1] == "0"
