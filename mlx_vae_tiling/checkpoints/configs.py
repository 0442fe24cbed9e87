"""The config of a checkpoint: passed by a caller, found in the file or beside it, or told by its shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_vae_tiling.checkpoints.files import Kind
from mlx_vae_tiling.vae.blocks import STRIDES, Upsample
from mlx_vae_tiling.vae.config import DecoderConfig
from mlx_vae_tiling.vae.diffusion_config import DIFFUSERS_CLASS, ORIGINAL_CLASS, DiffusionDecoderConfig
from mlx_vae_tiling.vae.published import NAMES, AnyConfig, published_version
from mlx_vae_tiling.vae.tiny_config import TinyDecoderConfig

Config = AnyConfig | Mapping[str, Any] | str
KINDS: dict[Kind, type[AnyConfig]] = {
    "convolutional": DecoderConfig,
    "diffusion": DiffusionDecoderConfig,
    "tiny": TinyDecoderConfig,
}


def config_files(stem: str) -> tuple[str, ...]:
    """What may lie beside a decoder's file of this name to describe it, most specific first."""
    return f"{stem}_config.json", "embedded_config.json", "config.json"


def parse_config(config: Mapping[str, Any]) -> AnyConfig | None:
    """Reads the JSON of a VAE in original or diffusers form; None if it is that of something else."""
    vae = config.get("vae", config)
    if not isinstance(vae, Mapping):
        return None
    name = str(vae.get("_class_name", ""))
    if name == DIFFUSERS_CLASS:
        return DiffusionDecoderConfig.from_diffusers(vae)
    if name == ORIGINAL_CLASS:
        return DiffusionDecoderConfig.from_original(vae)
    if vae is config and (name.startswith("AutoencoderKL") or "decoder_block_out_channels" in vae):
        return DecoderConfig.from_diffusers(vae)
    if vae is not config or "decoder_blocks" in vae or "blocks" in vae:
        return DecoderConfig.from_original(vae)
    return None


def read_config(config: Config) -> AnyConfig:
    """The config that a caller passed: itself, its JSON in original or diffusers form, or a version's name.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(config, str):
        return published_version(config).config
    if isinstance(config, AnyConfig):
        return config
    parsed = parse_config(config)
    if parsed is None:
        raise ValueError(
            f"config must be a VAE's JSON in original or diffusers form, got the keys {sorted(config)}"
        )
    return parsed


def find_config(
    path: Path, metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], kind: Kind
) -> AnyConfig:
    """The config that a file, or a JSON file beside it, has, or that its shapes tell.

    Args:
        path: The file.
        metadata: Its metadata.
        shapes: Our names and shapes of its decoder's tensors.
        kind: Of its decoder. A config of another kind is of a file beside it.

    Raises:
        ValueError: If what is found describes no supported decoder, or nothing is and shapes cannot
            decide.
    """
    if kind == "tiny":
        return TinyDecoderConfig.from_shapes(shapes)
    padding = None
    for origin, text in _published_texts(path, metadata):
        try:
            described = json.loads(text)
            config = parse_config(described) if isinstance(described, dict) else None
        except ValueError as error:
            raise ValueError(f"{origin} does not describe a decoder: {error}") from error
        if isinstance(config, KINDS[kind]):
            return config
        padding = padding or (isinstance(described, dict) and described.get("spatial_padding_mode")) or None
    try:
        return (
            DiffusionDecoderConfig.from_shapes(shapes)
            if kind == "diffusion"
            else _infer_config(shapes, padding)
        )
    except ValueError as error:
        raise ValueError(
            f"{path} comes without a config, and {error}. load_decoder(..., config=...) takes "
            f"a DecoderConfig, the VAE's JSON, or one of {', '.join(map(repr, NAMES))}"
        ) from error


def _published_texts(path: Path, metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if "config" in metadata:
        yield f"the metadata of {path}", metadata["config"]
    for name in config_files(path.stem):
        side_file = path.parent / name
        if side_file.is_file():
            yield str(side_file), side_file.read_text()


def _infer_config(shapes: Mapping[str, tuple[int, ...]], padding: Any) -> DecoderConfig:
    """From shapes, and from the padding mode, the only thing of use in mlx-video's `config.json`."""
    if padding is None:
        return DecoderConfig.from_shapes(shapes)
    draft = DecoderConfig.from_shapes(shapes, spatial_padding_mode=padding, residual=False)
    upsamples = {(b.stride, b.multiplier) for b in draft.decoder_blocks if isinstance(b, Upsample)}
    if upsamples == {(STRIDES["compress_all"], 2)} and not draft.timestep_conditioning:
        # LTX-2. For it mlx-video writes "zeros" where the original says nothing, which means reflection.
        return DecoderConfig.from_shapes(shapes, spatial_padding_mode="reflect", residual=True)
    return DecoderConfig.from_shapes(shapes, spatial_padding_mode=padding)
