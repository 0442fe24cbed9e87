"""`fetch_vae`: only the video decoder of a repository of the Hugging Face Hub.

No test reaches the Hub: they run against stand-ins for huggingface_hub's file system and downloads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from mlx_vae_tiling.checkpoints.configs import config_files
from mlx_vae_tiling.checkpoints.files import (
    choose_decoder_files,
    decoder_in,
    decoder_tensors,
    no_decoder,
    with_shards,
)
from mlx_vae_tiling.media.safetensors_header import Header, TensorEntry, read_header

PIECE_BYTES = 32 * 2**20
WORTH_EXTRACTING = 1 / 3
"""A file is downloaded whole where the decoder is more of it than this."""


def fetch_vae(
    repo_id: str,
    *,
    filename: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Downloads only the video decoder of a repository of the Hugging Face Hub.

    A file of the VAE goes into huggingface_hub's own cache. Of a checkpoint of a whole model, only the
    header and the decoder's bytes are transferred, and kept as a file of their own beside that cache.
    What is there already is not fetched again.

    Args:
        repo_id: "owner/name".
        filename: The file in the repository; None for the one with a video decoder in `vae/decoder`,
            `decoder`, `vae` or at the top.
        revision: Branch, tag or commit; None for the main branch.
        token: As in huggingface_hub; None for the one that is logged in.
        cache_dir: Replaces huggingface_hub's cache.

    Returns:
        The local file, or the first of its shards, to be given to `load_decoder`.

    Raises:
        OSError: If the repository or file cannot be reached, or the file not be written.
        ValueError: If no file has a video decoder, or several have one and `filename` must choose.
    """
    # The bases are those of the HTTP library's errors, which differ between versions of huggingface_hub.
    try:
        repository = _open_repository(repo_id, revision, token, Path(cache_dir) if cache_dir else None)
        return _fetch(repository, filename)
    except (OSError, *_library().utils.HfHubHTTPError.__bases__) as error:
        raise OSError(f"cannot fetch a VAE from {repo_id} on the Hub: {error}") from error


def _library() -> Any:
    """huggingface_hub, which is slow to import."""
    import_module("huggingface_hub.utils")
    return import_module("huggingface_hub")


def _fetch(repository: _Repository, filename: str | None) -> Path:
    names = list(repository.file_bytes)
    if filename is None:
        files = choose_decoder_files(repository.id, names, repository.header)
    elif filename in names:
        files = with_shards(filename, names)
    else:
        listing = ", ".join(name for name in names if name.endswith(".safetensors"))
        raise ValueError(f"filename must be a file of {repository.id}, got {filename!r}; it has {listing}")
    if len(files) == 1:
        header = repository.header(files[0])
        decoder = decoder_in(header.tensors)
        if decoder is None:
            raise no_decoder(f"{repository.id}/{files[0]}", [header])
        wanted = decoder_tensors(header.tensors, decoder)
        wanted_bytes = sum(tensor.size_in_bytes for tensor in wanted.values())
        if wanted_bytes < WORTH_EXTRACTING * repository.file_bytes[files[0]]:
            return _extract(repository, files[0], Header(wanted, header.metadata))
    for side_file in _side_files(files[0], names):
        repository.download(side_file)
    first, *_ = [repository.download(file) for file in files]
    return first


def _extract(repository: _Repository, file: str, wanted: Header) -> Path:
    """Writes the wanted tensors and metadata to a file of their own, which appears when it is complete."""
    folder = repository.own_folder
    target = (folder / file).with_name(f"{Path(file).stem}-video-decoder.safetensors")
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    for side_file in _side_files(file, list(repository.file_bytes)):
        shutil.copyfile(repository.download(side_file), folder / side_file)
    ordered = dict(sorted(wanted.tensors.items(), key=lambda item: item[1].start))
    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as output:
            output.write(_header_bytes(ordered, wanted.metadata))
            for piece in repository.pieces(file, _spans(ordered)):
                output.write(piece)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _side_files(file: str, names: list[str]) -> list[str]:
    folder = file.rpartition("/")[0]
    sides = [f"{folder}/{name}".lstrip("/") for name in config_files(Path(file).stem)]
    return [side for side in sides if side in names]


def _spans(ordered: Mapping[str, TensorEntry]) -> list[tuple[int, int]]:
    """The bytes of the tensors, adjacent ones together."""
    spans: list[tuple[int, int]] = []
    for tensor in ordered.values():
        start = spans.pop()[0] if spans and spans[-1][1] == tensor.start else tensor.start
        spans.append((start, tensor.stop))
    return spans


def _header_bytes(ordered: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in ordered.items():
        offsets = [position, position := position + tensor.size_in_bytes]
        fields[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _open_repository(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: Path | None
) -> _Repository:
    info = _library().HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    file_bytes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return _Repository(repo_id, str(info.sha), file_bytes, token, cache_dir)


@dataclass(frozen=True)
class _Repository:
    """One commit of a repository."""

    id: str
    commit: str
    file_bytes: Mapping[str, int]
    token: str | bool | None
    cache_dir: Path | None

    @property
    def own_folder(self) -> Path:
        """Where files that are not the repository's own are kept."""
        folder: Path = _library().cached_assets_path(
            "mlx_vae_tiling", self.id, self.commit, assets_dir=self.cache_dir
        )
        return folder

    def download(self, file: str) -> Path:
        options = {"revision": self.commit, "token": self.token, "cache_dir": self.cache_dir}
        return Path(_library().hf_hub_download(self.id, file, **options))

    def header(self, file: str) -> Header:
        with self._open(file) as remote:
            return read_header(file, self.file_bytes[file], lambda offset, size: _read(remote, offset, size))

    def pieces(self, file: str, spans: list[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of the spans, in order."""
        total = sum(stop - start for start, stop in spans)
        tqdm = _library().utils.tqdm
        with self._open(file) as remote, tqdm(total=total, unit="B", unit_scale=True, desc=file) as progress:
            for start, stop in spans:
                for offset in range(start, stop, PIECE_BYTES):
                    piece = _read(remote, offset, min(PIECE_BYTES, stop - offset))
                    progress.update(len(piece))
                    yield piece

    def _open(self, file: str) -> BinaryIO:
        """The remote file; without a cache of its own, each read is one request for a range of bytes."""
        path = f"{self.id}@{self.commit}/{file}"
        opened: BinaryIO = _library().HfFileSystem(token=self.token).open(path, "rb", cache_type="none")
        return opened


def _read(remote: BinaryIO, offset: int, size: int) -> bytes:
    remote.seek(offset)
    piece = remote.read(size)
    if len(piece) != size:
        raise OSError(f"{size} bytes were asked for at {offset}, {len(piece)} came")
    return piece
