"""Threads that compute beside each other: how many there may be, and how they share work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np

Job = TypeVar("Job")
Buffers = TypeVar("Buffers")


def idle_cores() -> int:
    """Cores for workers that each call NumPy's BLAS: all of the process, or 1 where BLAS takes them itself.

    Of two threads in BLAS and two workers that call it, each waits for the others: on busy cores that is
    many times slower than one. Whether BLAS has threads shows in the processor time of products, of
    which the calling thread then has a part. It takes some tens of milliseconds; call it once, while no
    other thread of the process is busy.
    """
    matrix = np.ones((768, 768), np.float32)
    out = matrix @ matrix
    everybody, own = time.process_time(), time.thread_time()
    for _ in range(4):
        np.matmul(matrix, matrix, out=out)
    everybody, own = time.process_time() - everybody, time.thread_time() - own
    if everybody > 1.1 * own:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


default_workers = lru_cache(maxsize=1)(idle_cores)
"""How many there are where nobody says: measured once."""


def share(
    work: Callable[[Sequence[Job], Buffers], None], jobs: Sequence[Job], buffers: Sequence[Buffers]
) -> None:
    """Does jobs in as many threads as there are buffers, of which each has its own and every n-th job."""

    def do(index: int) -> None:
        # Each thread has warnings of its own; whoever decodes looks at the frames.
        with np.errstate(over="ignore", invalid="ignore"):
            work(jobs[index :: len(buffers)], buffers[index])

    if len(buffers) == 1:
        return do(0)
    with ThreadPoolExecutor(len(buffers)) as threads:
        for _ in threads.map(do, range(len(buffers))):
            pass
