"""`describe_checkpoint`: what a source holds, and where, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlx_vae_tiling.checkpoints.configs import Config, side_texts
from mlx_vae_tiling.checkpoints.files import FOLDERS, choose_decoder_files, merged, with_shards
from mlx_vae_tiling.checkpoints.identify import CheckpointInfo, StoredDecoder, identify
from mlx_vae_tiling.checkpoints.locate import Source, locate
from mlx_vae_tiling.media.safetensors_header import read_local_header


def describe_checkpoint(source: Source, *, config: Config | None = None) -> CheckpointInfo:
    """Says what `load_decoder` would load, from headers alone.

    Args:
        source: As in `load_decoder`.
        config: As in `load_decoder`.

    Raises:
        OSError: As `load_decoder` does.
        ValueError: As `load_decoder` does.
    """
    return find_decoder(source, config).info


def find_decoder(source: Source, given: Config | None) -> StoredDecoder:
    """Finds, names and checks the tensors of a decoder; see `load_decoder`."""
    path, version = locate(source)
    files = _files(path)
    header = merged(read_local_header(file) for file in files)
    return identify(files[0], header, side_texts(files[0], header.metadata), given, version)


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
            if name.lower() in FOLDERS:
                yield from _listed(root, name)
        elif name.endswith(".safetensors") and entry.is_file():
            yield name
