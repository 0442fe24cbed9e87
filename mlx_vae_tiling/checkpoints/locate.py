"""What a source means: the demonstration, something on this machine, a published version, a repository."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

from mlx_vae_tiling.checkpoints.fetch import fetch_vae
from mlx_vae_tiling.checkpoints.hub_errors import NotThere, Unreachable
from mlx_vae_tiling.checkpoints.sources import SOURCES
from mlx_vae_tiling.vae.published import NAMES

DEMO = Path(__file__).parent.parent / "demo" / "vae.safetensors"
_ON_HUB = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(/(?P<file>.+\.safetensors))?")


_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


class Remote(NamedTuple):
    """What `fetch_vae` fetches: a version by its name, or a repository, and a file of it."""

    source: str
    filename: str | None

    @property
    def version(self) -> str | None:
        """The name of the version, if it is one."""
        return self.source if self.source in SOURCES else None


class Located(NamedTuple):
    """A file or directory, and the name of the version that it was fetched as."""

    path: Path
    version: str | None = None


Source = str | os.PathLike[str] | Located


def locate(source: Source) -> Located:
    """The file or directory of a source, fetched if it is on the Hub.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it cannot be reached, fetched or read.
        TypeError: If it is neither text nor a path.
        ValueError: If what is on the Hub has no decoder, or several.
    """
    if isinstance(source, Located):
        return source
    found = parse_source(source)
    if isinstance(found, Path):
        return Located(found)
    if found.version:
        return Located(fetch_vae(found.source), found.version)
    try:
        return Located(fetch_vae(found.source, filename=found.filename))
    except (NotThere, Unreachable) as error:
        raise FileNotFoundError(f"there is no file or directory {source}, and {error}") from None


def parse_source(source: str | os.PathLike[str]) -> Path | Remote:
    """What a source means, without reaching for it; what is on this machine goes first.

    Raises:
        FileNotFoundError: If it is nothing on this machine and cannot be on the Hub.
        OSError: If a folder on the way to it cannot be read.
        TypeError: If it is neither text nor a path.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source: a VAE must be named by text or a path, got {type(source).__name__}")
    if source == "demo":
        return DEMO
    if source == "":
        raise FileNotFoundError("a VAE must be named, got an empty name")
    path = Path(os.path.expanduser(source))
    if _exists(path):
        return path
    if isinstance(source, str):
        if source in SOURCES:
            return Remote(source, None)
        on_hub = _ON_HUB.fullmatch(source)
        if on_hub and not on_hub["repo"].endswith(".safetensors"):
            return Remote(on_hub["repo"], on_hub["file"])
    if source in NAMES:
        raise FileNotFoundError(
            f"{source} is in no repository of the Hub; download {source}.safetensors from "
            "github.com/madebyollin/taehv and give its path"
        )
    raise FileNotFoundError(
        f"there is no file or directory {path}; repositories of the Hub are named owner/name, "
        f"published versions {', '.join(SOURCES)}"
    )


def _exists(path: Path) -> bool:
    """Unlike `Path.exists`, never takes what cannot be read for missing."""
    try:
        path.stat()
    except OSError as error:
        if error.errno not in _MISSING:
            raise
        if os.path.islink(path):
            target = os.readlink(path)
            raise FileNotFoundError(f"{path} is a link to {target}, which is not there") from error
        return False
    return True
