"""Frames as one .npy array (frames, H, W, 3), which is whole after every batch and can be continued."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from .places import (
    BEGIN_AGAIN,
    Frames,
    Output,
    flush_to_disk,
    is_device,
    partial_path,
    refuse_existing,
    replace_durably,
)

Form = tuple[tuple[int, ...], np.dtype[Any]]


def open_npy(path: str, *, resume: bool, overwrite: bool) -> Output:
    """Prepare an array to be written or continued; `path` has no links."""
    if is_device(path):
        return Output(path, 0, lambda frames: None, partial(_save, path, 0), lambda frames: None)
    beside = partial_path(path)
    exists = os.path.exists(path)
    kept, form = (0, None) if overwrite and not resume else _kept(beside)
    refuse_existing(path, exists and not overwrite, beside, kept > 0 and not resume)
    if not kept:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)
    return Output(
        path,
        kept,
        partial(_check, beside, form),
        partial(_save, beside, kept),
        lambda frames: replace_durably(beside, path),
    )


def frames_in_npy(path: str) -> int:
    """How many frames an unfinished array holds."""
    return _kept(partial_path(path))[0]


def _kept(path: str) -> tuple[int, Form | None]:
    """Frames in an array that may have been cut off anywhere, with their shape and dtype."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            present = os.fstat(file.fileno()).st_size - file.tell()
    except (FileNotFoundError, ValueError):  # nothing yet, or not even a header
        return 0, None
    frame_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    if len(shape) != 4 or not frame_bytes:
        return 0, None
    return min(shape[0], present // frame_bytes), (shape[1:], dtype)


def _check(path: str, form: Form | None, frames: Frames) -> None:
    if form is not None and (frames.shape[1:], frames.dtype) != form:
        got = (frames.shape[1:], frames.dtype)
        raise ValueError(f"{path} was begun with frames {form}, got {got}; {BEGIN_AGAIN}")


def _save(path: str, kept: int, batches: Iterator[Frames]) -> None:
    first = next(batches, None)
    if first is None:
        return
    frames = kept
    with open(path, "r+b" if kept else "wb") as file:
        # The header leaves room for its first axis to grow.
        _write_header(file, first, frames)
        # After a kill there may be more than the header counts.
        file.seek(file.tell() + frames * first[0].nbytes)
        if kept:
            file.truncate()
        batch: Frames | None = first
        while batch is not None:
            file.write(batch.tobytes())
            frames += len(batch)
            _flush(file)  # in this order, so that the header never counts what is not there
            at = file.tell()
            _write_header(file, batch, frames)
            _flush(file)
            file.seek(at)
            batch = next(batches, None)


def _write_header(file: Any, batch: Frames, frames: int) -> None:
    file.seek(0)
    header = {"descr": batch.dtype.str, "fortran_order": False, "shape": (frames, *batch.shape[1:])}
    np.lib.format.write_array_header_1_0(file, header)


def _flush(file: Any) -> None:
    file.flush()
    flush_to_disk(file.fileno())
