"""`describe_checkpoint`: what a source holds, and where, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlx_vae_tiling.checkpoints.configs import Config, side_texts
from mlx_vae_tiling.checkpoints.fetch import plan_fetch, warn_of
from mlx_vae_tiling.checkpoints.fetch_plan import remote_texts
from mlx_vae_tiling.checkpoints.files import (
    DIFFUSION_FOLDER,
    FOLDERS,
    choose_decoder_files,
    merged,
    with_shards,
)
from mlx_vae_tiling.checkpoints.identify import CheckpointInfo, StoredDecoder, identify
from mlx_vae_tiling.checkpoints.locate import Located, Remote, Source, locate, parse_source
from mlx_vae_tiling.media.safetensors_header import read_local_header


def describe_checkpoint(source: Source, *, config: Config | None = None) -> CheckpointInfo:
    """Says what `load_decoder` would load, from headers alone.

    Args:
        source: As in `load_decoder`. Of what is on the Hub, too, only headers are transferred; the path
            is the one that it will have.
        config: As in `load_decoder`.

    Raises:
        OSError: As `load_decoder` does.
        ValueError: As `load_decoder` does.
    """
    found = source if isinstance(source, Located) else parse_source(source)
    if not isinstance(found, Remote):
        return find_decoder(source, config).info
    plan = plan_fetch(found.source, filename=found.filename)
    warn_of(plan)
    if plan.source is None:
        return _find(Located(plan.path, found.version), config).info
    header = merged(plan.source.header(file) for file in plan.files)
    texts = remote_texts(plan.source, plan.files[0], header)
    return identify(plan.path, header, texts, config, found.version).info


def find_decoder(source: Source, given: Config | None) -> StoredDecoder:
    """Finds, names and checks the tensors of a decoder; see `load_decoder`."""
    return _find(locate(source), given)


def _find(located: Located, given: Config | None) -> StoredDecoder:
    files = _files(located.path)
    header = merged(read_local_header(file) for file in files)
    return identify(files[0], header, side_texts(files[0], header.metadata), given, located.version)


def _files(path: Path) -> list[Path]:
    """The file that holds the decoder, or its shards."""
    if not path.is_dir():
        siblings = [file.name for file in path.parent.glob("*.safetensors")]
        return [path.parent / name for name in with_shards(path.name, siblings)]
    chosen = choose_decoder_files(str(path), _listed(path), lambda name: read_local_header(path / name))
    return [path / name for name in chosen]


def _listed(root: Path, folder: str = "") -> Iterator[str]:
    """The files of a directory where a decoder may lie; a folder that cannot be read is an error."""
    for entry in (root / folder).iterdir():
        name = f"{folder}/{entry.name}".removeprefix("/")
        if entry.is_dir():
            if name.lower() in (*FOLDERS, DIFFUSION_FOLDER):
                yield from _listed(root, name)
        elif name.endswith(".safetensors") and entry.is_file():
            yield name
