"""The Hugging Face Hub through huggingface_hub: what a repository has, ranges of its files, and its cache.

huggingface_hub is imported late, since it is slow to import. Its sessions are those of requests before its
version 1 and of httpx since.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_vae_tiling.checkpoints.hub_errors import HubError, InterruptedTransfer, explained, is_passing
from mlx_vae_tiling.media.safetensors_header import Header, read_header

OWN_NAME = "mlx_vae_tiling"
WAITS_IN_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Between requests, as long as none brings anything."""

PIECE_BYTES = 2**16
"""What is lost of a connection that is cut; httpx and requests drop a piece that is not whole."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def library() -> Any:
    """huggingface_hub, with its utilities and constants."""
    for part in ("utils", "constants"):
        import_module(f"huggingface_hub.{part}")
    return import_module("huggingface_hub")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return bool(library().constants.HF_HUB_OFFLINE)


@dataclass(frozen=True)
class Repository:
    """One commit of a repository.

    Args:
        id: "owner/name", as it is called now.
        commit: Its hash.
        file_bytes: Sizes of its files by their names.
        token: As in huggingface_hub.
        cache_dir: Replaces huggingface_hub's cache.
    """

    id: str
    commit: str
    file_bytes: Mapping[str, int]
    token: str | bool | None
    cache_dir: Path | None
    _headers: dict[str, Header] = field(default_factory=dict, repr=False, compare=False)

    def header(self, file: str) -> Header:
        """The header of a safetensors file, transferred once.

        Raises:
            HubError: If it cannot be transferred.
            ValueError: If it is not a safetensors file.
        """

        def read(offset: int, size: int) -> bytes:
            return b"".join(self.pieces(file, offset, offset + size))

        if file not in self._headers:
            self._headers[file] = read_header(f"{self.id}/{file}", self.file_bytes[file], read)
        return self._headers[file]

    def pieces(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` - 1 of a file, in order; a cut connection is continued where it was cut.

        Raises:
            HubError: If the server refuses, or ignores that only a range was asked for.
            InterruptedTransfer: If the connection is cut again and again.
        """
        waits = iter(WAITS_IN_SECONDS)
        while start < stop:
            cut: Exception | None = None
            try:
                for piece in self._requested(file, start, stop):
                    start += len(piece)
                    waits = iter(WAITS_IN_SECONDS)
                    yield piece
            except _transport_errors() as error:
                if not is_passing(error):
                    raise explained(error, self.id, file, self.token) from None
                cut = error
            if start < stop:
                wait = next(waits, None)
                if wait is None:
                    reason = explained(cut, self.id, file, self.token) if cut else "nothing more comes"
                    raise InterruptedTransfer(f"the transfer of {self.id}/{file} stopped: {reason}")
                time.sleep(wait)

    def _requested(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        hub = library()
        url = hub.hf_hub_url(self.id, file, revision=self.commit, endpoint=hub.constants.ENDPOINT)
        headers = hub.utils.build_hf_headers(token=self.token, library_name=OWN_NAME)
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with _response(url, headers, hub.constants.HF_HUB_DOWNLOAD_TIMEOUT) as (response, pieces):
            hub.utils.hf_raise_for_status(response)
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                # Nothing of the answer has been read: it may be the whole file.
                raise HubError(
                    f"the server of {self.id} ignores that only a range of {file} is asked for; transfer it "
                    f"whole with `hf download {self.id} {file}` and use the path that this prints"
                )
            for piece in pieces:
                yield piece[: stop - start]
                start += len(piece)
                if start >= stop:
                    return

    def download(self, file: str) -> Path:
        """A whole file, in huggingface_hub's cache.

        Raises:
            HubError: If it cannot be transferred.
        """
        hub = library()
        options = {"revision": self.commit, "token": self.token, "endpoint": hub.constants.ENDPOINT}
        folder = self.cache_dir or hub.constants.HF_HUB_CACHE
        try:
            return Path(hub.hf_hub_download(self.id, file, cache_dir=folder, **options))
        except _transport_errors() as error:
            raise explained(error, self.id, file, self.token) from None

    def cached(self, file: str) -> Path | None:
        """The file in huggingface_hub's cache, if it is there whole."""
        path = snapshot_folder(self.id, self.commit, self.cache_dir) / file
        return path if path.is_file() else None


def open_repository(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: Path | None
) -> Repository:
    """What a repository has, under its present name, at a branch, tag or commit.

    Raises:
        HubError: If there is none, or it cannot be asked.
    """
    hub = library()
    failures: tuple[type[Exception], ...] = (ValueError, *_transport_errors())
    try:
        api = hub.HfApi(endpoint=hub.constants.ENDPOINT, token=token)
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except failures as error:
        raise explained(error, repo_id, f"revision {revision}", token) from None
    file_bytes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return Repository(str(info.id or repo_id), str(info.sha), file_bytes, token, cache_dir)


def own_folder(repo_id: str, name: str, cache_dir: Path | None) -> Path:
    """Where this package keeps what is not a repository's own file, beside huggingface_hub's cache."""
    hub = library()
    root = cache_dir or hub.constants.HF_ASSETS_CACHE
    folder: Path = hub.cached_assets_path(OWN_NAME, repo_id, name, assets_dir=root)
    return folder


def remember_commit(
    asked: str, revision: str | None, repo_id: str, commit: str, cache_dir: Path | None
) -> None:
    """Notes which commit of which repository a name and revision were, for when the Hub cannot be asked."""
    note = _note(asked, revision, cache_dir)
    if not note.is_file() or note.read_text() != f"{repo_id} {commit}":
        note.write_text(f"{repo_id} {commit}")


def remembered_commit(asked: str, revision: str | None, cache_dir: Path | None) -> tuple[str, str] | None:
    """The repository and commit that were meant when last fetched, by this package or another one."""
    if revision and _COMMIT.fullmatch(revision):
        return asked, revision
    note = _note(asked, revision, cache_dir)
    if note.is_file() and len(noted := note.read_text().split()) == 2:
        return noted[0], noted[1]
    theirs = _cache(asked, cache_dir) / "refs" / (revision or "main")
    return (asked, theirs.read_text().strip()) if theirs.is_file() else None


def snapshot_folder(repo_id: str, commit: str, cache_dir: Path | None) -> Path:
    """Where huggingface_hub's cache has the files of a commit."""
    return _cache(repo_id, cache_dir) / "snapshots" / commit


def progress_bar(total: int, done: int, title: str, shown: bool) -> Any:
    """A bar on stderr, on a terminal, unless huggingface_hub's are switched off."""
    from tqdm import tqdm

    # None asks whether stderr is a terminal.
    hidden = True if not shown or library().utils.are_progress_bars_disabled() else None
    return tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=title, disable=hidden)


def _note(repo_id: str, revision: str | None, cache_dir: Path | None) -> Path:
    return own_folder(repo_id, "refs", cache_dir) / (revision or "main").replace("/", "--")


def _cache(repo_id: str, cache_dir: Path | None) -> Path:
    root = cache_dir or Path(library().constants.HF_HUB_CACHE)
    return root / f"models--{repo_id.replace('/', '--')}"


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library of the installed huggingface_hub raises."""
    return (OSError, *library().utils.HfHubHTTPError.__bases__)


@contextmanager
def _response(url: str, headers: Mapping[str, str], timeout: float) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """An answer whose body has not been read, and the pieces of that body."""
    session = library().utils.get_session()
    if callable(getattr(session, "stream", None)):
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            yield response, response.iter_bytes(PIECE_BYTES)
    else:
        with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
            yield response, response.iter_content(PIECE_BYTES)
