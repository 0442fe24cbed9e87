"""How many threads may compute beside each other."""

from __future__ import annotations

import os
import time
from functools import lru_cache

import numpy as np


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
