"""The output of a decode: begun, continued where an earlier run ended, or found complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vae_tiling.media.places import BEGIN_AGAIN, partial_path
from mlx_vae_tiling.media.space import disk_bytes
from mlx_vae_tiling.media.video import discard_unfinished, first_file, open_video, unfinished_frames
from mlx_vae_tiling.media.writer import VideoWriter
from mlx_vae_tiling.runtime.planning.cost import Part
from mlx_vae_tiling.runtime.planning.plan import DecodePlan
from mlx_vae_tiling.runtime.resuming.journal import Journal, identity, locked, read_part, unreadable
from mlx_vae_tiling.runtime.resuming.journal_file import NAME, read_told
from mlx_vae_tiling.runtime.resuming.store import FrameStore


@dataclass(frozen=True)
class DecodeOutput:
    """Where the frames of a decode go.

    Attributes:
        journal: Its journal, with the parts and the arithmetic that the decode was begun with.
        writer: Takes the frames from `writer.frames_kept` on; None if an earlier run has completed it.
        store: Keeps the frames of several parts; None where the output itself keeps them, of a single
            part or of those that advance together.
        kept: Finished frames, all in all, of an earlier run.
    """

    journal: Journal
    writer: VideoWriter | None
    store: FrameStore | None
    kept: int

    @property
    def finished(self) -> int:
        """Frames of all parts together that need not be decoded any more."""
        if self.store is not None:
            return sum(self.store.done)
        return self.writer.frames_kept * len(self.journal.parts) if self.writer else 0


def several(parts: tuple[Part, ...]) -> bool:
    """Whether there are several parts, of which one process decodes one after the other."""
    return len(parts) > 1


@contextlib.contextmanager
def open_output(
    path: str | os.PathLike[str],
    plan: DecodePlan,
    dtype: np.dtype[Any],
    fingerprint: dict[str, str],
    *,
    resume: bool,
    overwrite: bool,
    stored: Callable[[tuple[Part, ...]], bool] = several,
    **options: Any,
) -> Iterator[DecodeOutput]:
    """Opens an output for one process. An exception leaves what there is, if it holds any frame.

    Args:
        path: Of the output.
        plan: Of the decode.
        dtype: Of its frames.
        fingerprint: What they depend on.
        resume: Continues what is there, if there is something; it wins over overwrite.
        overwrite: Replaces what is there.
        stored: Whether the frames of these parts, the plan's or an earlier run's, have to be kept beside
            the output until they can be put together.
        **options: As `open_video`.

    Raises:
        BlockingIOError: If another process is writing it.
        FileExistsError: If there is an output, or an unfinished one that is not to be resumed.
        OSError: If the disk has no room.
        ValueError: If what was begun is another decode.
    """
    folder = store_folder(path)
    with locked(folder):
        if (folder / NAME).exists() and (resume or not overwrite):
            if not resume:
                text = "an earlier decode is kept here: resume it (resume=True, --resume) or "
                raise FileExistsError(errno.EEXIST, text + BEGIN_AGAIN, str(folder))
            journal = Journal.read(folder, plan, fingerprint)
            if _is_published(path, journal):
                yield DecodeOutput(journal, None, None, plan.frames)
                journal.remove()
                return
            # Who allowed a file to be replaced need not say so again.
            same = journal.replaces is not None and identity(first_file(path)) == journal.replaces
            writer = open_video(path, resume=True, overwrite=overwrite or same, **options)
            if journal.done is None and stored(journal.parts):
                _keep_apart(journal, writer.frames_kept, dtype)
            if writer.frames_kept < journal.first:
                counted = ValueError(f"{writer.frames_kept} frames in the output, of {journal.first}")
                raise unreadable(folder, counted)
        else:
            begin = _begin(path, folder, plan, dtype, fingerprint, resume, overwrite, stored, options)
            writer, journal = begin
        yield from _writing(path, journal, writer, dtype)


def _writing(
    path: str | os.PathLike[str], journal: Journal, writer: VideoWriter, dtype: np.dtype[Any]
) -> Iterator[DecodeOutput]:
    store = None
    if journal.done is not None:
        store = FrameStore(journal.folder, journal.parts, journal.shape, dtype, journal)
    finished = False
    try:
        kept = writer.frames_kept if store is None else store.complete
        with writer:
            yield DecodeOutput(journal, writer, store, kept)
        finished = True
    finally:
        if store is not None:
            store.close()
        if finished or not (unfinished_frames(path) if store is None else any(store.done)):
            discard_unfinished(path)
            journal.remove()


def _begin(
    path: str | os.PathLike[str],
    folder: Path,
    plan: DecodePlan,
    dtype: np.dtype[Any],
    fingerprint: dict[str, str],
    resume: bool,
    overwrite: bool,
    stored: Callable[[tuple[Part, ...]], bool],
    options: dict[str, Any],
) -> tuple[VideoWriter, Journal]:
    if resume and not overwrite and (found := unfinished_frames(path)):
        text = f"an unfinished output is kept here, but not of which decode; {BEGIN_AGAIN}"
        raise FileExistsError(errno.EEXIST, text, found[0])
    shape = (plan.frames, *plan.size, 3)
    done = [0] * len(plan.parts) if stored(plan.parts) else None
    _require_room(path, folder, shape, dtype, done is not None, options["codec"], options["quality"])
    writer = open_video(path, overwrite=overwrite, **options)
    replaces, arithmetic = identity(first_file(path)), plan.backend.arithmetic
    journal = Journal(folder, plan.parts, shape, fingerprint, arithmetic, done, replaces)
    journal.write()
    # Frames of a decode that is begun again; the journal no longer counts them.
    (folder / "frames").unlink(missing_ok=True)
    return writer, journal


def _require_room(
    path: str | os.PathLike[str],
    folder: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    stored: bool,
    codec: str | None,
    quality: float | None,
) -> None:
    """What is stored is kept a second time. What H.264 and HEVC need nobody knows before."""
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    known = not (suffix == ".mp4" or (suffix == ".mov" and codec not in (None, "prores")))
    needed = disk_bytes(path, shape, dtype, codec=codec, quality=quality) if known else 0
    if stored:
        needed += int(np.prod(shape)) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"the decoded frames need {needed} bytes, the disk has {free} free", str(folder)
        )


def _keep_apart(journal: Journal, frames: int, dtype: np.dtype[Any]) -> None:
    """Parts that advanced together up to a frame go on one by one, each from there."""
    journal.done, journal.first = [frames] * len(journal.parts), frames
    with open(journal.folder / "frames", "wb") as file:
        # Of what the output holds already nothing is read again.
        file.truncate(frames * int(np.prod(journal.shape[1:])) * dtype.itemsize)
    journal.write()


def _is_published(path: str | os.PathLike[str], journal: Journal) -> bool:
    """Whether an earlier run was killed after its output had got its name and before the journal went."""
    output = first_file(path)
    found = identity(output)
    if found is None or found == journal.replaces or os.path.exists(partial_path(output)):
        return False
    return unfinished_frames(path) is None


def store_folder(path: str | os.PathLike[str]) -> Path:
    """Where the journal of a decode to `path` is."""
    return Path(os.fspath(path).rstrip("/") + ".partial")


def kept_frames(path: str | os.PathLike[str]) -> tuple[Path, float] | None:
    """Where an unfinished decode to `path` is kept, and what share of it; None if there is none.

    While another process is writing it, it is none that could be resumed.
    """
    folder = store_folder(path)
    if not (folder / NAME).exists():
        return None
    try:
        with locked(folder):
            return finished_share(path)
    except BlockingIOError:
        return None


def finished_share(path: str | os.PathLike[str]) -> tuple[Path, float] | None:
    """As `kept_frames`, for the process that holds the folder; nothing that cannot be read is kept."""
    folder = store_folder(path)
    try:
        told = read_told(folder)
        done, frames = told["done"], int(told["shape"][0])
        if done is not None:
            lengths = [read_part(part).pixels.time.length for part in told["parts"]]
            return folder, float(sum(done) / sum(lengths))
        kept = unfinished_frames(path)
        if kept is None:
            return None
        named = partial_path(os.fspath(path))  # as the caller spells it, where that is a file
        return Path(named if os.path.isfile(named) else kept[0]), kept[1] / frames
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError):
        return None
