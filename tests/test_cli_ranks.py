"""`plan --ranks N`: who would compute what, by the numbers that the ranks themselves divide by."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_vae_tiling import cli, plan_decode
from mlx_vae_tiling.runtime.planning.cost import CostModel
from mlx_vae_tiling.runtime.ranks.shares import divide
from mlx_vae_tiling.runtime.ranks.waiting import room_for
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.published import PUBLISHED

FULL_HD = ["plan", "--shape", "16x34x60", "--vae", "ltx-2.3"]


def printed(capsys, *arguments):
    status = cli.main([*FULL_HD, *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_what_each_of_them_would_compute_hold_and_send(capsys):
    status, out, err = printed(capsys, "--ranks", "2", "--memory", "8GB", "--json")
    assert (status, err) == (0, "")
    divided = json.loads(out)["divided"]
    columns = [rank["windows"][0]["width"] for rank in divided["ranks"]]
    assert columns == [[0, 960], [960, 1920]] and all(len(rank["windows"]) == 1 for rank in divided["ranks"])
    # Half of each frame, of three bytes a pixel, goes to rank 0.
    assert divided["sent_bytes"] == 1088 * 960 * 3
    once = json.loads(out)["operations"]
    assert [rank["operations"] for rank in divided["ranks"]] == [divided["ranks"][0]["operations"]] * 2
    assert divided["recompute"] == pytest.approx(2 * divided["ranks"][0]["operations"] / once)
    assert divided["speedup"] == pytest.approx(2 / divided["recompute"])


def test_the_division_is_that_of_the_ranks(capsys):
    """Also where memory is short: rank 0's frames that wait are within it."""
    decoder = build_decoder(PUBLISHED["ltx-2.3"].config)
    shape = (1, decoder.config.latent_channels, 16, 34, 60)
    plan = plan_decode(decoder, shape, memory_limit="2GB", dtype="bfloat16", no_tune=True)
    model = CostModel(decoder, shape, mx.bfloat16, plan.backend)
    room = room_for(model, plan.output, 1, plan.memory_limit)
    division = divide(model, plan.output, [plan.memory_limit] * 3, room=room)
    status, out, _ = printed(capsys, "--ranks", "3", "--memory", "2GB", "--json", "--no-tune")
    ranks = json.loads(out)["divided"]["ranks"]
    assert status == 0 and tuple(rank["operations"] for rank in ranks) == division.operations
    assert [len(rank["windows"]) for rank in ranks] == [len(division.of(rank)) for rank in range(3)]
    assert all(rank["peak_bytes"] <= plan.memory_limit for rank in ranks)
    owned = plan_decode(
        decoder,
        shape,
        memory_limit="2GB",
        dtype="bfloat16",
        parts=tuple(division.parts[n] for n in division.of(1)),
    )
    assert ranks[1]["peak_bytes"] == owned.peak_bytes


def test_rank_0_takes_smaller_chunks_where_frames_that_wait_leave_no_more(capsys):
    def peaks(memory):
        _, out, _ = printed(capsys, "--ranks", "2", "--memory", str(memory), "--json", "--no-tune")
        return [rank["peak_bytes"] for rank in json.loads(out)["divided"]["ranks"]]

    most, other = peaks(10**11)
    assert most > other
    less, same = peaks(most - 1)
    assert less < most and same == other


def test_as_text(capsys):
    status, out, _ = printed(capsys, "--ranks", "4", "--memory", "8GB")
    plan, divided = out.split("\n\n")
    assert status == 0 and plan.startswith("output   121 frames of 1920x1088")
    head, *ranks, together, traffic = divided.strip().split("\n")
    assert head == "4 machines alike, counted by the planner and not measured:"
    assert ranks[3].startswith("rank 3 ") and ": columns 1" in ranks[3] and "; peak " in ranks[3]
    assert re.fullmatch(r"together 1\.\d\dx the whole decode, 2\.\d\d times as fast at best", together)
    left = int(re.search(r"columns 0:(\d+);", ranks[0])[1])
    assert traffic == f"traffic  {3 * 1088 * (1920 - left) / 1e6:.2f} MB for each frame to rank 0"


def test_the_table_of_the_page_is_the_planner_s():
    """Run as the page says, and found in it line by line."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(tests / "benchmarks/machines.py")],
        env={**os.environ, "PYTHONPATH": str(tests.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n") == 8
    assert done.stdout in (tests.parent / "examples/several_machines.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--ranks", "0"], 2, "--ranks must be at least 1, got 0"),
        (["--ranks", "2", "--tiling", "default"], 2, "blended tiles are decoded by one machine"),
        (["--ranks", "2", "--memory", "900MB"], 1, "no window fits in the memory of any rank"),
    ],
)
def test_what_cannot_be_divided(arguments, status, message, capsys):
    found, out, err = printed(capsys, *arguments)
    assert found == status and message in err and err.count("\n") == 1
    assert bool(out) == (status == 1)
