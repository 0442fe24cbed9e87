"""The command `fetch`, and `--vae NAME`, as processes of their own against a Hub on loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from checkpoint_files import combined, decoder_of, original_json, parameters, write
from hub_server import SIGNATURE, TOKEN, Blob, Repo, serving

from mlx_vae_tiling.checkpoints.load import load_decoder
from mlx_vae_tiling.checkpoints.sources import SOURCES

FIRST = SOURCES["ltx-2.3"][0]


@pytest.fixture(scope="module")
def decoder():
    return decoder_of("ltx-2.3", base_channels=6)


@pytest.fixture(scope="module")
def content(decoder, tmp_path_factory):
    config = original_json("ltx-2.3") | {"decoder_base_channels": 6}
    tensors = combined(decoder) | {"model.diffusion_model.x": ("U8", (9_000_000,), bytes(9_000_000))}
    return write(tmp_path_factory.mktemp("checkpoint") / "a", tensors, config).read_bytes()


@pytest.fixture
def remote(content):
    with serving() as (hub, url):
        hub.url = url
        hub.repos[FIRST.repo] = Repo({FIRST.file: Blob(content)})
        yield hub


def start(remote, home, *arguments, **environment):
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
    kept |= {"HF_ENDPOINT": remote.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "mlx_vae_tiling", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept | environment,
    )


def command(remote, home, *arguments, **environment):
    process = start(remote, home, *arguments, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def same(path, decoder):
    loaded = parameters(load_decoder(path))
    return all(mx.array_equal(loaded[name], value) for name, value in parameters(decoder).items())


def test_a_version_is_announced_fetched_and_found_again(remote, tmp_path, decoder):
    status, out, err = command(remote, tmp_path, "fetch", "ltx-2.3", "--dry-run", "--json")
    assert status == 0 and remote.bytes_sent() < 60_000
    planned = json.loads(out)
    status, out, err = command(remote, tmp_path, "info", "ltx-2.3", "--json")
    assert status == 0 and remote.bytes_sent() < 120_000
    assert json.loads(out)["path"] == planned["path"] and json.loads(out)["layout"] == "combined"
    assert (planned["repository"], planned["files"]) == (FIRST.repo, [FIRST.file])
    remote.sent.clear()
    status, out, err = command(remote, tmp_path, "fetch", "ltx-2.3")
    assert status == 0 and same(out.strip(), decoder) and out.strip() == planned["path"]
    assert remote.bytes_sent("/blobs/") - planned["transfer_bytes"] < 60_000
    [line] = err.splitlines()
    size = f"{planned['transfer_bytes'] / 1e6:.2f} MB"
    assert line.startswith(
        f"mlx-vae-tiling: {size} from {FIRST.repo}/{FIRST.file} at c0ffee0: only the decoder, of "
    )
    remote.sent.clear()
    status, out, err = command(remote, tmp_path, "info", "ltx-2.3")
    assert status == 0 and "LTX-2.3 / 2.5" in out and planned["path"] in out and err == ""
    assert not remote.bytes_sent("/blobs/")
    status, out, err = command(remote, tmp_path, "fetch", "ltx-2.3", "-q", HF_HUB_OFFLINE="1")
    assert (status, out.strip(), err) == (0, planned["path"], "")
    status, out, err = command(remote, tmp_path, "fetch", str(planned["path"]))
    assert (status, out.strip(), err) == (0, planned["path"], "")


REFUSALS = [
    ({"gated": True}, {}, "asks for consent: accept its terms"),
    ({"gated": True}, {"HF_TOKEN": "hf_wrong_and_secret"}, "the Hub refuses the token"),
    ({"forbidden": True}, {"HF_TOKEN": TOKEN}, "may not be read from here"),
]


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize(("repo", "environment", "message"), REFUSALS)
def test_refusals_are_one_line_without_the_token(
    repo, environment, message, debug, remote, tmp_path, content
):
    remote.repos = {"owner/name": Repo({"a.safetensors": Blob(content)}, **repo)}
    status, out, err = command(remote, tmp_path, "fetch", "owner/name", *debug, **environment)
    assert out == "" and message in err
    assert not any(secret in err for secret in (SIGNATURE, *environment.values()))
    if not debug:
        assert status == 2 and len(err.splitlines()) == 1
        assert err.startswith("mlx-vae-tiling: error: cannot fetch a VAE from owner/name on the Hub: ")


def test_warnings_are_lines(remote, tmp_path, content, decoder):
    second = SOURCES["ltx-2.3"][1]
    remote.repos = {second.repo: Repo({second.file: Blob(content)}, gated=True)}
    status, out, err = command(remote, tmp_path, "fetch", "ltx-2.3", HF_TOKEN=TOKEN)
    first, line = err.splitlines()
    assert first.startswith(f"mlx-vae-tiling: warning: there is no repository {FIRST.repo}, or it is private")
    assert f"from {second.repo}/{second.file} at" in line and TOKEN not in err
    assert status == 0 and same(out.strip(), decoder)


@pytest.mark.parametrize("command_of", ["decode", "verify"])
def test_a_transfer_that_is_interrupted_within_a_decode_says_what_is_kept(command_of, remote, tmp_path):
    remote.stall_after = 1_000_000
    arguments = {"decode": ["-o", str(tmp_path / "x.npy")], "verify": ["--tiling", "default"]}[command_of]
    process = start(remote, tmp_path, command_of, "demo", "--vae", "ltx-2.3", *arguments)
    deadline = time.monotonic() + 30
    parts = []
    while time.monotonic() < deadline and not (parts and parts[0].stat().st_size > 900_000):
        parts = list(tmp_path.rglob("*.part"))
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert re.fullmatch(r".*\n.*: interrupted; 1.0\d MB are kept, the same command continues\n", err), err


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_transfer_is_continued(how, remote, tmp_path, decoder):
    remote.stall_after = 1_000_000
    process = start(remote, tmp_path, "fetch", "ltx-2.3")
    deadline = time.monotonic() + 30
    parts = []
    while time.monotonic() < deadline and not (parts and parts[0].stat().st_size > 900_000):
        parts = list(tmp_path.rglob("*.part"))
        time.sleep(0.02)
    process.send_signal(how)
    out, err = process.communicate(timeout=30)
    if how == signal.SIGINT:
        assert process.returncode == 130, err
        assert re.fullmatch(r".*\n.*: interrupted; 1.0\d MB are kept, the same command continues\n", err), err
    kept = parts[0].stat().st_size
    assert kept > 900_000
    remote.stall_after = None
    remote.released.set()
    remote.sent.clear()
    status, out, err = command(remote, tmp_path, "fetch", "ltx-2.3")
    assert status == 0 and "that are there; to" in err
    assert same(out.strip(), decoder)
    decoder_bytes = sum(value.nbytes for value in parameters(decoder).values())
    assert remote.bytes_sent() + kept < decoder_bytes + 200_000


def test_two_processes_fetch_it_once(remote, tmp_path, decoder):
    processes = [start(remote, tmp_path, "fetch", "ltx-2.3") for _ in range(2)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0] and same(results[0][0].strip(), decoder)
    decoder_bytes = sum(value.nbytes for value in parameters(decoder).values())
    assert remote.bytes_sent() < decoder_bytes + 150_000
    assert not list(tmp_path.rglob("*.part"))
