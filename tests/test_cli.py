"""The command: results, exit status, and one line for whatever is wrong."""

import json
import os
import re
import subprocess
import sys
import wave
from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open

from mlx_vae_tiling import TilingConfig, cli, decode_frames, load_decoder, load_latents
from mlx_vae_tiling.checkpoints.locate import DEMO
from mlx_vae_tiling.cli.options import PRESETS
from mlx_vae_tiling.media import video
from mlx_vae_tiling.runtime.resuming.output import store_folder
from mlx_vae_tiling.vae.published import PUBLISHED

pytestmark = pytest.mark.cpu

CROPPED = (slice(None), slice(None), slice(0, 2), slice(0, 3), slice(0, 4))


@pytest.fixture(scope="module")
def latents():
    return load_latents("demo")[CROPPED]


@pytest.fixture
def shot(latents, tmp_path, monkeypatch):
    """A folder to work in, with 2x3x4 latents of the demo: 9 frames of 128x96."""
    monkeypatch.chdir(tmp_path)
    mx.save_safetensors("shot.safetensors", {"latents": latents}, {"fps": "12.5"})
    return tmp_path


def run(*args):
    return cli.main([str(arg) for arg in args])


def decode(*args):
    return run("decode", "shot.safetensors", "--vae", "demo", *args)


def test_decode_writes_the_frames_of_decode_frames(shot, latents, capsys):
    assert decode("-o", "shot.npy") == 0
    wanted = np.concatenate(list(decode_frames(load_decoder("demo"), latents)))
    assert np.array_equal(np.load("shot.npy"), wanted)
    out, err = capsys.readouterr()
    assert out.startswith("shot.npy: 9 frames in ") and out.count("\n") == 1
    assert "9 frames of 128x96" in err and "decode" in err
    assert not os.path.exists("shot.npy.partial")


@pytest.mark.parametrize(("options", "rate"), [([], "25/2"), (["--fps", "24000/1001"], "24000/1001")])
def test_the_rate_is_the_option_or_the_file_s(shot, options, rate):
    import av

    assert decode("-o", "shot.mp4", "-q", *options) == 0
    with av.open("shot.mp4") as container:
        stream = container.streams.video[0]
        shape = sum(1 for _ in container.decode(stream)), stream.width, stream.height
        assert (shape, str(stream.average_rate)) == ((9, 128, 96), rate)


def test_window_options_cut_the_whole(shot):
    assert decode("-o", "whole.npy", "-q") == 0
    assert decode("-o", "part.npy", "-q", "--frames", "3:", "--crop", ":40,17:100") == 0
    whole, part = np.load("whole.npy"), np.load("part.npy")
    assert part.shape == (6, 40, 83, 3)
    # Another size of the arrays is another order of sums: one level is rounding.
    assert np.abs(whole[3:, :40, 17:100].astype(int) - part).max() <= 1


@pytest.mark.parametrize("tiling", ["none", "default", "aggressive", "conservative", "auto", "1"])
def test_tiling_kinds(shot, tiling):
    assert decode("-o", "shot.npy", "-q", "--tiling", tiling) == 0
    assert np.load("shot.npy").shape == (9, 96, 128, 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_tiles_of_its_name(preset, capsys):
    shape = (17, 34, 60)
    size = [8 * (shape[0] - 1) + 1, 32 * shape[1], 32 * shape[2]]
    arguments = ["--shape", "x".join(map(str, shape)), "--vae", "ltx-2", "--memory", "1TB", "--json"]
    assert run("plan", *arguments, "--tiling", preset) == 0
    found = json.loads(capsys.readouterr().out)["tiling"]
    expected = TilingConfig.auto(*size[1:], size[0]) if preset == "auto" else getattr(TilingConfig, preset)()
    assert found == asdict(expected)
    assert run("plan", *arguments, "--tiling", "none") == 0
    assert json.loads(capsys.readouterr().out)["tiling"] is None


def test_json_of_every_command(shot, capsys):
    assert decode("-o", "shot.npy", "--json", "-q", "--tiling", "default") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["frames"], report["path"], report["plan"]["fits"]) == (9, "shot.npy", True)
    assert run("plan", "shot.safetensors", "--vae", "demo", "--json", "--frames", "1:4") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["output"] == {"frames": [1, 4], "height": [0, 96], "width": [0, 128]}
    assert plan["windows"] == [plan["output"]]
    assert run("info", "demo", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["config"]["decoder_blocks"][0] == {"ResBlocks": {"num_layers": 2, "inject_noise": False}}
    assert (info["version"], info["spatial_scale"], info["parameters"]) == ("LTX-2.3 / 2.5", 32, 1809072)


def test_info_names_what_a_checkpoint_holds(capsys):
    assert run("info", "demo") == 0
    out = capsys.readouterr().out
    for part in ("LTX-2.3 / 2.5", "original", "float16", "1,809,072", "up 2x1x1", "13.50 latents in time"):
        assert part in out


@pytest.mark.parametrize("version", PUBLISHED)
def test_plan_of_a_published_version_needs_no_file(version, capsys):
    assert run("plan", "--shape", "16x34x60", "--vae", version, "--memory", "100GB") == 0
    assert "121 frames of 1920x1088" in capsys.readouterr().out


def test_plan_that_does_not_fit_says_what_is_needed(capsys):
    assert run("plan", "--shape", "16x34x60", "--vae", "ltx-2.3", "--memory", "900MB") == 1
    out, err = capsys.readouterr()
    assert "of 900.00 MB" in out
    assert err.startswith("mlx-vae-tiling: error: no plan fits in 900.00 MB; the smallest needs ")


def test_config_tells_what_a_file_does_not(shot, capsys):
    decoder = load_decoder("demo")
    # MLX writes null for metadata that it is not given.
    mx.save_safetensors("bare.safetensors", dict(tree_flatten(decoder.parameters())))
    assert run("info", "bare.safetensors", "--config", "ltx-2.3") == 2
    assert "must hold exactly the tensors of its config" in capsys.readouterr().err
    with safe_open(DEMO, "numpy") as file:
        (shot / "vae.json").write_text(file.metadata()["config"])
    assert run("info", "bare.safetensors", "--config", "vae.json") == 0
    assert "LTX-2.3 / 2.5" in capsys.readouterr().out


BAD = {
    "no such file": (["decode", "none.npy", "--vae", "demo", "-o", "x.npy"], "no such file of latents"),
    "no such vae": (["decode", "demo", "--vae", "none.safetensors", "-o", "x.npy"], "none.safetensors"),
    "no decoder in file": (["info", "shot.safetensors"], "shot.safetensors"),
    "suffix of latents": (["decode", "shot.txt", "--vae", "demo", "-o", "x.npy"], ".safetensors"),
    "no latents in file": (["decode", "image.npy", "--vae", "demo", "-o", "x.npy"], "(B, 128, F, H, W)"),
    "key": (["decode", "shot.safetensors", "--vae", "demo", "-o", "x.npy", "--key", "z"], "latents"),
    "overflow": (["decode", "huge.npy", "--vae", "demo", "-o", "x.npy", "--denormalized"], "not finite"),
    "NaN": (["decode", "nan.npy", "--vae", "demo", "-o", "x.npy"], "latent frames [1]"),
    "packed": (["decode", "packed.npy", "--vae", "demo", "-o", "x.npy"], "--latent-size"),
    "suffix of output": (["decode", "shot.safetensors", "--vae", "demo", "-o", "x.avi"], ".mp4"),
    "folder of output": (["decode", "shot.safetensors", "--vae", "demo", "-o", "no/x.npy"], "no: no such"),
    "codec": (["decode", "shot.safetensors", "--vae", "demo", "-o", "x.mp4", "--codec", "vp9"], "h264, hevc"),
    "rate": (["decode", "shot.safetensors", "--vae", "demo", "-o", "x.mp4", "--fps", "0"], "fps must be"),
    "frames": (["plan", "demo", "--vae", "demo", "--frames", "80:90"], "inside 0:81"),
    "crop": (["plan", "demo", "--vae", "demo", "--crop", "0:999,0:9"], "inside 0:288"),
    "memory": (["plan", "demo", "--vae", "demo", "--memory", "lots"], "'8GB'"),
    "too little memory": (["decode", "demo", "--vae", "demo", "-o", "x.npy", "--memory", "1MB"], "needs"),
    "window of tiles": (["plan", "demo", "--vae", "demo", "--tiling", "auto", "--frames", "0:9"], "crop"),
    "nothing to plan": (["plan", "--vae", "demo"], "--shape"),
    "syntax of frames": (["plan", "demo", "--vae", "demo", "--frames", "8"], "24:48"),
    "syntax of crop": (["plan", "demo", "--vae", "demo", "--crop", "0:9"], "TOP:BOTTOM,LEFT:RIGHT"),
    "syntax of size": (["plan", "--shape", "16x34", "--vae", "demo"], "FxHxW"),
    "kind of tiling": (["plan", "demo", "--vae", "demo", "--tiling", "x"], "aggressive"),
    "config": (["info", "demo", "--config", "ltx-9"], "ltx-2.3"),
    "no command": ([], "--help"),
    "no output": (["decode", "demo", "--vae", "demo"], "--output"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_line(name, shot, latents, capsys):
    np.save("image.npy", np.zeros((3, 64, 64), np.float32))
    np.save("packed.npy", np.zeros((24, 128), np.float32))
    broken = np.array(latents)
    broken[0, 5, 1, 1, 1] = np.nan
    np.save("nan.npy", broken)
    np.save("huge.npy", np.full((1, 128, 2, 3, 4), 1e38, np.float32))
    (shot / "shot.txt").write_text("latents")
    arguments, reason = BAD[name]
    try:
        status = run(*arguments, *(["-q"] if arguments[:1] == ["decode"] else []))
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("mlx-vae-tiling: error: ") and reason in err
    assert not list(shot.glob("x.*"))


def test_debug_shows_the_traceback(shot):
    with pytest.raises(FileNotFoundError):
        run("decode", "none.npy", "--vae", "demo", "-o", "x.npy", "--debug")


def test_without_pyav_the_line_says_what_to_install(shot, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    assert decode("-o", "x.mp4", "-q") == 2
    assert "pip install 'mlx_vae_tiling[video]'" in capsys.readouterr().err


def test_denormalized_latents_are_noticed_and_decode(shot, latents, capsys):
    statistics = load_decoder("demo").per_channel_statistics
    mean, std = (a.reshape(1, -1, 1, 1, 1) for a in (statistics.mean, statistics.std))
    mx.save_safetensors("raw.safetensors", {"latents": latents.astype(mx.float32) * std + mean})
    assert run("plan", "raw.safetensors", "--vae", "demo") == 0
    raw = ["decode", "raw.safetensors", "--vae", "demo", "-q"]
    assert run(*raw, "-o", "wrong.npy") == 0
    assert "--denormalized" in capsys.readouterr().err
    assert run(*raw, "-o", "right.npy", "--denormalized") == 0
    assert capsys.readouterr().err == ""
    assert decode("-o", "shot.npy", "-q") == 0
    # The saved latents are float16, these float32.
    assert np.abs(np.load("right.npy").astype(int) - np.load("shot.npy")).max() <= 2


def test_interrupted_and_resumed(shot, monkeypatch, capsys):
    assert decode("-o", "whole.npy", "-q") == 0
    write = video.VideoWriter.write

    def write_once(self, frames):
        write(self, frames)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(video.VideoWriter, "write", write_once)
        assert decode("-o", "shot.npy", "-q", "--memory", "30MB") == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "of the decode is kept in shot.partial.npy, --resume" in err
    assert decode("-o", "shot.npy", "-q") == 2
    assert "--resume" in capsys.readouterr().err
    # Another part of the video is another decode, although it has the same size.
    assert decode("-o", "shot.npy", "-q", "--resume", "--frames", "0:8") == 2
    assert "output differs" in capsys.readouterr().err
    assert decode("-o", "shot.npy", "-q", "--resume", "--memory", "30MB") == 0
    assert "from before" in capsys.readouterr().out
    assert np.abs(np.load("shot.npy").astype(int) - np.load("whole.npy")).max() <= 1
    assert not os.path.exists("shot.npy.partial")


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("100%/x.npy", "x.npy"),
        ("100%/x.mp4", "x.mp4"),
        ("100%/x_%03d.png", "x_008.png"),
        ("100%/50%%_%d.png", "50%_8.png"),
        ("100%/", "frame_00008.png"),
        ("100%/%d/", "%d/frame_00008.png"),
    ],
)
def test_a_percent_sign_in_the_name_of_a_folder_is_one(path, last, shot, capsys):
    os.mkdir("100%")
    assert decode("-o", path, "-q") == 0
    assert os.path.isfile(f"100%/{last}") and set(os.listdir()) == {"shot.safetensors", "100%"}
    assert len(list((shot / "100%").glob("**/*.partial*"))) == 0
    capsys.readouterr()
    assert decode("-o", path, "-q") == 2
    assert "the output exists already" in capsys.readouterr().err
    assert decode("-o", path, "-q", "--overwrite") == 0
    assert run("verify", "shot.safetensors", "--vae", "demo", "--against", path, "-q") in (0, 1)


def test_names_that_differ_by_a_percent_sign_are_two_decodes():
    assert store_folder("100%.npy") != store_folder("100.npy")


def test_existing_outputs_and_the_input_stay(shot, latents, capsys):
    (shot / "shot.npy").write_text("old")
    assert decode("-o", "shot.npy", "-q") == 2
    assert "--overwrite" in capsys.readouterr().err and (shot / "shot.npy").read_text() == "old"
    assert decode("-o", "shot.npy", "-q", "--overwrite") == 0
    assert np.load("shot.npy").shape == (9, 96, 128, 3)
    np.save("latents.npy", np.array(latents))
    os.symlink("latents.npy", "link.npy")
    before = (shot / "latents.npy").read_bytes()
    for name in ("latents.npy", "link.npy"):
        assert run("decode", "latents.npy", "--vae", "demo", "-o", name, "-q", "--overwrite") == 2
        assert "must be different files" in capsys.readouterr().err
    assert (shot / "latents.npy").read_bytes() == before


def test_sound(shot, capsys):
    import av

    with wave.open("sound.wav", "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0\1" * 8000)
    assert decode("-o", "shot.mp4", "-q", "--audio", "sound.wav", "--fps", "9") == 0
    assert capsys.readouterr().err == ""
    with av.open("shot.mp4") as video:
        assert video.streams.audio[0].codec_context.name == "aac"
    assert decode("-o", "short.mp4", "-q", "--audio", "sound.wav", "--fps", "3") == 0
    told = (
        "mlx-vae-tiling: warning: .*sound.wav has 1.00 s of sound for a clip of 3.00 s: the end is silent\n"
    )
    assert re.fullmatch(told, capsys.readouterr().err)


def test_interrupted_before_the_first_frame_keeps_nothing(shot, monkeypatch, capsys):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(video.VideoWriter, "__enter__", interrupt)
        assert decode("-o", "shot.npy", "-q") == 130
    assert capsys.readouterr().err == "mlx-vae-tiling: interrupted, nothing was kept\n"
    assert decode("-o", "shot.npy", "-q") == 0


@pytest.mark.parametrize("command", ["decode", "plan", "info"])
def test_help_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    out = capsys.readouterr().out
    assert end.value.code == 0 and f"examples:\n  mlx-vae-tiling {command} demo" in out


def test_module_runs():
    result = subprocess.run(
        [sys.executable, "-m", "mlx_vae_tiling", "plan", "demo", "--vae", "demo"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "81 frames of 512x288" in result.stdout and result.stderr == ""
