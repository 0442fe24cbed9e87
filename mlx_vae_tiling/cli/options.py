"""The values of options, read from what a command line says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mlx_vae_tiling.tiling import TilingConfig
from mlx_vae_tiling.vae.config import Config
from mlx_vae_tiling.vae.published import NAMES
from mlx_vae_tiling.vae.regions import Window

SOURCE = 'VAE: a file, a directory, a published version, owner/name on the Hugging Face Hub, or "demo"'
"""What `load_decoder` takes, for help."""

PRESETS = ("default", "aggressive", "conservative", "auto")


def parse_window(frames: str | None, crop: str | None) -> Window | None:
    """Reads "24:48" and "0:256,128:384", rows before columns; None if there is neither."""
    if frames is None and crop is None:
        return None
    rows, comma, columns = (":,:" if crop is None else crop).partition(",")
    bounds = [_slice("" if text is None else text) for text in (frames or ":", rows, columns)]
    if not comma or None in bounds[1:]:
        raise ValueError(f"--crop must be TOP:BOTTOM,LEFT:RIGHT, such as 0:256,128:384, got {crop!r}")
    if bounds[0] is None:
        raise ValueError(f"--frames must be A:B, such as 24:48, 24: or :48, got {frames!r}")
    return Window(*bounds)


def _slice(text: str) -> slice | None:
    match = re.fullmatch(r"(\d*):(\d*)", text.strip())
    return slice(*(int(bound) if bound else None for bound in match.groups())) if match else None


_OPTIONS = {
    r"\bnum_inference_steps\b": "--steps",
    r"\bnoise_scale\b": "--noise-scale",
    r"^codec and quality\b": "--codec and --quality",
    r"^(seed|quality|fps|codec|audio)\b": r"--\1",
    r"^path must end\b": "--output must end",
    r"\bkey \(--key\)": "--key",
    r"^latent_size must\b": "--latent-size must",
    r"\blatent_size=\(F, H, W\) \((--latent-size FxHxW)\)": r"\1",
    r"\ba (timestep), got": r"a --\1, got",
    r"\bwindow frames\b": "--frames",
    r"\bwindow (height|width)\b": r"\1 in --crop",
    r"\ba non-empty slice inside (\S+) of step 1\b": r"A:B inside \1 and not empty",
    r"\bslice\((\w+), (\w+), None\)": r"\1:\2",
    r"(?<=\d):None\b|\bNone:(?=\d)": ":",
    r"\b\w+=True, (?=--)": "",
    r"\bwithout resume\b": "without --resume",
    r"\btiling=None\b": "--tiling none",
    r"\bdecode latents\[i : i \+ 1\]": "save each video in a file of its own",
    r"\bgive a tiling to verify, or frames to compare with\b": "give --tiling to verify, or --against FRAMES",
    r"\bthe memory limit\b|^memory\b": "--memory",
    r"^ranks\b": "--ranks",
}
"""What Python's messages call the options of the command."""


def in_options(text: str) -> str:
    """A message of the package in the words of a command line."""
    for name, option in _OPTIONS.items():
        text = re.sub(name, option, text)
    return text


def parse_size(option: str, text: str | None) -> tuple[int, int, int] | None:
    """Reads "16x17x30"."""
    match = None if text is None else re.fullmatch(r"x".join([r"0*([1-9]\d*)"] * 3), text)
    if text is not None and match is None:
        raise ValueError(f"{option} must be FxHxW in latents, such as 16x17x30, got {text!r}")
    return match and (int(match[1]), int(match[2]), int(match[3]))


def parse_tiling(text: str, config: Config, shape: tuple[int, ...]) -> TilingConfig | int | None:
    """Reads "none", a preset of `TilingConfig`, or a number of latents around each window.

    Args:
        text: What is said.
        config: Of the decoder, and
        shape: (B, C, F, H, W) of the latents, from which "auto" chooses.
    """
    if text.isdecimal():
        return int(text)
    if text not in ("none", *PRESETS):
        raise ValueError(f"--tiling must be none, {', '.join(PRESETS)} or a number of latents, got {text!r}")
    if text == "auto":
        t, s = config.temporal_scale, config.spatial_scale
        return TilingConfig.auto(s * shape[3], s * shape[4], t * (shape[2] - 1) + 1)
    return None if text == "none" else getattr(TilingConfig, text)()


def parse_config(text: str | None) -> Any:
    """What `load_decoder` takes as config: the name of a version, or the contents of a .json file."""
    if text is None or text in NAMES:
        return text
    try:
        return json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--config must be one of {', '.join(NAMES)} or a .json file, got {text!r} ({error})"
        ) from error
