"""The examples run, are short, and make what they say."""

import runpy
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vae_tiling import load_latents

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = ("decode_latents", "stream_to_disk", "decode_with_any_decoder", "contact_sheet")


@pytest.fixture
def shot(tmp_path, monkeypatch):
    """2x2x3 latents of the demo: 9 frames of 96x64."""
    monkeypatch.chdir(tmp_path)
    latents = load_latents("demo")[:, :, :2, 3:5, 6:9]
    mx.save_safetensors("shot.safetensors", {"latents": latents})
    return tmp_path


def run(name, *arguments):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)


@pytest.mark.parametrize("name", SHORT)
def test_examples_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 50


def test_decode_latents(shot, capsys):
    run("decode_latents", "shot.safetensors", "demo", "shot.npy", "1GB")
    assert np.load("shot.npy").shape == (9, 64, 96, 3)
    assert "shot.npy: 9 frames" in capsys.readouterr().out


def test_decode_latents_refuses_what_does_not_fit(shot):
    with pytest.raises(ValueError, match="raise the memory limit"):
        run("decode_latents", "shot.safetensors", "demo", "shot.npy", "1MB")


def test_stream_to_disk(shot, capsys):
    run("decode_latents", "shot.safetensors", "demo", "shot.npy")
    run("stream_to_disk", "shot.safetensors", "demo", "shot.rgb", "2:9")
    raw = np.fromfile("shot.rgb", np.uint8).reshape(7, 64, 96, 3)
    assert np.abs(raw.astype(int) - np.load("shot.npy")[2:]).max() <= 1
    assert "frame 8: mean colour" in capsys.readouterr().out


def test_decode_with_any_decoder(capsys):
    assert run("decode_with_any_decoder") < 0.05
    assert "frames of 256x160 are finished" in capsys.readouterr().out


def test_contact_sheet(shot):
    from matplotlib.image import imread

    run("contact_sheet", "shot.safetensors", "demo", "sheet.png")
    assert imread("sheet.png").shape[:2] == (64, 96)


def test_the_picture_of_the_readme_is_small():
    assert (EXAMPLES / "demo.png").stat().st_size < 400_000


def test_compare_with_peers(capsys):
    """Peers come from elsewhere: here only this package, at the smallest width."""
    figures = run("compare_with_peers", "--width", "4", "--latents", "2x3x3", "--candidates", "planned,whole")
    assert set(figures) == {"planned", "whole"}
    assert all(runs[0]["arrays"] > 0 and runs[0]["seconds"] > 0 for runs in figures.values())
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "this package" in line]
    assert [int(row[-1]) for row in table] == [0, 0]


def test_compare_with_peers_ends_what_does_not_fit(capsys, monkeypatch):
    read = Path.read_text
    no_memory = "MemAvailable: 10 kB"
    monkeypatch.setattr(Path, "read_text", lambda p: no_memory if p.name == "meminfo" else read(p))
    monkeypatch.setattr(Path, "exists", lambda p: True)
    figures = run("compare_with_peers", "--width", "4", "--latents", "2x3x3", "--candidates", "planned")
    assert figures == {}
    assert "as planned: does not fit into this machine's memory" in capsys.readouterr().out


def test_compare_with_peers_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = "planned,fork,diffusers"
    figures = run("compare_with_peers", "--width", "4", "--latents", "1x2x2", "--candidates", names)
    assert set(figures) == {"planned"}
    out = capsys.readouterr().out
    assert "fork is missing: pip install mlx-video-with-audio==0.1.37" in out
    assert "diffusers is missing: pip install torch diffusers" in out
