"""From the names of every published file of a diffusion decoder to those of `DiffusionDecoder`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from mlx_vae_tiling.checkpoints.tensor_names import STATISTICS

# Nothing reads them: the embedding of keyframes, the heads of a coarse preview.
_UNUSED = re.compile(r"type_emb|coarse_.*|per_channel_statistics\..*")
_RENAMED = (
    (re.compile(r"\btimestep_embedder\.linear_1\."), "mlp.0."),
    (re.compile(r"\btimestep_embedder\.linear_2\."), "mlp.2."),
    (re.compile(r"\.to_out\.0\."), ".proj."),
    (re.compile(r"\.norm_([qk])\."), r".\1_norm."),
)
_SEPARATE = re.compile(r"\.(?:qkv\.)?to_([qkv])\.")
_GATED = {".attn.proj.": ".gate_msa", ".mlp.w_down.": ".gate_mlp", ".context_proj.": ".gate_ctx"}
"""What each gate multiplies the output of, and so the rows of the weight and the bias."""


class Stored(NamedTuple):
    """The tensors of a file that a parameter is made of.

    Attributes:
        parts: Their names; several of them lie one after the other along the first axis.
        gate: The name of the gate that multiplies the rows; None for none.
    """

    parts: tuple[str, ...]
    gate: str | None = None


def diffusion_parameters(names: Iterable[str], prefix: str) -> dict[str, Stored]:
    """Finds the parameters of `DiffusionDecoder` among stored tensors.

    Args:
        names: Names in the file of the decoder's tensors and of the statistics.
        prefix: What precedes the decoder's own.

    Returns:
        By our names, without tensors that decoding does not use. Tensors of no known layout keep their names,
        without the prefix.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    gates = {}
    for name in names:
        short = name.removeprefix(prefix)
        if prefix == "vae.decoder.":
            short = short.removeprefix("vae.")
        if short in STATISTICS:
            found[STATISTICS[short]] = [("", name)]
        elif short.endswith(tuple(_GATED.values())):
            gates[short] = name
        elif not _UNUSED.fullmatch(short):
            for pattern, replacement in _RENAMED:
                short = pattern.sub(replacement, short)
            separate = _SEPARATE.search(short)
            found.setdefault(_SEPARATE.sub(".qkv.", short), []).append(
                (separate[1] if separate else "", name)
            )
    stored = {}
    for ours, parts in found.items():
        ordered = tuple(name for _, name in sorted(parts, key=lambda part: "qkv".find(part[0])))
        stored[ours] = Stored(ordered, gates.get(_gate_of(ours)))
    return stored


def _gate_of(ours: str) -> str:
    for target, gate in _GATED.items():
        before, found, _ = ours.partition(target)
        if found:
            return before + gate
    return ""
