"""Where an output lies while it is written, what is there already, and the step from one to the other.

While frames are written they lie beside the output: `clip.partial.mp4` for `clip.mp4`. Only a complete output
gets its own name, by renaming, so what lies under it is never half of one.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

Frames = npt.NDArray[Any]
BEGIN_AGAIN = "begin again (overwrite=True, --overwrite, without resume)"


@dataclass(frozen=True)
class Output:
    """How one output is written.

    Attributes:
        path: The file, or the pattern of the PNG files.
        frames_kept: Frames that an earlier run has left, and that the next ones follow.
        check: Raises ValueError where frames (f, H, W, 3) do not fit those that are kept.
        save: Writes batches of frames under the temporary name until they end.
        publish: Gives what was saved, so many frames, its own name.
    """

    path: str
    frames_kept: int
    check: Callable[[Frames], None]
    save: Callable[[Iterator[Frames]], None]
    publish: Callable[[int], None]


def partial_path(path: str) -> str:
    """Where an output is while it is written: `clip.partial.mp4`, `frame_%05d.partial.png`."""
    stem, suffix = os.path.splitext(path)
    return f"{stem}.partial{suffix}"


def same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file, through links and other spellings too."""
    try:
        return os.path.samefile(first, second)
    except FileNotFoundError:
        return os.path.realpath(first) == os.path.realpath(second)


def is_device(path: str) -> bool:
    """Whether a character device such as /dev/null has this name: written to directly, never renamed over.

    Raises:
        OSError: It is a pipe, a socket or a disk, which no format can be written to.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISCHR(mode)):
        raise OSError(errno.EINVAL, "a pipe, socket or disk cannot be written to as a file", path)
    return stat.S_ISCHR(mode)


def refuse_existing(path: str, exists: bool, beside: str, unfinished: bool) -> None:
    """Raise FileExistsError, which says the way out, if there is something that must not be lost."""
    if exists:
        text = "the output exists already; replace it (overwrite=True, --overwrite) or choose another name"
        raise FileExistsError(errno.EEXIST, text, path)
    if unfinished:
        text = (
            "an unfinished output is kept here; continue it (resume=True, --resume) "
            "or begin again (overwrite=True, --overwrite)"
        )
        raise FileExistsError(errno.EEXIST, text, beside)


def replace_durably(source: str, target: str) -> None:
    """Rename over `target`, after all of `source` has reached the disk."""
    flush_to_disk(source)
    os.replace(source, target)
    if os.name == "posix":
        flush_to_disk(os.path.dirname(target) or ".")


def flush_to_disk(file: str | int) -> None:
    """Wait until a file, or the list of names of a directory, is on the disk; devices have none."""
    opened = os.open(file, os.O_RDONLY) if isinstance(file, str) else file
    try:
        if not stat.S_ISCHR(os.fstat(opened).st_mode):
            os.fsync(opened)
    finally:
        if isinstance(file, str):
            os.close(opened)
