"""What fetching a decoder will transfer, known before it does, and doing it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mlx_vae_tiling.checkpoints import hub
from mlx_vae_tiling.checkpoints.configs import config_files, metadata_texts, read_text
from mlx_vae_tiling.checkpoints.extract import Extract
from mlx_vae_tiling.checkpoints.files import (
    choose_decoder_files,
    decoder_in,
    decoder_tensors,
    no_decoder,
    with_shards,
)
from mlx_vae_tiling.checkpoints.hub_errors import HubError, InterruptedTransfer, NotThere, cannot_fetch
from mlx_vae_tiling.checkpoints.identify import identify
from mlx_vae_tiling.checkpoints.parameters import listing
from mlx_vae_tiling.checkpoints.sources import HubFile
from mlx_vae_tiling.media.safetensors_header import Header, read_local_header
from mlx_vae_tiling.vae.published import published_version

WORTH_EXTRACTING = 0.8
"""A file is downloaded whole where the decoder is more of it than this."""

OWN_SUFFIX = "-video-decoder.safetensors"


class Access(NamedTuple):
    """How the Hub is asked: see `fetch_vae`."""

    revision: str | None
    token: str | bool | None
    cache_dir: Path | None


@dataclass(frozen=True)
class FetchPlan:
    """What will be transferred, from where, and where it will be.

    Args:
        repository: "owner/name", as it is called now.
        commit: Hash of its commit.
        files: The file with the decoder, or its shards.
        file_bytes: Their size.
        transfer_bytes: Size of what is transferred; 0 if all is there.
        kept_bytes: Size of what an earlier transfer left.
        path: The file to be given to `load_decoder`.
        notes: What went otherwise than asked, a line each.
        extract: What is to be written where not whole files are downloaded.
        source: The repository; None where it is not asked.
    """

    repository: str
    commit: str
    files: tuple[str, ...]
    file_bytes: int
    transfer_bytes: int
    kept_bytes: int
    path: Path
    notes: tuple[str, ...] = ()
    extract: Extract | None = field(default=None, repr=False, compare=False)
    source: hub.Repository | None = field(default=None, repr=False, compare=False)

    def run(self, *, progress: bool = True) -> Path:
        """Transfers it; see `fetch_vae`."""
        try:
            if self.source is not None:
                self._transfer(self.source, progress)
        except InterruptedTransfer as error:
            kept = InterruptedTransfer(f"{error}; what has come is kept, do the same again to continue")
            raise cannot_fetch(self.repository, kept) from None
        except HubError as error:
            raise cannot_fetch(self.repository, error) from None
        return self.path

    def _transfer(self, source: hub.Repository, progress: bool) -> None:
        if self.extract is None:
            for file in (*_side_files(source, self.files[0]), *self.files):
                source.download(file)
        else:
            for side_file in _side_files(source, self.files[0]):
                target = self.path.parent / Path(side_file).name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source.download(side_file), target)
            title = f"{self.repository}/{self.files[0]}"
            with hub.progress_bar(self.extract.total_bytes, self.extract.kept_bytes, title, progress) as bar:
                self.extract.write(lambda start, stop: source.pieces(self.files[0], start, stop), bar.update)


def plan_download(place: HubFile, access: Access, version: str | None) -> FetchPlan:
    """Plans to fetch from a repository what of it is not there yet.

    Args:
        place: The repository, and the file or None to look for it.
        access: How the Hub is asked.
        version: The name of the published version that it must hold; None if any decoder will do.

    Raises:
        HubError: If the Hub cannot be asked, or has no such thing.
        ValueError: If there is no decoder, or several and no file is named.
    """
    source = hub.open_repository(place.repo, *access)
    hub.remember_commit(place.repo, access.revision, source.id, source.commit, access.cache_dir)
    files = _files(source, place.file, known=version is not None)
    target = _own_path(source.id, source.commit, files[0], access.cache_dir)
    extract = None
    if not target.is_file() and len(files) == 1 and source.cached(files[0]) is None:
        extract = _plan_extract(source, files[0], target, version)
    if target.is_file():
        path, transfer_bytes, kept_bytes = target, 0, 0
    elif extract is None:
        path = hub.snapshot_folder(source.id, source.commit, access.cache_dir) / files[0]
        transfer_bytes = sum(source.file_bytes[file] for file in files if source.cached(file) is None)
        kept_bytes = 0
    else:
        path, kept_bytes = target, extract.kept_bytes
        transfer_bytes = extract.total_bytes - max(kept_bytes, len(extract.head))
    return FetchPlan(
        source.id,
        source.commit,
        tuple(files),
        sum(source.file_bytes[file] for file in files),
        transfer_bytes,
        kept_bytes,
        path,
        () if source.id == place.repo else (f"{place.repo} is called {source.id} now",),
        extract,
        source if transfer_bytes or extract else None,
    )


def plan_cached(place: HubFile, access: Access) -> FetchPlan | None:
    """A plan without any transfer, for what was fetched before; None if nothing was.

    Raises:
        ValueError: If what there is has no decoder, or several and no file is named.
    """
    remembered = hub.remembered_commit(place.repo, access.revision, access.cache_dir)
    if remembered is None:
        return None
    repo_id, commit = remembered
    folders = {
        hub.own_folder(repo_id, commit, access.cache_dir): OWN_SUFFIX,
        hub.snapshot_folder(repo_id, commit, access.cache_dir): ".safetensors",
    }
    for folder, suffix in folders.items():
        names = [file.relative_to(folder).as_posix() for file in folder.rglob(f"*{suffix}") if file.is_file()]
        if place.file is not None:
            wanted = f"{place.file.removesuffix('.safetensors')}{suffix}"
            names = with_shards(wanted, names) if wanted in names else []
        elif names:
            names = choose_decoder_files(repo_id, names, partial(_local_header, folder))
        if names:
            return FetchPlan(repo_id, commit, tuple(names), 0, 0, 0, folder / names[0])
    return None


def _files(source: hub.Repository, file: str | None, *, known: bool) -> list[str]:
    names = list(source.file_bytes)
    if file is None:
        return choose_decoder_files(source.id, names, source.header)
    if file in names:
        return with_shards(file, names)
    if known:
        raise NotThere(f"{source.id} has no file {file} any more")
    has = listing((name for name in names if name.endswith(".safetensors")), ", ", longest=20)
    raise ValueError(f"filename must be a file of {source.id}, got {file!r}; it has {has}")


def _plan_extract(source: hub.Repository, file: str, target: Path, version: str | None) -> Extract | None:
    """How to get only the decoder; None where the whole file is little more."""
    header = source.header(file)
    decoder = decoder_in(header.tensors)
    if decoder is None:
        raise no_decoder(f"{source.id}/{file}", [header])
    if version is not None:
        _check_version(source, file, header, version)
    wanted = decoder_tensors(header.tensors, decoder)
    wanted_bytes = sum(tensor.size_in_bytes for tensor in wanted.values())
    if wanted_bytes > WORTH_EXTRACTING * source.file_bytes[file]:
        return None
    return Extract(target, Header(wanted, header.metadata))


def _check_version(source: hub.Repository, file: str, header: Header, version: str) -> None:
    """Before anything large is transferred: files change."""
    place = Path(f"{source.id}/{file}")
    try:
        found = identify(place, header, remote_texts(source, file, header), None, version).info.version
    except ValueError as error:
        raise NotThere(str(error)) from error
    if found != published_version(version).title:
        raise NotThere(f"{place} holds {found}, not {published_version(version).title}")


def remote_texts(source: hub.Repository, file: str, header: Header) -> Iterator[tuple[str, str]]:
    """What `side_texts` gives, of a file on the Hub."""
    yield from metadata_texts(f"{source.id}/{file}", header.metadata)
    for side_file in _side_files(source, file):
        yield f"{source.id}/{side_file}", read_text(source.download(side_file))


def _side_files(source: hub.Repository, file: str) -> list[str]:
    folder = file.rpartition("/")[0]
    sides = [f"{folder}/{name}".lstrip("/") for name in config_files(Path(file).stem)]
    return [side for side in sides if side in source.file_bytes]


def _own_path(repo_id: str, commit: str, file: str, cache_dir: Path | None) -> Path:
    folder = hub.own_folder(repo_id, commit, cache_dir)
    return (folder / file).with_name(f"{Path(file).stem}{OWN_SUFFIX}")


def _local_header(folder: Path, name: str) -> Header:
    return read_local_header(folder / name)
