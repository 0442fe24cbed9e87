"""The config of a checkpoint: passed by a caller, found in the file or beside it, or told by its shapes."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_vae_tiling.checkpoints.files import Kind
from mlx_vae_tiling.checkpoints.parameters import Shapes, differences
from mlx_vae_tiling.media.safetensors_header import shortened
from mlx_vae_tiling.vae.blocks import STRIDES, Upsample
from mlx_vae_tiling.vae.config import MOST_CHANNELS, MOST_LAYERS, DecoderConfig
from mlx_vae_tiling.vae.diffusion_config import DIFFUSERS_CLASS, ORIGINAL_CLASS, DiffusionDecoderConfig
from mlx_vae_tiling.vae.published import NAMES, PUBLISHED, AnyConfig, published_version
from mlx_vae_tiling.vae.tiny_config import TinyDecoderConfig

Config = AnyConfig | Mapping[str, Any] | str | os.PathLike[str]
KINDS: dict[Kind, type[AnyConfig]] = {
    "convolutional": DecoderConfig,
    "diffusion": DiffusionDecoderConfig,
    "tiny": TinyDecoderConfig,
}
LARGEST_CONFIG_BYTES = 2**20
PADDING = "spatial_padding_mode"

# What reading JSON that describes no decoder, or is damaged, may come upon.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def config_files(stem: str) -> tuple[str, ...]:
    """What may lie beside a decoder's file of this name to describe it, most specific first."""
    return f"{stem}_config.json", "embedded_config.json", "config.json"


class CheckpointWarning(UserWarning):
    """A checkpoint was loaded or found on a guess; the message says on which, and how to state it."""


def parse_config(config: Mapping[str, Any]) -> AnyConfig | None:
    """Reads the JSON of a VAE in original or diffusers form; None if it is that of something else.

    Raises:
        ValueError: If it is one and describes no supported decoder.
    """
    try:
        return _parse(config)
    except ValueError:
        raise
    except _UNREADABLE as error:
        raise ValueError(f"it cannot be read ({shortened(repr(error))})") from error


def _parse(config: Mapping[str, Any]) -> AnyConfig | None:
    vae = config.get("vae", config)
    if not isinstance(vae, Mapping):
        return None
    name = str(vae.get("_class_name", ""))
    if name == DIFFUSERS_CLASS:
        return _plausible(DiffusionDecoderConfig.from_diffusers(vae))
    if name == ORIGINAL_CLASS:
        return _plausible(DiffusionDecoderConfig.from_original(vae))
    if vae is config and (name.startswith("AutoencoderKL") or "decoder_block_out_channels" in vae):
        return DecoderConfig.from_diffusers(vae)
    if vae is not config or "decoder_blocks" in vae or "blocks" in vae:
        return DecoderConfig.from_original(vae)
    return None


def _plausible(config: DiffusionDecoderConfig) -> DiffusionDecoderConfig:
    """The config, if its numbers are of the kind and size that a decoder can have."""
    for name, example in vars(DiffusionDecoderConfig()).items():
        value = getattr(config, name)
        # There may be more or fewer stages than those of LTX-2.5.
        stages = isinstance(example, tuple) and isinstance(value, tuple)
        if not _is_like(value, (example[0],) * len(value) if stages else example):
            raise ValueError(f"{name} must be like {example}, got {shortened(repr(value))}")
    if sum(config.stage_depths) > MOST_LAYERS:
        raise ValueError(f"stage_depths must sum to at most {MOST_LAYERS}, got {sum(config.stage_depths)}")
    return config


def _is_like(value: Any, example: Any) -> bool:
    """Whether a value has the types of an example, and no number of it is out of bounds."""
    if isinstance(example, tuple):
        same = isinstance(value, tuple) and len(value) == len(example)
        return same and all(map(_is_like, value, example))
    if isinstance(example, int):
        return type(value) is int and 0 < value <= MOST_CHANNELS
    if isinstance(example, float):
        return type(value) in (int, float) and abs(value) <= MOST_CHANNELS
    return isinstance(value, type(example))


def read_config(config: Config) -> AnyConfig:
    """The config that a caller passed: itself, its JSON, a .json file of that, or a version's name.

    Raises:
        OSError: If it is a file that cannot be read.
        ValueError: If it is none of these.
    """
    if isinstance(config, AnyConfig):
        return config
    if isinstance(config, os.PathLike) or (isinstance(config, str) and config.endswith(".json")):
        return read_config(read_json(Path(config)))
    if isinstance(config, str):
        return published_version(config).config
    parsed = parse_config(config)
    if parsed is None:
        raise ValueError(
            "config must be a VAE's JSON in original or diffusers form, "
            f"got the keys {shortened(str(sorted(config)))}"
        )
    return parsed


def choose_config(
    given: Config | None,
    assumed: str | None,
    place: str,
    texts: Iterable[tuple[str, str]],
    names: Mapping[str, str],
    shapes: Shapes,
    kind: Kind = "convolutional",
) -> AnyConfig:
    """The config that a caller passed, or else that of `find_config`.

    Where the caller passed nothing but a padding mode, that replaces what is found.
    """
    if given is None:
        return find_config(place, texts, names, shapes, assumed, kind)
    if isinstance(given, os.PathLike) or (isinstance(given, str) and given.endswith(".json")):
        given = read_json(Path(given))
    if isinstance(given, Mapping) and set(given) == {PADDING}:
        texts = [*texts, ("config", json.dumps(dict(given)))]
        found = find_config(place, texts, names, shapes, assumed, kind)
        if not isinstance(found, DecoderConfig):
            raise ValueError(f"{place} holds a {kind} decoder, which has no {PADDING}")
        return replace(found, spatial_padding_mode=given[PADDING])
    return read_config(given)


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a .json file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds none.
    """
    return _json_object(str(path), read_text(path))


def find_config(
    place: str,
    texts: Iterable[tuple[str, str]],
    names: Mapping[str, str],
    shapes: Shapes,
    assumed: str | None = None,
    kind: Kind = "convolutional",
) -> AnyConfig:
    """The config that JSON in a file or beside it has, or that the shapes of its decoder tell.

    Args:
        place: The file, for messages.
        texts: JSON that may describe it, most specific first, each with its origin.
        names: Our names of the decoder's tensors by those in the file.
        shapes: Their shapes by our names.
        assumed: The name of the published version that it is taken for where no JSON describes it.
        kind: Of the decoder. A config of another kind is of a file beside it.

    Raises:
        ValueError: If what is found describes no supported decoder, or nothing is and shapes cannot
            decide.

    Warns:
        CheckpointWarning: If only the shapes of exactly one published version fit.
    """
    if kind == "tiny":
        return TinyDecoderConfig.from_shapes(shapes)
    padding = None
    for origin, text in texts:
        try:
            described = _json(text)
            config = parse_config(described) if isinstance(described, dict) else None
        except ValueError as error:
            reason = shortened(str(error), 400)
            raise ValueError(f"{origin} does not describe a decoder: {reason}") from error
        if isinstance(config, KINDS[kind]):
            return config
        padding = padding or (isinstance(described, dict) and described.get(PADDING)) or None
    if assumed is not None:
        return published_version(assumed).config
    try:
        if kind == "diffusion":
            return DiffusionDecoderConfig.from_shapes(shapes)
        return _infer_config(shapes, padding)
    except _UNREADABLE as error:
        fitting = None if padding else _only_fitting(place, names, shapes)
        if fitting is not None:
            return fitting
        raise ValueError(
            f"{place} comes without a config, and {shortened(str(error), 400)}. "
            "load_decoder(..., config=...) and --config take the VAE's JSON or "
            f"one of {', '.join(map(repr, NAMES))}"
        ) from error


def metadata_texts(place: str, metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The JSON in a file's metadata, with its origin."""
    if "config" in metadata:
        yield f"the metadata of {place}", metadata["config"]


def side_texts(path: Path, metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The JSON in a file's metadata and in the files beside it, each with its origin."""
    yield from metadata_texts(str(path), metadata)
    for name in config_files(path.stem):
        side_file = path.parent / name
        if side_file.is_file():
            yield str(side_file), read_text(side_file)


def read_text(path: Path) -> str:
    """The text of a file that may be a config.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no text, or too much.
    """
    if path.stat().st_size > LARGEST_CONFIG_BYTES or not path.is_file():
        raise ValueError(f"{path} must be a file of at most {LARGEST_CONFIG_BYTES} bytes to be a config")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def _json_object(origin: str, text: str) -> Mapping[str, Any]:
    try:
        value = _json(text)
    except ValueError as error:
        raise ValueError(f"{origin} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{origin} must hold a JSON object, got {shortened(str(value))}")
    return value


def _infer_config(shapes: Shapes, padding: Any) -> DecoderConfig:
    """From shapes, and from the padding mode, the only thing of use in mlx-video's `config.json`."""
    if padding is None:
        return DecoderConfig.from_shapes(shapes)
    draft = DecoderConfig.from_shapes(shapes, spatial_padding_mode=padding, residual=False)
    upsamples = {(b.stride, b.multiplier) for b in draft.decoder_blocks if isinstance(b, Upsample)}
    if upsamples == {(STRIDES["compress_all"], 2)} and not draft.timestep_conditioning:
        # LTX-2. For it mlx-video writes "zeros" where the original says nothing, which means reflection.
        return DecoderConfig.from_shapes(shapes, spatial_padding_mode="reflect", residual=True)
    return DecoderConfig.from_shapes(shapes, spatial_padding_mode=padding)


def _only_fitting(place: str, names: Mapping[str, str], shapes: Shapes) -> AnyConfig | None:
    """The config of the one published version that has exactly these tensors."""
    fitting = [version for version in PUBLISHED.values() if not differences(version.config, names, shapes)]
    if len(fitting) != 1:
        return None
    only = fitting[0]
    warnings.warn(
        f"{place} comes without a config; its tensors are those of {only.title} and it is loaded as that. "
        f"config={only.name!r} or --config {only.name} says so",
        CheckpointWarning,
        stacklevel=2,
    )
    return only.config
