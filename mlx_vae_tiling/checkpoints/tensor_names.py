"""From the names and axes of every published file layout to those of `VideoDecoder`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mlx_vae_tiling.checkpoints.files import Found

Axes = tuple[int, ...]

KERNEL_AXES: tuple[Axes, ...] = ((0, 2, 3, 4, 1), (0, 1, 2, 3, 4), (0, 1, 2, 4, 3))
"""What turns (O, I, 3, 3, 3) of torch, (O, 3, 3, 3, I) of MLX and (O, 3, 3, I, 3), seen in malformed
conversions, into (O, 3, 3, 3, I)."""

STATISTICS = {
    f"{place}{name}": f"per_channel_statistics.{ours}"
    for ours in ("mean", "std")
    for place, name in (
        ("per_channel_statistics.", f"{ours}-of-means"),
        ("per_channel_statistics.", f"_{ours}_of_means"),
        ("per_channel_statistics.", ours),
        ("", f"latents_{ours}"),
    )
}
# Statistics of the encoder's deviations, and norms that some files list although they have no weights.
_UNUSED = re.compile(
    r"per_channel_statistics\.(mean-of-stds|mean-of-stds_over_std-of-means|channel)|"
    r"(.*\.)?(norm1|norm2|conv_norm_out|norm_out)\..*"
)
_RENAMED = (
    # mlx-video doubles `.conv`, except in upsamplers, where the originals already have it twice.
    (re.compile(r"\b(conv_in|conv_out|conv1|conv2|up_blocks\.\d+\.conv)\.conv\.conv\."), r"\1.conv."),
    (re.compile(r"\.resnets\."), ".res_blocks."),
    (re.compile(r"\bconv_shortcut\.conv\."), "conv_shortcut."),
    (re.compile(r"\bnorm3\.(weight|bias)"), r"norm3.norm.\1"),
    (re.compile(r"^(time_embedder\.|scale_shift_table$)"), r"last_\1"),
)
_DIFFUSERS_BLOCK = re.compile(r"(?:mid_block|up_blocks\.(\d+))\.(?:(conv_in|upsamplers)\.(?:0\.)?)?")
_DIFFUSERS_ORDER = ("conv_in", "upsamplers", None)


def layout_of(names: Iterable[str], found: Found) -> str:
    """A word for the layout of the decoder with these tensors."""
    if found.kind == "tiny":
        return "taehv"
    prefix = found.prefix
    inner = {name.removeprefix(prefix) for name in names}
    if any(name.startswith(("mid_block.", "t_embedder.timestep_embedder.")) for name in inner):
        return "diffusers"
    if "conv_in.conv.conv.weight" in inner:
        return "mlx-video"
    return {"vae.decoder.": "combined", "vae_decoder.": "mlx-forge", "decoder.": "original"}.get(
        prefix, "bare"
    )


def rename(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Finds the parameter of `VideoDecoder` that each stored tensor is.

    Args:
        names: Names in the file of the decoder's tensors and of the statistics.
        prefix: What precedes the decoder's own.

    Returns:
        Our name of each, in the order given, without those of tensors that decoding does not use.
        Tensors of no known layout keep their names, without the prefix.
    """
    inner = {name: name.removeprefix(prefix) for name in names}
    if prefix == "vae.decoder.":
        inner = {name: short.removeprefix("vae.") for name, short in inner.items()}
    numbers = _diffusers_numbers(inner.values())
    renamed = {}
    for name, short in inner.items():
        if short in STATISTICS:
            renamed[name] = STATISTICS[short]
        elif not _UNUSED.fullmatch(short):
            renamed[name] = _original_name(short, numbers)
    return renamed


def kernel_axes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Axes]:
    """How to transpose each kernel of rank 5 to (O, 3, 3, 3, I).

    A kernel of three channels can be read in several ways; it takes that of most others in the file.
    """
    readings = {
        name: [axes for axes in KERNEL_AXES if all(shape[axis] == 3 for axis in axes[1:4])]
        for name, shape in shapes.items()
        if len(shape) == 5
    }
    certain = Counter(r[0] for r in readings.values() if len(r) == 1)
    common = max(KERNEL_AXES, key=lambda axes: certain[axes])
    return {name: r[0] if len(r) == 1 else common for name, r in readings.items()}


def _diffusers_numbers(names: Iterable[str]) -> dict[str, int]:
    """The original number of each diffusers block: within `up_blocks.I`, in the order in which it runs."""
    names = list(names)
    if not any(name.startswith("mid_block.") for name in names):
        return {}
    blocks = {match[0]: match for name in names if (match := _DIFFUSERS_BLOCK.match(name))}
    order = sorted(blocks, key=lambda b: (int(blocks[b][1] or -1), _DIFFUSERS_ORDER.index(blocks[b][2])))
    return {block: number for number, block in enumerate(order)}


def _original_name(name: str, numbers: Mapping[str, int]) -> str:
    if numbers and (block := _DIFFUSERS_BLOCK.match(name)):
        name = f"up_blocks.{numbers[block[0]]}.{name[block.end() :]}"
    # `mid_block.resnets.0` has become `up_blocks.0.resnets.0`, so that only patterns remain.
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name
