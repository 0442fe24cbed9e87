"""Several local processes decode what one decodes: the same bytes, whoever computes them."""

import json
import random
import re
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from group_cases import PROGRAM, ends, run_alone, run_ranks, start_ranks
from vae_cases import random_latents, small_decoder

from mlx_vae_tiling import plan_decode
from mlx_vae_tiling.runtime.job import Job
from mlx_vae_tiling.runtime.resuming.output import finished_share, kept_frames
from mlx_vae_tiling.vae.backends import METAL

WIDE, LONG = [3, 4, 5], [30, 1, 2]
"""Latents that are divided into bands, and into ranges of frames."""


def settings_of(size, dtype="float32", **more):
    return {"size": size, "dtype": dtype, "width": 4, **more}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("size", [WIDE, LONG], ids=["bands", "ranges"])
def test_byte_identical_to_one_process(size, ranks, dtype, tmp_path):
    settings = settings_of(size, dtype, frames=True)
    run_ranks(tmp_path, ranks, settings | {"output": str(tmp_path / "ranks.npy")})
    run_alone(settings, windows_of=ranks, output=str(tmp_path / "alone.npy"))
    assert (tmp_path / "ranks.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes()
    run_alone(settings, windows_of=1, output=str(tmp_path / "whole.npy"))
    frames, whole = np.load(tmp_path / "ranks.npy"), np.load(tmp_path / "whole.npy")
    assert frames.std() > 10
    if size == LONG:
        assert (frames == whole).all()
    # In other windows sums are in another order: some of what is nearly between two integers.
    assert np.abs(frames.astype(int) - whole).max() <= 1 and (frames != whole).mean() < 1e-3


DISAGREEMENTS = {
    "latents": ({"latents": 1}, "rank 1 in latents"),
    "weights": ({"weights": 2}, "rank 1 in weights"),
    "dtype": ({"dtype": "bfloat16"}, r"latent dtype \(mlx.core.bfloat16, not mlx.core.float32\)"),
    "window": ({"window": "part"}, "rank 1 in output"),
    "version": ({"version": "0.9"}, r"rank 1 in mlx_vae_tiling's version \(0.9, not "),
    "not finite": ({"bad": True}, r"latents must be finite, got NaN or infinity in the latent frames \[1\]"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_ranks_that_would_decode_something_else_end_all(case, tmp_path):
    own, message = DISAGREEMENTS[case]
    settings = settings_of(WIDE, output=str(tmp_path / "out.npy"))
    ranks = start_ranks(
        tmp_path, 3, [str(PROGRAM), json.dumps(settings)], [[json.dumps(more)] for more in ({}, own, {})]
    )
    for status, errors in ends(ranks):
        assert status == 1 and re.search(message, errors), errors
    assert not (tmp_path / "out.npy").exists() and not (tmp_path / "out.npy.partial").exists()


def test_each_within_its_own_memory(tmp_path):
    """A rank with little memory has several windows, another one none."""
    settings = settings_of(WIDE, output=str(tmp_path / "out.npy"))
    run_ranks(tmp_path, 3, settings, [{}, {"memory": 700_000}, {"memory": 1000}])
    run_alone(settings, windows_of=1, output=str(tmp_path / "whole.npy"))
    frames, whole = np.load(tmp_path / "out.npy"), np.load(tmp_path / "whole.npy")
    assert frames.std() > 10 and np.abs(frames.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("window", ["whole", "part"])
def test_file_and_window(window, tmp_path):
    settings = settings_of(WIDE, "bfloat16", window=window)
    run_ranks(tmp_path, 2, settings | {"output": str(tmp_path / "ranks.npy")})
    run_alone(settings, windows_of=2, output=str(tmp_path / "alone.npy"))
    assert (tmp_path / "ranks.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes()


def test_frames_of_16_bits(tmp_path):
    settings = settings_of(WIDE, frames=True, bits=16)
    run_ranks(tmp_path, 2, settings | {"output": str(tmp_path / "ranks.npy")})
    run_alone(settings, windows_of=2, output=str(tmp_path / "alone.npy"))
    assert (tmp_path / "ranks.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes()
    frames = np.load(tmp_path / "ranks.npy")
    assert frames.dtype == np.uint16 and len(np.unique(frames)) > 1000


def test_a_rank_that_fails_on_its_way_ends_all_and_the_rest_is_kept(tmp_path):
    settings = settings_of(**LONGER["bands"], output=str(tmp_path / "out.npy"), resume=True)
    own = [json.dumps(more) for more in ({}, {"fails_after": 4}, {})]
    ranks = start_ranks(tmp_path, 3, [str(PROGRAM), json.dumps(settings)], [[one] for one in own])
    for rank, (status, errors) in enumerate(ends(ranks)):
        told = "ArithmeticError: " if rank == 1 else "RankError: rank 1: "
        assert status == 1 and re.search(told + r"decoding failed twice: frame \d+ is not fin", errors), (
            errors
        )
    _, share = kept_frames(tmp_path / "out.npy")
    assert 0 < share < 1
    run_alone(settings, windows_of=1)
    run_alone(settings, windows_of=3, output=str(tmp_path / "alone.npy"))
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes()


def await_frames(path, ranks):
    """Waits until some are kept, or a rank has ended."""
    while all(rank.poll() is None for rank in ranks):
        kept = finished_share(path)
        if kept is not None and kept[1] > 0:
            return
        time.sleep(0.005)


def killed(tmp_path, settings, count, victim, moment):
    """Runs ranks, kills one when some frames are kept; what the others say, and how long they took."""
    ranks = start_ranks(tmp_path, count, [str(PROGRAM), json.dumps(settings)])
    path = tmp_path / "out.npy"
    await_frames(path, ranks)
    time.sleep(moment)
    ended = [rank.poll() for rank in ranks]
    ranks[victim].kill()
    began, found = time.monotonic(), ends(ranks)
    return ended, found, time.monotonic() - began


def assert_told(ended, found, seconds, victim):
    assert seconds < 30
    for rank, (before, (status, errors)) in enumerate(zip(ended, found, strict=True)):
        if rank != victim and before is None:
            assert status == 1 and f"rank {victim} was lost" in errors, errors


LONGER = {
    "bands": {"size": [12, 3, 12], "memory": 3_000_000},
    "ranges": {"size": [90, 1, 2], "memory": 1_500_000},
}
"""Decodes of many small pieces."""


def kill_and_resume(kind, victim, moment, resumed_by, tmp_path):
    """Kills one of three ranks; any number of processes resumes to the bytes of one process."""
    settings = settings_of(**LONGER[kind], output=str(tmp_path / "out.npy"), resume=True)
    ended, found, seconds = killed(tmp_path, settings, 3, victim, moment)
    assert all(status is None for status in ended)
    assert_told(ended, found, seconds, victim)
    _, share = kept_frames(tmp_path / "out.npy")
    assert 0 < share < 1
    # Bands advance together, and no disk holds the video twice; what comes before its turn is kept apart.
    assert (tmp_path / "out.npy.partial" / "frames").exists() == (kind == "ranges")
    if resumed_by == 1:
        run_alone(settings, windows_of=1)
    else:
        run_ranks(tmp_path, resumed_by, settings)
    run_alone(settings, windows_of=3, output=str(tmp_path / "alone.npy"))
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes()
    assert kept_frames(tmp_path / "out.npy") is None


@pytest.mark.parametrize(
    ("kind", "victim", "resumed_by"), [("bands", 2, 2), pytest.param("ranges", 0, 4, marks=pytest.mark.slow)]
)
def test_killed_and_resumed(kind, victim, resumed_by, tmp_path):
    kill_and_resume(kind, victim, 0, resumed_by, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "victim", "resumed_by"),
    [(kind, victim, (1, 3)[(n + victim) % 2]) for n, kind in enumerate(LONGER) for victim in range(3)],
)
def test_kills_at_random_moments(kind, victim, resumed_by, tmp_path):
    draw = random.Random(f"{kind} {victim} {resumed_by}")
    kill_and_resume(kind, victim, draw.uniform(0, 0.5), resumed_by, tmp_path)


@pytest.mark.slow
def test_a_rank_that_stops_is_lost(tmp_path):
    """As when a cable is pulled: nothing is closed, and nothing comes."""
    settings = settings_of(**LONGER["bands"], output=str(tmp_path / "out.npy"))
    ranks = start_ranks(tmp_path, 3, [str(PROGRAM), json.dumps(settings)])
    await_frames(tmp_path / "out.npy", ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        for rank in (0, 2):
            _, errors = ranks[rank].communicate(timeout=60)
            assert "rank 1 was lost" in errors
        assert time.monotonic() - began < 30
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_command(tmp_path):
    """The command takes part when a launcher has started it; rank 0 prints, and a failure is told by all."""
    command = ["-m", "mlx_vae_tiling", "decode", "demo", "--vae", "demo", "--frames", ":9", "-o"]
    ranks = start_ranks(tmp_path, 2, [*command, str(tmp_path / "out.npy"), "-q"])
    printed = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert "9 frames" in printed[0][0] and printed[1] == ("", "")
    peak, predicted = map(float, re.search(r"peak (\S+) MB \(predicted (\S+) MB\)", printed[0][0]).groups())
    assert peak <= predicted <= 1.1 * peak
    assert np.load(tmp_path / "out.npy").shape == (9, 288, 512, 3)
    ranks = start_ranks(tmp_path, 2, [*command, str(tmp_path / "out.npy"), "-q"])
    (first, said), (second, heard) = ends(ranks)
    assert (first, second) == (2, 2) and "File exists" not in heard
    assert heard.startswith("mlx-vae-tiling: error: rank 0: ") and heard.endswith(said.split("error: ")[1])


def test_a_rank_computes_in_the_forms_that_it_is_told():
    """Whatever was measured on its own machine: bytes must not depend on who computes a window."""
    decoder = small_decoder("ltx-2.3")
    latents = random_latents(decoder, 1, 2, 2, 2)
    own, told = replace(METAL, form="folded"), replace(METAL, form="gemm")
    plan = plan_decode(decoder, latents.shape, memory_limit="1GB", backend=own)
    job = Job.prepare(decoder, latents, decoder.options(), "uint8", plan)
    shared = job.planned_anew(plan.parts, told.arithmetic)
    assert (job.plan.backend, shared.plan.backend, shared.backend) == (own, told, told)
