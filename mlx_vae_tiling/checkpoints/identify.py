"""Which decoder a header describes: its tensors by our names, its config, layout and version."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mlx_vae_tiling.checkpoints.configs import Config, choose_config
from mlx_vae_tiling.checkpoints.diffusion_names import diffusion_parameters
from mlx_vae_tiling.checkpoints.files import Found, Kind, decoder_in, decoder_tensors, no_decoder
from mlx_vae_tiling.checkpoints.parameters import differences, listing
from mlx_vae_tiling.checkpoints.tensor_names import Axes, kernel_axes, layout_of, rename
from mlx_vae_tiling.dtypes import FLOAT_TYPES
from mlx_vae_tiling.media.safetensors_header import Header, TensorEntry, shortened
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.published import AnyConfig, version_of

STORED_NAMES = {kind.stored_name: kind.name for kind in FLOAT_TYPES}
MOST_TENSORS = 4000
"""Of a decoder; published ones have less than 300."""

LONGEST_NAME = 200
_FIRST: dict[Kind, str] = {
    "convolutional": "conv_in.conv.weight",
    "diffusion": "conv_in.weight",
    "tiny": "decoder.1.weight",
}
_ATTENTION = re.compile(r"\b(attentions?|attn\d?|to_qkv|to_q)\.")
_SCALES = re.compile(r"(_scale|_scale_inv|\.scales|_scales)$")


@dataclass(frozen=True)
class CheckpointInfo:
    """What the header of a checkpoint says about its video decoder.

    Args:
        path: The file, or the first of its shards.
        layout: "combined" (a whole checkpoint), "original" (the VAE alone), "diffusers", "mlx-video",
            "mlx-forge" (`vae_decoder.` precedes all names), "taehv" or "bare" (nothing precedes).
        version: A published one such as "LTX-2.3 / 2.5", or "custom".
        config: The architecture.
        dtype: Stored dtype of the kernels: "float32", "float16" or "bfloat16".
        decoder_bytes: Stored size of the decoder's tensors.
    """

    path: Path
    layout: str
    version: str
    config: AnyConfig
    dtype: str
    decoder_bytes: int


class StoredTensor(NamedTuple):
    """Where a parameter is stored.

    Attributes:
        parts: Tensors that lie one after the other along its first axis; mostly one.
        axes: How to transpose them; None for not at all.
        gate: What multiplies its rows; None for nothing.
    """

    parts: tuple[TensorEntry, ...]
    axes: Axes | None = None
    gate: TensorEntry | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the parameter."""
        first, *others = (part.shape for part in self.parts)
        whole = (first[0] + sum(shape[0] for shape in others), *first[1:]) if others else first
        return tuple(whole[axis] for axis in self.axes) if self.axes else whole


@dataclass(frozen=True)
class StoredDecoder:
    """The decoder's parameters, by our names."""

    info: CheckpointInfo
    tensors: Mapping[str, StoredTensor]


def identify(
    path: Path,
    header: Header,
    texts: Iterable[tuple[str, str]],
    given: Config | None,
    assumed: str | None = None,
) -> StoredDecoder:
    """Names and checks the tensors of the decoder in a file.

    Args:
        path: The file, or the first of its shards; only named here.
        header: Its header, or that of all shards.
        texts: JSON in it and beside it, each with its origin, most specific first.
        given: The config that the caller passed, if any.
        assumed: The name of the published version that it is taken for where nothing tells.

    Raises:
        OSError: If a file with a config cannot be read.
        ValueError: If it holds no decoder of a supported kind, or not exactly the tensors of its config.
    """
    found = decoder_in(header.tensors)
    if found is None:
        raise no_decoder(str(path), [header])
    entries = decoder_tensors(header.tensors, found)
    _check_supported(path, entries, found)
    names, tensors = _parameters(entries, found)
    shapes = {ours: tensor.shape for ours, tensor in tensors.items()}
    config = choose_config(given, assumed, str(path), texts, names, shapes, found.kind)
    if isinstance(config, DecoderConfig):
        config = config.narrowed(_narrowings(shapes))
    problems = differences(config, names, shapes)
    if problems:
        raise ValueError(f"{path} must hold exactly the tensors of its config: {listing(problems)}")
    version = version_of(config)
    info = CheckpointInfo(
        path=path,
        layout=layout_of(entries, found),
        version=version.title if version else "custom",
        config=config,
        dtype=STORED_NAMES[tensors[_FIRST[found.kind]].parts[0].dtype],
        decoder_bytes=sum(part.size_in_bytes for tensor in tensors.values() for part in tensor.parts),
    )
    return StoredDecoder(info, tensors)


def _parameters(
    entries: Mapping[str, TensorEntry], found: Found
) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Our name of each tensor, or of several that are one parameter, and the parameters by our names."""
    if found.kind == "diffusion":
        stored = diffusion_parameters(entries, found.prefix)
        tensors = {
            ours: StoredTensor(
                tuple(entries[name] for name in one.parts), gate=entries[one.gate] if one.gate else None
            )
            for ours, one in stored.items()
        }
        return {", ".join(one.parts): ours for ours, one in stored.items()}, tensors
    if found.kind == "tiny":
        axes = {name: (0, 2, 3, 1) if len(entry.shape) == 4 else None for name, entry in entries.items()}
        return {name: name for name in entries}, {
            name: StoredTensor((entry,), axes[name]) for name, entry in entries.items()
        }
    names = rename(entries, found.prefix)
    kernels = kernel_axes({ours: entries[name].shape for name, ours in names.items()})
    return names, {ours: StoredTensor((entries[name],), kernels.get(ours)) for name, ours in names.items()}


def _narrowings(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, tuple[int, int]]:
    """Channels before and after each narrowing block, of which tensors say more than configs do."""
    found = {}
    for name, shape in shapes.items():
        if (block := re.fullmatch(r"up_blocks\.(\d+)\.conv1\.conv\.weight", name)) and len(shape) == 5:
            found[int(block[1])] = shape[-1], shape[0]
    return found


def _check_supported(path: Path, tensors: Mapping[str, TensorEntry], found: Found) -> None:
    attention = [name for name in tensors if _ATTENTION.search(name)]
    if attention and found.kind == "convolutional":
        raise ValueError(f"{path}: attention blocks are not supported, got {listing(attention)}")
    unknown = [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in STORED_NAMES]
    quantized = unknown or [name for name in tensors if _SCALES.search(name)]
    if quantized:
        raise ValueError(
            f"{path}: the decoder's tensors must be F32, F16 or BF16, got {listing(quantized)}; "
            "load a VAE that is not quantised"
        )
    longest = max(tensors, key=len)
    if len(tensors) > MOST_TENSORS or len(longest) > LONGEST_NAME:
        raise ValueError(
            f"{path}: a decoder may have {MOST_TENSORS} tensors with names of {LONGEST_NAME} characters, "
            f"this one has {len(tensors)}, one of them named {shortened(longest)}"
        )
