"""Decoded frames on disk, with a journal of how far each part of a decode has come."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_vae_tiling.runtime.cost import Part
from mlx_vae_tiling.runtime.frames import Frames
from mlx_vae_tiling.runtime.plan import DecodePlan
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.regions import Region, Span


class FrameStore:
    """Frames (F, H, W, 3) in one flat file, and `journal.json` beside it.

    The journal is replaced only after the frames it counts are written, so that after a kill at any
    moment it never claims too much.

    Args:
        folder: Where the two files are.
        parts: What is decoded one after the other.
        done: Finished frames of each part.
        shape: (F, H, W, 3).
        dtype: uint8 or uint16.
        fingerprint: What the frames depend on, by name.
    """

    def __init__(
        self,
        folder: Path,
        parts: tuple[Part, ...],
        done: list[int],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        fingerprint: dict[str, str],
    ):
        self.folder, self.parts, self.done = folder, parts, done
        self._shape, self._dtype, self._fingerprint = shape, dtype, fingerprint
        self._corner = parts[0].pixels.height.start, parts[0].pixels.width.start
        self._file = os.open(folder / "frames", os.O_RDWR | os.O_CREAT, 0o644)

    @classmethod
    def create(
        cls,
        folder: Path,
        plan: DecodePlan,
        dtype: np.dtype[Any],
        fingerprint: dict[str, str],
        copies: int = 1,
    ) -> FrameStore:
        """Starts a store.

        Raises:
            OSError: If the disk has no room for the frames.
        """
        shape = (plan.frames, *plan.size, 3)
        needed = copies * int(np.prod(shape)) * dtype.itemsize
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC, f"the decoded frames need {needed} bytes, the disk has {free} free", str(folder)
            )
        store = cls(folder, plan.parts, [0] * len(plan.parts), shape, dtype, fingerprint)
        store._write_journal()
        return store

    @classmethod
    def reopen(
        cls, folder: Path, plan: DecodePlan, dtype: np.dtype[Any], fingerprint: dict[str, str]
    ) -> FrameStore:
        """Continues a store, with the parts it was begun with.

        Raises:
            ValueError: If the journal cannot be read or tells of another decode.
        """
        journal = folder / "journal.json"
        try:
            told = json.loads(journal.read_text())
            parts = tuple(_read_part(part) for part in told["parts"])
            done, shape = [int(n) for n in told["done"]], tuple(told["shape"])
            begun = dict(told["fingerprint"])
            size = (folder / "frames").stat().st_size
            frame_bytes = int(np.prod(shape[1:])) * dtype.itemsize
            if len(done) != len(parts) or size < min(done) * frame_bytes:
                raise ValueError(f"{size} bytes of frames for {done} finished ones")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{journal} cannot be read ({error}); delete {folder} to decode from the beginning"
            ) from error
        changed = sorted(name for name in fingerprint | begun if begun.get(name) != fingerprint.get(name))
        if changed or shape != (plan.frames, *plan.size, 3):
            raise ValueError(
                "a decode can only be resumed with what it was begun with, but "
                f"{', '.join(changed) or 'size'} differs from {journal}; "
                f"delete {folder} to decode from the beginning"
            )
        return cls(folder, parts, done, shape, dtype, fingerprint)

    def append(self, part: int, frames: Frames) -> None:
        """Adds finished frames (f, h, w, 3) of a part."""
        _, rows, columns = self.parts[part].pixels
        top, left = rows.start - self._corner[0], columns.start - self._corner[1]
        _, height, width, _ = self._shape
        pixel = 3 * self._dtype.itemsize
        for index, frame in enumerate(np.ascontiguousarray(frames), self.done[part]):
            start = ((index * height + top) * width + left) * pixel
            runs = [frame] if frame.shape[1] == width else frame
            for row, run in enumerate(runs):
                _write_all(self._file, run, start + row * width * pixel)
        self.done[part] += len(frames)
        self._write_journal()

    def read(self, start: int, stop: int) -> Frames:
        """Frames start to stop - 1, which all parts must have finished."""
        frame_bytes = int(np.prod(self._shape[1:])) * self._dtype.itemsize
        data = os.pread(self._file, (stop - start) * frame_bytes, start * frame_bytes)
        return np.frombuffer(data, self._dtype).reshape(stop - start, *self._shape[1:])

    def close(self) -> None:
        os.close(self._file)

    def remove(self) -> None:
        """Deletes what the store wrote, and its folder if nothing else is in it."""
        for name in ("frames", "journal.json", "journal.json.new"):
            (self.folder / name).unlink(missing_ok=True)

    def _write_journal(self) -> None:
        os.fsync(self._file)
        journal = {
            "fingerprint": self._fingerprint,
            "shape": self._shape,
            "parts": self.parts,
            "done": self.done,
        }
        fresh = self.folder / "journal.json.new"
        fresh.write_text(json.dumps(journal, indent=1))
        os.replace(fresh, self.folder / "journal.json")


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


def _write_all(file: int, data: Any, offset: int) -> None:
    contiguous: Any = np.ascontiguousarray(data)
    view = memoryview(contiguous).cast("B")
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _read_part(spans: list[list[list[int]]]) -> Part:
    pixels, latents = (Region(*(Span(*map(int, span)) for span in box)) for box in spans)
    return Part(pixels, latents)


def finished_share(folder: Path) -> float | None:
    """The share of a decode that its store holds; None if there is no store that can be read."""
    try:
        told = json.loads((folder / "journal.json").read_text())
        return float(sum(told["done"]) / (len(told["done"]) * told["shape"][0]))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


@contextlib.contextmanager
def open_store(
    folder: Path,
    plan: DecodePlan,
    dtype: np.dtype[Any],
    fingerprint: dict[str, str],
    resume: bool,
    copies: int = 1,
) -> Iterator[FrameStore]:
    """The store of a decode: continued, or new. An exception leaves it, if it holds any frame.

    Args:
        folder, plan, dtype, fingerprint: As `FrameStore.create` and `reopen`.
        resume: Continues the store that is there, if there is one.
        copies: How many times the frames will lie on the disk.

    Raises:
        BlockingIOError: If another process has it open.
        FileExistsError: If there is one already and it is not to be resumed.
    """
    with _locked(folder):
        begun = (folder / "journal.json").exists()
        if begun and not resume:
            raise FileExistsError(
                errno.EEXIST,
                "frames of an earlier decode are kept here: resume it (resume=True, --resume) or delete it",
                str(folder),
            )
        if begun:
            store = FrameStore.reopen(folder, plan, dtype, fingerprint)
        else:
            store = FrameStore.create(folder, plan, dtype, fingerprint, copies)
        finished = False
        try:
            yield store
            finished = True
        finally:
            store.close()
            if finished or not any(store.done):
                store.remove()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process alone; the system lets go of it when the process ends.

    The folder is made if it is missing, and goes if nothing is kept in it at the end.
    """
    path = folder / "lock"
    while True:
        folder.mkdir(exist_ok=True)
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
        if not (folder / "journal.json").exists():
            path.unlink()
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()
        os.close(file)
