"""Every block of code in the README runs; its two first commands are what CI runs."""

import re
import shlex
from pathlib import Path

import pytest

from mlx_vae_tiling import cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlx_vae_tiling"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
LINES = [line for language, text in BLOCKS if language == "console" for line in text.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("mlx-vae-tiling ")]
INSTALL_AND_DECODE, INSTALL_AND_TEST = [line for line in LINES if line.startswith("pip install ")]


def test_every_block_is_run_below():
    assert {language for language, _ in BLOCKS} == {"python", "console"}
    assert sorted(LINES) == sorted([*COMMANDS, INSTALL_AND_DECODE, INSTALL_AND_TEST])


@pytest.mark.parametrize("code", PYTHON)
def test_python(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    out = capsys.readouterr().out
    for printed in re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE):
        assert printed in out


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.slow
def test_the_first_command_makes_the_demonstration(tmp_path, monkeypatch):
    import av

    monkeypatch.chdir(tmp_path)
    install, decode = INSTALL_AND_DECODE.split(" && ")
    assert install == "pip install '.[video]'"
    assert cli.main([*shlex.split(decode)[1:], "--quiet"]) == 0
    with av.open("demo.mp4") as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (len(frames), frames[0].shape, stream.average_rate) == (81, (288, 512, 3), 25)
    # Nothing is like a natural picture: neither flat nor noise, and it moves.
    first, last = (frame.astype(float) for frame in (frames[0], frames[-1]))
    assert first.std() > 30 and abs(first[1:] - first[:-1]).mean() < 15
    assert abs(first - last).mean() > 5


def test_ci_runs_both_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    readme_commands = re.search(r"grep '(.*)' README.md", ci)
    assert readme_commands and re.findall(readme_commands[1] + ".*", README, re.MULTILINE) == [
        INSTALL_AND_DECODE,
        INSTALL_AND_TEST,
    ]
    assert INSTALL_AND_TEST.split(" && ")[1] == "pytest -n 2"
    assert INSTALL_AND_TEST.replace(" && ", "\n") in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_tour_names_what_there_is():
    tour = README.split("## A tour of the files")[1].split("\n## ")[0]
    for row in tour.splitlines():
        names = re.findall(r"`([\w./]+)`", row.split("|")[1]) if row.startswith("| `") else []
        for name in names:
            # After the first name of a row, those in the same folder go without it.
            places = [PACKAGE / name, PACKAGE / Path(names[0]).parent / name]
            assert any(place.exists() for place in places), name
    listed = " ".join(tour.split("`")[1::2])
    for part in PACKAGE.iterdir():
        if part.is_dir() and part.name != "__pycache__":
            assert f"{part.name}/" in listed
