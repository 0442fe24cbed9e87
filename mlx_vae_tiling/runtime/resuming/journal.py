"""The journal of a decode to a file: which decode it is, what each part has come to, and who is at it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_vae_tiling.runtime.planning.cost import Part
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.resuming.journal_file import FRESH_NAME, NAME, read_told, write_told
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.regions import Region, Span

Identity = tuple[int, ...]


@dataclass
class Journal:
    """`journal.json` in a folder beside the output. It is replaced whole, so a kill cannot damage it.

    Args:
        folder: Where it is.
        parts: What is decoded one after the other.
        shape: (F, H, W, 3) of the output.
        fingerprint: What the frames depend on, by name.
        arithmetic: Of the backend that the decode was begun with, whose forms another run takes over: what
            was measured since would change the rounding.
        done: Finished frames of each part; of a single part the unfinished output itself tells.
        replaces: The file that had the output's name when the decode began, by `identity`.
        first: Frames that are in the output alone, and not in the store.
    """

    folder: Path
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    fingerprint: dict[str, str]
    arithmetic: dict[str, Any]
    done: list[int] | None
    replaces: Identity | None
    first: int = 0

    @classmethod
    def read(cls, folder: Path, plan: DecodePlan, fingerprint: dict[str, str]) -> Journal:
        """The journal that is there, with the parts and the arithmetic its decode was begun with.

        Raises:
            ValueError: If it cannot be read or tells of another decode.
        """
        place = folder / NAME
        try:
            told = read_told(folder)
            parts = tuple(read_part(part) for part in told["parts"])
            done = None if told["done"] is None else [int(n) for n in told["done"]]
            shape, begun = tuple(told["shape"]), dict(told["fingerprint"])
            arithmetic = dict(told["arithmetic"])
            first = int(told["first"])
            replaces = None if told["replaces"] is None else tuple(map(int, told["replaces"]))
            if not parts or (done is not None and len(done) != len(parts)):
                raise ValueError(f"{done} finished frames of {len(parts)} parts")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise unreadable(folder, error) from error
        changed = sorted(name for name in fingerprint | begun if begun.get(name) != fingerprint.get(name))
        if changed or shape != (plan.frames, *plan.size, 3):
            raise ValueError(
                "a decode can only be resumed with what it was begun with, but "
                f"{', '.join(changed) or 'size'} differs from {place}; "
                f"delete {folder} and begin again with overwrite=True, --overwrite"
            )
        try:
            plan.backend.computing_as(arithmetic)
        except (ValueError, TypeError, OverflowError) as error:
            raise unreadable(folder, error) from error
        return cls(folder, parts, shape, fingerprint, arithmetic, done, replaces, first)

    def write(self) -> None:
        """Replaces what is there, after the new one has reached the disk."""
        told = {name: value for name, value in vars(self).items() if name != "folder"}
        write_told(self.folder, told)

    def remove(self) -> None:
        """Deletes what a decode keeps in the folder; what others have put there stays."""
        for name in ("frames", NAME, FRESH_NAME):
            (self.folder / name).unlink(missing_ok=True)


def unreadable(folder: Path, error: Exception) -> ValueError:
    """What is said of a journal that is damaged or does not fit its frames."""
    return ValueError(
        f"{folder / NAME} cannot be read ({error}); "
        f"delete {folder} and begin again with overwrite=True, --overwrite"
    )


def identity(path: str) -> Identity | None:
    """What tells a file from another one of the same name; None if there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def fingerprint_of(decoder: StreamingDecoder, latents: mx.array, **settings: object) -> dict[str, str]:
    """Hashes of what decides the frames of a decode, by name."""
    weights = hashlib.sha256()
    for name, value in sorted(dict(tree_flatten(decoder.parameters())).items()):
        weights.update(name.encode() + hash_of(value))
    return {
        "latents": hash_of(latents).hex(),
        "latent dtype": str(latents.dtype),
        "weights": weights.hexdigest(),
        "config": repr(decoder.config),
        **{name: repr(value) for name, value in settings.items()},
    }


def hash_of(array: mx.array) -> bytes:
    """Of its values."""
    data: Any = np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))
    return hashlib.sha256(data).digest()


def read_part(spans: list[list[list[int]]]) -> Part:
    """A part as JSON has it."""
    pixels, latents = (Region(*(Span(*map(int, span)) for span in box)) for box in spans)
    return Part(pixels, latents)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        text = "a file, or a link that leads nowhere, is where a decode keeps its journal: remove it"
        raise FileExistsError(errno.EEXIST, text, str(folder)) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process alone; the system lets go of it when the process ends.

    The folder is made if it is missing, and goes if nothing is kept in it at the end.

    Raises:
        BlockingIOError: If another process holds it.
        FileNotFoundError: If there is no place for it.
    """
    path = folder / "lock"
    if not folder.parent.is_dir():
        text = "no such directory to write in, create it first"
        raise FileNotFoundError(errno.ENOENT, text, str(folder.parent))
    while True:
        _make(folder)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # whoever held the folder has just removed it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                break
            os.close(file)
        except BlockingIOError:
            os.close(file)
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                "another process is decoding to this output now: wait for it, or choose another output",
                str(folder),
            ) from None
    try:
        yield
    finally:
        if not (folder / NAME).exists():
            path.unlink()
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()
        os.close(file)
