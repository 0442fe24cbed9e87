"""The picture of the page on streaming, and what is said where matplotlib is missing."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "draw_streaming.py"))
Level, draw_streaming = EXAMPLE["Level"], EXAMPLE["draw_streaming"]
LEVELS = [Level("latents", 1, 0, 4, 1, 3), Level("pixels", 32, 32, 96, 32, 96)]


def test_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    draw_streaming(tmp_path / "picture.png", LEVELS, 4)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mlx_vae_tiling\[figures\]'"):
        draw_streaming(tmp_path / "picture.png", LEVELS, 4)
    assert not list(tmp_path.iterdir())
