"""Which decoder a header describes: its tensors by our names, its config, layout and version."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_vae_tiling.checkpoints.configs import Config, choose_config
from mlx_vae_tiling.checkpoints.files import decoder_prefix, decoder_tensors, no_decoder
from mlx_vae_tiling.checkpoints.parameters import differences, listing
from mlx_vae_tiling.checkpoints.tensor_names import Axes, kernel_axes, layout_of, rename
from mlx_vae_tiling.dtypes import FLOAT_TYPES
from mlx_vae_tiling.media.safetensors_header import Header, TensorEntry, shortened
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.published import version_of

STORED_NAMES = {kind.stored_name: kind.name for kind in FLOAT_TYPES}
MOST_TENSORS = 4000
"""Of a decoder; published ones have less than 300."""

LONGEST_NAME = 200
_ATTENTION = re.compile(r"\b(attentions?|attn\d?|to_qkv|to_q)\.")
_SCALES = re.compile(r"(_scale|_scale_inv|\.scales|_scales)$")


@dataclass(frozen=True)
class CheckpointInfo:
    """What the header of a checkpoint says about its video decoder.

    Args:
        path: The file, or the first of its shards.
        layout: "combined" (a whole checkpoint), "original" (the VAE alone), "diffusers", "mlx-video",
            "mlx-forge" (`vae_decoder.` precedes all names) or "bare" (nothing does).
        version: A published one such as "LTX-2.3 / 2.5", or "custom".
        config: The architecture.
        dtype: Stored dtype of the kernels: "float32", "float16" or "bfloat16".
        decoder_bytes: Stored size of the decoder's tensors.
    """

    path: Path
    layout: str
    version: str
    config: DecoderConfig
    dtype: str
    decoder_bytes: int


@dataclass(frozen=True)
class StoredDecoder:
    """Where the decoder's tensors lie, by our names, and how to transpose its kernels."""

    info: CheckpointInfo
    entries: Mapping[str, TensorEntry]
    axes: Mapping[str, Axes]


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
    prefix = decoder_prefix(header.tensors)
    if prefix is None:
        raise no_decoder(str(path), [header])
    tensors = decoder_tensors(header.tensors, prefix)
    _check_supported(path, tensors)
    names = rename(tensors, prefix)
    axes = kernel_axes({ours: tensors[name].shape for name, ours in names.items()})
    shapes = {ours: _shape(tensors[name], axes.get(ours)) for name, ours in names.items()}
    config = choose_config(given, assumed, str(path), texts, names, shapes)
    problems = differences(config, names, shapes)
    if problems:
        raise ValueError(f"{path} must hold exactly the tensors of its config: {listing(problems)}")
    entries = {ours: tensors[name] for name, ours in names.items()}
    version = version_of(config)
    info = CheckpointInfo(
        path=path,
        layout=layout_of(tensors, prefix),
        version=version.title if version else "custom",
        config=config,
        dtype=STORED_NAMES[entries["conv_in.conv.weight"].dtype],
        decoder_bytes=sum(entry.size_in_bytes for entry in entries.values()),
    )
    return StoredDecoder(info, entries, axes)


def _check_supported(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    attention = [name for name in tensors if _ATTENTION.search(name)]
    if attention:
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


def _shape(entry: TensorEntry, axes: Axes | None) -> tuple[int, ...]:
    return tuple(entry.shape[axis] for axis in axes) if axes else entry.shape
