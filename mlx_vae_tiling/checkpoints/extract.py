"""A file with some tensors of another file, written as their bytes arrive, and continued after an end."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mlx_vae_tiling.checkpoints.configs import CheckpointWarning
from mlx_vae_tiling.media.safetensors_header import Header, TensorEntry

Pieces = Callable[[int, int], Iterator[bytes]]
"""Yields the bytes `start` to `stop` - 1 of the other file."""


class Extract:
    """What is to be written, and how much of it is there.

    Args:
        target: The file; until it is complete it is `target` with `.part` behind its name.
        wanted: The tensors, where they lie in the other file, and the metadata.
    """

    def __init__(self, target: Path, wanted: Header) -> None:
        ordered = dict(sorted(wanted.tensors.items(), key=lambda item: item[1].start))
        self.target = target
        self.part = target.with_name(f"{target.name}.part")
        self.head = _header_bytes(ordered, wanted.metadata)
        self.spans = _spans(ordered)
        self.total_bytes = len(self.head) + sum(stop - start for start, stop in self.spans)

    @property
    def kept_bytes(self) -> int:
        """How many of its bytes are there; all but the first come from the other file."""
        if self.target.exists():
            return self.total_bytes
        try:
            with self.part.open("rb") as part:
                return self._kept(part)
        except FileNotFoundError:
            return 0

    def write(self, pieces: Pieces, report: Callable[[int], object]) -> None:
        """Writes what is missing; what has been written stays, whatever happens.

        Args:
            pieces: Transfers some bytes of the other file.
            report: Is told how many more bytes are there.

        Raises:
            OSError: If they cannot be transferred or written.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.part) as part:
            if self.target.exists():
                self._forget(part)
                return
            done = self._kept(part)
            self._check_room(self.total_bytes - done)
            if not done:
                part.truncate(0)
                part.write(self.head)
                done = len(self.head)
            part.seek(done)
            for start, stop in self._missing(done):
                for piece in pieces(start, stop):
                    self._append(part, piece)
                    report(len(piece))
            os.fsync(part.fileno())
            self.part.replace(self.target)

    def _append(self, part: BinaryIO, piece: bytes) -> None:
        try:
            while piece:
                piece = piece[part.write(piece) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.part)) from error

    def _kept(self, part: BinaryIO) -> int:
        size = part.seek(0, os.SEEK_END)
        part.seek(0)
        right = len(self.head) <= size <= self.total_bytes and part.read(len(self.head)) == self.head
        return size if right else 0

    def _missing(self, done: int) -> Iterator[tuple[int, int]]:
        position = len(self.head)
        for start, stop in self.spans:
            begin = start + max(0, done - position)
            if begin < stop:
                yield begin, stop
            position += stop - start

    def _check_room(self, missing: int) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if missing > free:
            raise OSError(f"{self.part.parent} needs {missing} bytes of free space, it has {free}")

    def _forget(self, part: BinaryIO) -> None:
        """Removes the part if it is one that was opened after another process had finished."""
        if self.part.exists() and os.path.samestat(os.fstat(part.fileno()), self.part.stat()):
            self.part.unlink()


@contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """The file, while no other process has it; the lock ends with the process."""
    # Without a buffer, so that what has come is there also when the process is killed.
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warnings.warn(f"another process writes {path}; waiting for it", CheckpointWarning, stacklevel=4)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


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
