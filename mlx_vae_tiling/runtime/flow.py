"""From a job to the finished frames of its output, by one process or by several ranks."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

from mlx_vae_tiling.runtime.assembly import Store, part_by_part, put_together
from mlx_vae_tiling.runtime.frames import Frames
from mlx_vae_tiling.runtime.job import Job
from mlx_vae_tiling.runtime.planning.memory import format_bytes
from mlx_vae_tiling.runtime.ranks.group import Team
from mlx_vae_tiling.runtime.ranks.waiting import FrameBands
from mlx_vae_tiling.runtime.resuming.output import DecodeOutput
from mlx_vae_tiling.runtime.resuming.store import FrameStore


def frames_of(
    job: Job,
    output: DecodeOutput | None = None,
    progress: bool = False,
    expected: float | None = None,
    team: Team | None = None,
) -> Generator[Frames]:
    """The frames of a decode, in order, from where its output ends.

    Args:
        job: The decode, with the parts of all ranks.
        output: Where an earlier run may have left some; None for none.
        progress: Whether a bar on stderr counts each frame of each window.
        expected: The seconds that the bar says it will take; None where they are not known.
        team: The ranks that decode; None for this process alone.
    """
    from tqdm import tqdm

    parts = job.plan.parts
    unit = "frame" if len(parts) == 1 else f"frame of {len(parts)} windows"
    store = output.store if output else None
    start = output.writer.frames_kept if output and output.writer else 0
    done = output.finished if output else 0
    what = "decode" if expected is None else f"decode, about {expected:.3g} s"
    total = sum(part.pixels.time.length for part in parts)
    with tqdm(total=total, initial=done, unit=f" {unit}", desc=what, disable=not progress) as bar:
        if team is not None and progress:
            bar.write(str(team.division), file=sys.stderr)

        def report(frames: int) -> None:
            bar.set_postfix_str(f"peak {format_bytes(job.meter.highest)}", refresh=False)
            bar.update(frames)

        if len(parts) == 1 and team is None:
            yield from job.decode(parts[0], start, report)
            return
        with contextlib.ExitStack() as stack:
            put = store or stack.enter_context(_new_store(job, start, team))
            source = part_by_part if team is None else team.pieces
            yield from put_together(source(job, put, report), put, start)


@contextlib.contextmanager
def _new_store(job: Job, start: int, team: Team | None) -> Iterator[Store]:
    """Where frames wait that no output keeps."""
    parts, shape = job.plan.parts, (job.plan.frames, *job.plan.size, 3)
    if team is not None and team.division.together:
        yield FrameBands(parts, shape, job.dtype, start)
        return
    with tempfile.TemporaryDirectory() as folder:
        fresh = FrameStore(Path(folder), parts, shape, job.dtype)
        with contextlib.closing(fresh):
            yield fresh
