"""Ctrl-C before the command is ready, and what the package loads when."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = "import sys; from mlx_vae_tiling.cli import main; sys.exit(main())"
"""What an installed command runs."""


def ran(folder, *arguments):
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )


@pytest.mark.parametrize("module", ["numpy", "safetensors", "argparse"])
@pytest.mark.parametrize("command", [("-m", "mlx_vae_tiling"), ("-c", SCRIPT)], ids=["module", "script"])
def test_interrupted_while_modules_are_loaded(module, command, tmp_path):
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    done = ran(tmp_path, *command, "info", "demo")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "mlx-vae-tiling: interrupted, nothing was kept\n"


def test_the_package_offers_what_it_lists(tmp_path):
    """All of it comes with the first name that is asked for, and only then."""
    code = """
import sys, mlx_vae_tiling
assert "mlx.core" not in sys.modules and "numpy" not in sys.modules
from mlx_vae_tiling import VideoDecoder
import mlx_vae_tiling.public as public
assert mlx_vae_tiling.__all__ == ["__version__", *public.__all__]
assert set(mlx_vae_tiling.__all__) <= set(dir(mlx_vae_tiling))
assert all(getattr(mlx_vae_tiling, name) is getattr(public, name) for name in public.__all__)
assert mlx_vae_tiling.vae.decoder.VideoDecoder is VideoDecoder
assert not hasattr(mlx_vae_tiling, "nothing") and not hasattr(mlx_vae_tiling, "__nothing__")
"""
    done = ran(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
