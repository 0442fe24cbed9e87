"""`describe_checkpoint`: what a source holds, and where, from headers alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx.utils import tree_flatten

from mlx_vae_tiling.checkpoints.configs import Config, find_config, read_config
from mlx_vae_tiling.checkpoints.diffusion_names import diffusion_parameters
from mlx_vae_tiling.checkpoints.files import (
    DIFFUSION_FOLDER,
    FOLDERS,
    Found,
    choose_decoder_files,
    decoder_in,
    decoder_tensors,
    merged,
    no_decoder,
    with_shards,
)
from mlx_vae_tiling.checkpoints.hub import fetch_vae
from mlx_vae_tiling.checkpoints.tensor_names import Axes, kernel_axes, layout_of, rename
from mlx_vae_tiling.dtypes import FLOAT_TYPES
from mlx_vae_tiling.media.safetensors_header import TensorEntry, read_local_header
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.published import AnyConfig, version_of

Source = str | os.PathLike[str]

DEMO = Path(__file__).parent.parent / "demo" / "vae.safetensors"
STORED_NAMES = {kind.stored_name: kind.name for kind in FLOAT_TYPES}
_ON_HUB = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(/(?P<file>.+\.safetensors))?")
_ATTENTION = re.compile(r"\b(attentions?|attn\d?|to_qkv|to_q)\.")
_FIRST = {
    "convolutional": "conv_in.conv.weight",
    "diffusion": "conv_in.weight",
    "tiny": "decoder.1.weight",
}
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
        names: Of its parts in the file.
        parts: Tensors that lie one after the other along its first axis; mostly one.
        axes: How to transpose them; None for not at all.
        gate: What multiplies its rows; None for nothing.
    """

    names: tuple[str, ...]
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
    found = decoder_in(header.tensors)
    if found is None:
        raise no_decoder(str(files[0]), [header])
    entries = decoder_tensors(header.tensors, found)
    _check_supported(files[0], entries, found)
    tensors = _parameters(entries, found)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = (
        read_config(given)
        if given is not None
        else find_config(files[0], header.metadata, shapes, found.kind)
    )
    if isinstance(config, DecoderConfig):
        config = config.narrowed(_narrowings(shapes))
    _check_exact(files[0], config, tensors)
    version = version_of(config)
    used = [part for tensor in tensors.values() for part in tensor.parts]
    info = CheckpointInfo(
        path=files[0],
        layout=layout_of(entries, found),
        version=version.title if version else "custom",
        config=config,
        dtype=STORED_NAMES[tensors[_FIRST[found.kind]].parts[0].dtype],
        decoder_bytes=sum(entry.size_in_bytes for entry in used),
    )
    return StoredDecoder(info, tensors)


def _parameters(entries: Mapping[str, TensorEntry], found: Found) -> dict[str, StoredTensor]:
    """The decoder's parameters, by our names."""
    if found.kind == "diffusion":
        return {
            ours: StoredTensor(
                stored.parts,
                tuple(entries[name] for name in stored.parts),
                gate=entries[stored.gate] if stored.gate else None,
            )
            for ours, stored in diffusion_parameters(entries, found.prefix).items()
        }
    if found.kind == "tiny":
        return {
            name: StoredTensor((name,), (entry,), (0, 2, 3, 1) if len(entry.shape) == 4 else None)
            for name, entry in entries.items()
        }
    names = rename(entries, found.prefix)
    axes = kernel_axes({ours: entries[name].shape for name, ours in names.items()})
    tensors: dict[str, StoredTensor] = {}
    for name, ours in names.items():
        # One that is stored twice keeps its own name, of which the config knows nothing.
        key = name if ours in tensors else ours
        tensors[key] = StoredTensor((name,), (entries[name],), axes.get(ours))
    return tensors


def _narrowings(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, tuple[int, int]]:
    """Channels before and after each narrowing block, of which tensors say more than configs do."""
    found = {}
    for name, shape in shapes.items():
        if (block := re.fullmatch(r"up_blocks\.(\d+)\.conv1\.conv\.weight", name)) and len(shape) == 5:
            found[int(block[1])] = shape[-1], shape[0]
    return found


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
    folders = (*FOLDERS, DIFFUSION_FOLDER)
    found = [file for folder in folders for file in (path / folder).glob("*.safetensors")]
    names = [file.relative_to(path).as_posix() for file in found]
    chosen = choose_decoder_files(str(path), names, lambda name: read_local_header(path / name))
    return [path / name for name in chosen]


def _check_supported(path: Path, tensors: Mapping[str, TensorEntry], found: Found) -> None:
    attention = [name for name in tensors if _ATTENTION.search(name)]
    if attention and found.kind == "convolutional":
        raise ValueError(f"{path}: attention blocks are not supported, got {_listing(attention)}")
    unknown = [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in STORED_NAMES]
    quantized = unknown or [name for name in tensors if _SCALES.search(name)]
    if quantized:
        raise ValueError(
            f"{path}: the decoder's tensors must be F32, F16 or BF16, got {_listing(quantized)}; "
            "load a VAE that is not quantised"
        )


def _check_exact(path: Path, config: AnyConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Names and shapes must be the config's; axes of size 1 do not count."""
    expected = parameter_shapes(build_decoder(config))
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for ours, tensor in tensors.items():
        name = ", ".join(tensor.names)
        if ours not in expected:
            problems.append(f"{name} is surplus")
        elif [n for n in tensor.shape if n != 1] != [n for n in expected[ours] if n != 1]:
            problems.append(f"{name} is {tensor.shape} where {expected[ours]} is expected")
    if problems:
        raise ValueError(f"{path} must hold exactly the tensors of its config: {_listing(problems)}")


def parameter_shapes(decoder: StreamingDecoder) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its name."""
    parameters: Any = tree_flatten(decoder.parameters())
    return {name: parameter.shape for name, parameter in parameters}


def _listing(items: list[str], longest: int = 5) -> str:
    more = f" and {len(items) - longest} more" if len(items) > longest else ""
    return "; ".join(items[:longest]) + more
