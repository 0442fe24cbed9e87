"""`verify`: its verdict, tables, pictures and exit status, and one line for whatever is wrong."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_vae_tiling import TilingConfig, cli, load_decoder, load_latents, verify_decode

WITH_TILES = ["--tiling", "aggressive", "-q"]


@pytest.fixture(scope="module")
def latents():
    """33 frames of 128x96, which tiles of 32 frames cut in two."""
    return load_latents("demo")[:, :, :5, :3, :4]


@pytest.fixture
def shot(latents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mx.save_safetensors("shot.safetensors", {"latents": latents})
    return tmp_path


def verify(*args):
    return cli.main(["verify", "shot.safetensors", "--vae", "demo", *args])


def test_visible_seams_are_told_and_drawn(shot, latents, capsys):
    plt = pytest.importorskip("matplotlib.image")
    assert verify(*WITH_TILES, "--json", "--map", "map.png", "--plot", "frames.png") == 1
    out, err = capsys.readouterr()
    fields = json.loads(out)
    expected = verify_decode(load_decoder("demo"), latents, tiling=TilingConfig.aggressive())
    assert err == "" and fields["verdict"] == expected.verdict
    assert expected.verdict.startswith("seams visible: ") and fields["seams_visible"] is True
    assert fields["seams"] == {"frames": [[16, 25]], "rows": [], "columns": []}
    assert len(fields["frames"]) == 33 and 16 <= fields["worst_frame"] < 25
    assert fields["at_seams"]["psnr"] == expected.seam_total.psnr
    assert fields["frames"][20]["at_seams"] == fields["frames"][20]["all"]
    assert fields["frames"][3]["at_seams"] == {"psnr": None, "ssim": None, "largest": None, "pixels": 0}
    assert fields["frames"][3]["elsewhere"]["pixels"] == 128 * 96
    for name in ("map.png", "frames.png"):
        picture = plt.imread(name)
        assert min(picture.shape[:2]) > 300 and picture.std() > 0.1


def test_text_is_the_verdict_and_a_table(shot, capsys):
    assert verify("--tiling", "aggressive") == 1
    out, err = capsys.readouterr()
    verdict, _, head, *rows = out.splitlines()
    assert verdict.startswith("seams visible: ") and head.split() == ["PSNR", "SSIM", "largest", "pixels"]
    assert [row.split()[0] for row in rows] == ["all", "seams", "elsewhere"]
    assert "33 frame" in err


def test_files_of_frames_are_compared_with_the_exact_decode(shot, capsys):
    assert cli.main(["decode", "shot.safetensors", "--vae", "demo", "-o", "shot.npy", "-q"]) == 0
    capsys.readouterr()
    assert verify("--against", "shot.npy", "-q") == 0
    assert capsys.readouterr().out.splitlines()[0] == "identical: 33 frames, no seams"
    frames = np.load("shot.npy")
    frames[4, 20:60, 20:60] //= 2
    np.save("shot.npy", frames)
    assert verify("--against", "shot.npy", "-q", "--json") == 1
    fields = json.loads(capsys.readouterr().out)
    assert fields["verdict"].startswith("visible differences: ") and fields["worst_frame"] == 4
    assert fields["all"]["psnr"] > fields["frames"][4]["all"]["psnr"]
    assert fields["frames"][5]["all"] == {"psnr": None, "ssim": 1.0, "largest": 0, "pixels": 128 * 96}
    assert verify("--against", "shot.npy", "-q", "--frames", "8:20") == 2
    assert "shot.npy has 33 frames, the decode 12" in capsys.readouterr().err


BAD = {
    "nothing to compare": ([], "give --tiling to verify, or --against FRAMES"),
    "kind of tiling": (["--tiling", "x"], "--tiling must be none, default"),
    "no file": (["--against", "none.mp4"], "none.mp4: no such file"),
    "another size": (["--against", "small.npy"], "frames of 64x48 pixels, the decode of 128x96"),
    "another kind of file": (["--against", "shot.safetensors"], "cannot be read as a video"),
    "memory": ([*WITH_TILES, "--memory", "1MB"], "no plan fits in 1.00 MB"),
    "place of a picture": ([*WITH_TILES, "--map", "none/map.png"], "none: no such directory"),
    "kind of picture": ([*WITH_TILES, "--plot", "plot.xyz"], "a picture must end in"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_line(shot, name, capsys):
    np.save("small.npy", np.zeros((33, 48, 64, 3), np.uint8))
    arguments, reason = BAD[name]
    assert verify(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and reason in err, err


@pytest.mark.parametrize("option", ["--map", "--plot"])
def test_without_matplotlib_the_line_says_what_to_install_before_anything_runs(
    shot, option, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["verify", "none.npy", "--vae", "none", *WITH_TILES, option, "x.png"]) == 2
    assert "pip install 'mlx_vae_tiling[figures]'" in capsys.readouterr().err


def test_help_states_the_bounds(capsys):
    with pytest.raises(SystemExit):
        cli.main(["verify", "--help"])
    out = capsys.readouterr().out
    assert "less than 40 dB at its seams" in out and "by at least 3 dB" in out
