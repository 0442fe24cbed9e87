"""`describe_checkpoint`: what a source holds, and where, from headers alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_vae_tiling.checkpoints.configs import Config, find_config, read_config
from mlx_vae_tiling.checkpoints.files import (
    FOLDERS,
    choose_decoder_files,
    decoder_prefix,
    decoder_tensors,
    merged,
    no_decoder,
    with_shards,
)
from mlx_vae_tiling.checkpoints.hub import fetch_vae
from mlx_vae_tiling.checkpoints.tensor_names import Axes, kernel_axes, layout_of, rename
from mlx_vae_tiling.dtypes import FLOAT_TYPES
from mlx_vae_tiling.media.safetensors_header import TensorEntry, read_local_header
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.decoder import VideoDecoder
from mlx_vae_tiling.vae.published import version_of

Source = str | os.PathLike[str]

DEMO = Path(__file__).parent.parent / "demo" / "vae.safetensors"
STORED_NAMES = {kind.stored_name: kind.name for kind in FLOAT_TYPES}
_ON_HUB = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(/(?P<file>.+\.safetensors))?")
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


def describe_checkpoint(source: Source, *, config: Config | None = None) -> CheckpointInfo:
    """Says what `load_decoder` would load, from headers alone.

    Args:
        source: As in `load_decoder`.
        config: As in `load_decoder`.

    Raises:
        FileNotFoundError: As `load_decoder` does.
        ValueError: As `load_decoder` does.
    """
    return find_decoder(source, config).info


def find_decoder(source: Source, given: Config | None) -> StoredDecoder:
    """Finds, names and checks the tensors of a decoder; see `load_decoder`."""
    files = _files(_locate(source))
    header = merged(read_local_header(file) for file in files)
    prefix = decoder_prefix(header.tensors)
    if prefix is None:
        raise no_decoder(str(files[0]), [header])
    tensors = decoder_tensors(header.tensors, prefix)
    _check_supported(files[0], tensors)
    names = rename(tensors, prefix)
    axes = kernel_axes({ours: tensors[name].shape for name, ours in names.items()})
    shapes = {ours: _shape(tensors[name], axes.get(ours)) for name, ours in names.items()}
    config = read_config(given) if given is not None else find_config(files[0], header.metadata, shapes)
    _check_exact(files[0], config, names, shapes)
    entries = {ours: tensors[name] for name, ours in names.items()}
    version = version_of(config)
    info = CheckpointInfo(
        path=files[0],
        layout=layout_of(tensors, prefix),
        version=version.title if version else "custom",
        config=config,
        dtype=STORED_NAMES[entries["conv_in.conv.weight"].dtype],
        decoder_bytes=sum(entry.size_in_bytes for entry in entries.values()),
    )
    return StoredDecoder(info, entries, axes)


def _locate(source: Source) -> Path:
    if source == "demo":
        return DEMO
    path = Path(source).expanduser()
    if path.exists():
        return path
    on_hub = _ON_HUB.fullmatch(source) if isinstance(source, str) else None
    if on_hub and not on_hub["repo"].endswith(".safetensors"):
        try:
            return fetch_vae(on_hub["repo"], filename=on_hub["file"])
        except OSError as error:
            raise FileNotFoundError(f"there is no file or directory {path}, and {error}") from error
    raise FileNotFoundError(
        f"there is no file or directory {path}; repositories of the Hub are named owner/name"
    )


def _files(path: Path) -> list[Path]:
    """The file that holds the decoder, or its shards."""
    if not path.is_dir():
        siblings = [file.name for file in path.parent.glob("*.safetensors")]
        return [path.parent / name for name in with_shards(path.name, siblings)]
    found = [file for folder in FOLDERS for file in (path / folder).glob("*.safetensors")]
    names = [file.relative_to(path).as_posix() for file in found]
    chosen = choose_decoder_files(str(path), names, lambda name: read_local_header(path / name))
    return [path / name for name in chosen]


def _check_supported(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    attention = [name for name in tensors if _ATTENTION.search(name)]
    if attention:
        raise ValueError(f"{path}: attention blocks are not supported, got {_listing(attention)}")
    unknown = [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in STORED_NAMES]
    quantized = unknown or [name for name in tensors if _SCALES.search(name)]
    if quantized:
        raise ValueError(
            f"{path}: the decoder's tensors must be F32, F16 or BF16, got {_listing(quantized)}; "
            "load a VAE that is not quantised"
        )


def _shape(entry: TensorEntry, axes: Axes | None) -> tuple[int, ...]:
    return tuple(entry.shape[axis] for axis in axes) if axes else entry.shape


def _check_exact(
    path: Path, config: DecoderConfig, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Names and shapes must be the config's; axes of size 1 do not count."""
    expected = parameter_shapes(VideoDecoder(config))
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    first = {ours: name for name, ours in reversed(list(names.items()))}
    for name, ours in names.items():
        if ours not in expected or first[ours] != name:
            problems.append(f"{name} is surplus")
        elif [n for n in shapes[ours] if n != 1] != [n for n in expected[ours] if n != 1]:
            problems.append(f"{name} is {shapes[ours]} where {expected[ours]} is expected")
    if problems:
        raise ValueError(f"{path} must hold exactly the tensors of its config: {_listing(problems)}")


def parameter_shapes(decoder: VideoDecoder) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its name."""
    parameters: Any = tree_flatten(decoder.parameters())
    return {name: parameter.shape for name, parameter in parameters}


def _listing(items: list[str], longest: int = 5) -> str:
    more = f" and {len(items) - longest} more" if len(items) > longest else ""
    return "; ".join(items[:longest]) + more
