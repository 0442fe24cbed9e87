"""What the command says: in the words of the command line, short, in one line whatever surrounds it."""

import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vae_tiling import cli, load_latents
from mlx_vae_tiling.cli.options import in_options


@pytest.fixture
def shot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mx.save_safetensors("shot.safetensors", {"latents": load_latents("demo")[:, :, :2, :3, :4]})
    return tmp_path


# The tree that is tested, whatever is installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


def decode(*args):
    return cli.main(["decode", "shot.safetensors", "--vae", "demo", "-o", "x.npy", "-q", *args])


def told(capsys):
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("mlx-vae-tiling: error: ")
    return err.removeprefix("mlx-vae-tiling: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "--seed must be an integer from 0 to 2**64 - 1, got -1"),
        (["--steps", "4"], "--steps is for diffusion decoders, got 4 for another"),
        (["--frames", "8:90"], "--frames must be A:B inside 0:9 and not empty, got 8:90"),
        (["--frames", "8:"], None),
        (["--frames", "9:"], "--frames must be A:B inside 0:9 and not empty, got 9:"),
        (["--crop", ":97,:"], "height in --crop must be A:B inside 0:96 and not empty, got :97"),
        (
            ["--memory", "0"],
            "--memory must be a positive number of bytes or a string such as '8GB' or '6.5GiB', got '0'",
        ),
        (["--latent-size", "2x3x5"], "--latent-size must be (2, 3, 4) for shot.safetensors, got (2, 3, 5)"),
        (["--latent-size", "0x3x4"], "--latent-size must be FxHxW in latents, such as 16x17x30, got '0x3x4'"),
        (
            ["--key", "no"],
            "--key must name a tensor of shot.safetensors, got 'no'; it holds latents float16 "
            "(1, 128, 2, 3, 4)",
        ),
        (["--vae", ""], "a VAE must be named, got an empty name"),
        (["--crop", "0:999,:"], "height in --crop must be A:B inside 0:96 and not empty, got 0:999"),
        (["--crop", ":,5:5"], "width in --crop must be A:B inside 0:128 and not empty, got 5:5"),
        (["--audio", "a.wav"], "--audio is for .mp4 and .mov, leave it out for x.npy: 'a.wav'"),
        (
            ["--codec", "hevc"],
            "--codec and --quality are for H.264 and HEVC, leave them out for x.npy: 'hevc', None",
        ),
        (
            ["-o", "x.gif"],
            "--output must end in .mp4, .mov, .npy, %05d.png or / (PNG in a directory), got x.gif",
        ),
        (
            ["--tiling", "default", "--frames", "0:3"],
            "blended tiles decode all of the output; crop its frames, without a window (--frames, --crop)",
        ),
    ],
)
def test_messages_name_the_options_of_the_command(shot, options, message, capsys):
    assert decode(*options) == (0 if message is None else 2)
    if message is not None:
        assert told(capsys) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "batch.npy", "-o", "x.npy"], "save each video in a file of its own"),
        (["decode", "packed.npy", "-o", "x.npy"], "packed latents need --latent-size FxHxW with F*H*W = 24"),
        (["decode", "shot.safetensors", "-o", "there.npy"], "replace it (--overwrite) or choose"),
        (["decode", "shot.safetensors", "-o", "link.mp4"], "nowhere: no such directory to write in, create"),
        (["plan", "--shape", "2x0x4"], "--shape must be FxHxW in latents, such as 16x17x30, got '2x0x4'"),
        (["plan", "demo", "--tiling", "default", "--ranks", "2"], "several take windows: --tiling none"),
    ],
)
def test_messages_give_the_way_out_that_the_command_has(shot, arguments, message, capsys):
    latents = np.zeros((2, 128, 2, 3, 4), np.float32)
    np.save("batch.npy", latents)
    np.save("packed.npy", latents[:1].reshape(1, 128, 24).swapaxes(1, 2))
    np.save("there.npy", latents)
    os.symlink("nowhere/x.mp4", "link.mp4")
    assert cli.main([*arguments, "--vae", "demo", *(["-q"] if arguments[0] == "decode" else [])]) == 2
    said = told(capsys)
    assert message in said and "=True" not in said and "=None" not in said


def test_a_plan_that_does_not_fit_names_the_option(shot, capsys):
    assert cli.main(["plan", "demo", "--vae", "demo", "--memory", "1MB"]) == 1
    assert capsys.readouterr().err.endswith(": raise --memory\n")


def test_other_words_stay():
    text = "the seed is 3, the window height of a house, slice(a), noise_scaled, got None: 3"
    assert in_options(text) == text.replace("window height", "height in --crop")


@pytest.mark.parametrize(("option", "value"), [("--timestep", "0.1"), ("--noise-scale", "0.5")])
def test_what_does_nothing_is_said(shot, option, value, capsys):
    assert decode(option, value) == 0
    err = capsys.readouterr().err
    assert err == (
        f"mlx-vae-tiling: warning: {option} does nothing: this decoder is not conditioned on a timestep\n"
    )


def test_a_long_list_of_frames_is_shortened(shot, capsys):
    latents = np.zeros((1, 128, 400, 2, 2), np.float32)
    latents[:, :, 3:] = np.inf
    np.save("bad.npy", latents)
    assert cli.main(["decode", "bad.npy", "--vae", "demo", "-o", "x.npy", "-q"]) == 2
    assert told(capsys).endswith("in the latent frames [3, 4, 5, 6, 7, 8, 9, 10] and 389 more")


def test_a_single_latent_is_told_as_one(shot, capsys):
    assert cli.main(["plan", "demo", "--vae", "demo", "--tiling", "1", "--memory", "13MB"]) == 0
    assert "windows see 1 latent around them" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dangling link", "file"])
def test_what_is_in_the_way_of_the_journal_is_named(shot, kind, capsys):
    if kind == "file":
        (shot / "x.npy.partial").write_text("mine")
    else:
        os.symlink("nowhere", "x.npy.partial")
    assert decode() == 2
    assert told(capsys).startswith("x.npy.partial: a file, or a link that leads nowhere, is where ")
    assert os.path.lexists("x.npy.partial")


def test_a_link_to_a_folder_is_where_the_journal_is_kept(shot):
    os.mkdir("elsewhere")
    os.symlink("elsewhere", "x.npy.partial")
    assert decode() == 0 and os.listdir("elsewhere") == []


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "null", "3"])
def test_a_journal_of_nested_brackets_is_one_that_cannot_be_read(shot, text, capsys):
    (shot / "x.npy.partial").mkdir()
    (shot / "x.npy.partial/journal.json").write_text(text)
    assert decode("--resume") == 2
    assert "journal.json cannot be read (" in told(capsys)
    assert decode("--overwrite") == 0


def process(arguments, **options):
    command = [sys.executable, "-m", "mlx_vae_tiling", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **{"env": ENVIRONMENT, **options}
    )


def test_a_reader_that_has_enough_is_no_error(shot):
    """As `plan ... | head -1`, which closes the pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mlx_vae_tiling", "plan", "demo", "--vae", "demo"]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    os.close(writing)
    assert (result.stderr, result.returncode) == ("", 141)


def test_a_missing_temporary_folder_is_named(shot):
    running = process(
        ["decode", "shot.safetensors", "--vae", "demo", "-o", "x.npy", "-q"],
        env={**ENVIRONMENT, "TMPDIR": "/none"},
    )
    out, err = running.communicate()
    # MLX needs one only where it compiles for the CPU.
    if running.returncode:
        assert (out, err.count("\n")) == ("", 1) and "directory for temporary files, TMPDIR is '/none'" in err


@pytest.mark.parametrize("name", ["x.mp4", "x.npy", "x_%d.png"])
def test_a_disk_that_is_full_before_the_first_frame_keeps_nothing(shot, name):
    """A limit of the size of files, of which the system tells as of a full disk."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2048, 2048))
    arguments = ["decode", "shot.safetensors", "--vae", "demo", "-o", name, "-q"]
    running = process(arguments, preexec_fn=limit)
    out, err = running.communicate()
    assert (running.returncode, out, err) == (2, "", f"mlx-vae-tiling: error: {name}: File too large\n")
    assert os.listdir() == ["shot.safetensors"]


def test_json_of_a_plan_goes_to_a_pipe(shot):
    out, err = process(["plan", "demo", "--vae", "demo", "--json"]).communicate()
    assert json.loads(out)["fits"] and err == ""
