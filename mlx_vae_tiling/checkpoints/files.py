"""Which file of a folder or repository holds a video decoder: told by headers, not by file names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from mlx_vae_tiling.checkpoints.parameters import listing
from mlx_vae_tiling.media.safetensors_header import Header, TensorEntry

PREFIXES = ("vae.decoder.", "vae_decoder.", "decoder.", "")
"""What precedes `conv_in` in checkpoints, MLX conversions, split files, and files of a decoder alone."""

FOLDERS = ("vae/decoder", "decoder", "vae", "")
"""Where decoders lie, most specific first; without regard to case."""

DIFFUSION_FOLDER = "diffusion_decoder"
"""Where a diffusion decoder lies beside a convolutional one."""

Kind = Literal["convolutional", "diffusion", "tiny"]

_SHARD = re.compile(r"(?P<stem>.*)-\d+-of-(?P<count>\d+)\.safetensors")


class Found(NamedTuple):
    """What kind of video decoder a file holds, and what precedes the names of its tensors."""

    kind: Kind
    prefix: str


def decoder_in(tensors: Mapping[str, TensorEntry]) -> Found | None:
    """The video decoder among these tensors; None if there is none."""
    for prefix in PREFIXES:
        if f"{prefix}conv_in_x_t.weight" in tensors and f"{prefix}det_stages.0.0.norm1.weight" in tensors:
            return Found("diffusion", prefix)
        kernels = (tensors.get(f"{prefix}conv_in.{conv}.weight") for conv in ("conv", "conv.conv"))
        is_video = any(kernel is not None and len(kernel.shape) == 5 for kernel in kernels)
        if is_video and any(name.startswith(f"{prefix}up_blocks.") for name in tensors):
            return Found("convolutional", prefix)
    first = tensors.get("decoder.1.weight")
    if first is not None and len(first.shape) == 4 and "decoder.3.conv.0.weight" in tensors:
        return Found("tiny", "decoder.")
    return None


def decoder_tensors(tensors: Mapping[str, TensorEntry], found: Found) -> dict[str, TensorEntry]:
    """The decoder's tensors and the per-channel statistics, under their names in the file."""
    prefix = found.prefix
    outside = prefix.removesuffix("decoder.") if prefix in ("vae.decoder.", "decoder.") else prefix
    beginnings = (prefix, f"{outside}per_channel_statistics.", f"{outside}latents_")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(beginnings)}


def _in_words(tensors: Mapping[str, TensorEntry]) -> str | None:
    """The kind and the size of the video decoder among these tensors; None if there is none."""
    found = decoder_in(tensors)
    if found is None:
        return None
    parameters = sum(math.prod(tensor.shape) for tensor in decoder_tensors(tensors, found).values())
    kind = "tiny, for previews" if found.kind == "tiny" else found.kind
    return f"{kind}, {parameters / 1e6:.3g} M parameters"


def choose_decoder_files(place: str, names: Iterable[str], read: Callable[[str], Header]) -> list[str]:
    """Finds the file, or all shards of the file, that holds a video decoder.

    Args:
        place: The folder or repository, for messages.
        names: Paths of files relative to it, with "/". Those outside of FOLDERS do not count.
        read: Reads the header of one of them.

    Raises:
        ValueError: If none holds a video decoder, or if several do that could be meant.
    """
    files = sorted(name for name in names if name.endswith(".safetensors"))
    headers: dict[str, Header] = {}

    def found_in(folder: str) -> dict[str, str]:
        found = {}
        inside = [file for file in files if str(PurePosixPath(file).parent).lower() == (folder or ".")]
        headers.update({file: read(file) for file in inside})
        for first, *others in _groups(inside):
            words = _in_words(merged([headers[file] for file in (first, *others)]).tensors)
            if words:
                found[first] = words
        return found

    beside = found_in(DIFFUSION_FOLDER)
    found = next((found for folder in FOLDERS if (found := found_in(folder))), {}) | beside
    if not found:
        raise no_decoder(place, headers.values())
    if len(found) > 1:
        listed = listing((f"{file} ({words})" for file, words in found.items()), ", ", longest=20)
        raise ValueError(f"{place} has several files with a video decoder, choose one of them: {listed}")
    return with_shards(next(iter(found)), files)


def with_shards(file: str, names: Iterable[str]) -> list[str]:
    """The file alone, or all the shards that it is one of.

    Raises:
        ValueError: If one of the shards is missing.
    """
    shard = _SHARD.fullmatch(file)
    group = next(group for group in _groups({file, *names}) if file in group)
    if shard and len(group) != int(shard["count"]):
        raise ValueError(
            f"{file} needs all {int(shard['count'])} shards in its folder, there are {len(group)} of them"
        )
    return group


def merged(headers: Iterable[Header]) -> Header:
    """The header of shards together."""
    headers = list(headers)
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    return Header(tensors, {key: value for header in headers for key, value in header.metadata.items()})


def no_decoder(place: str, headers: Iterable[Header]) -> ValueError:
    """The error of a place whose files hold no video decoder, saying what they hold instead."""
    headers = list(headers)
    names = {name for header in headers for name in header.tensors}
    if any(re.match(r"((vae[._])?encoder\.|)down_blocks\.", name) for name in names):
        return ValueError(
            f"{place} holds the encoder of a VAE but not its decoder; load the file of the decoder"
        )
    shown = listing(sorted({name.split(".")[0] for name in names}), ", ", longest=8)
    expected = ", ".join(f"{prefix}conv_in" for prefix in PREFIXES)
    return ValueError(
        f"{place} holds no LTX video decoder: a kernel of rank 5 must begin with one of {expected}; "
        + (
            f"its {len(names)} tensors begin with {shown}"
            if names
            else "it has no .safetensors file with tensors"
        )
    )


def _groups(files: Iterable[str]) -> list[list[str]]:
    """Each file alone, and the shards of one file together, in order."""
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        shard = _SHARD.fullmatch(file)
        groups.setdefault(f"{shard['stem']}-of-{shard['count']}" if shard else file, []).append(file)
    return list(groups.values())
