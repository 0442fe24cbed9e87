"""Memory: budgets in words, limits of MLX that are restored, and what was really used."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import threading
from collections.abc import Callable, Iterator
from numbers import Real

import mlx.core as mx

from mlx_vae_tiling.arguments import told
from mlx_vae_tiling.vae.backend import Backend
from mlx_vae_tiling.vae.backends import current_backend

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

BUDGET_SHARE = 0.7
"""Share of the available memory that a decode takes unless told otherwise."""


def parse_bytes(amount: int | float | str, least: int = 1) -> int:
    """Reads an amount of memory.

    Args:
        amount: Bytes, or a string such as "8GB" (10**9), "6.5GiB" (2**30) or "800 MB".
        least: The smallest that makes sense, in bytes.

    Raises:
        ValueError: If it is no such amount in known units.

    Example:
        >>> parse_bytes("6.5GiB")
        6979321856
    """
    number = amount
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", amount)
        if match and match[2].upper() in _UNITS:
            number = float(match[1]) * _UNITS[match[2].upper()]
    if not isinstance(number, str | bool) and isinstance(number, Real) and least <= number < 2**63:
        return int(number)
    raise ValueError(
        f"memory must be a positive number of bytes or a string such as '8GB' or '6.5GiB', got {told(amount)}"
    )


def format_bytes(amount: int | float) -> str:
    """An amount of memory for people, in powers of ten: "1.52 GB"."""
    for unit in ("GB", "MB", "KB"):
        if amount >= _UNITS[unit]:
            return f"{amount / _UNITS[unit]:.2f} {unit}"
    return f"{amount:.0f} B"


def available_bytes() -> int:
    """What the default device can still take: of Metal's recommended working set, or of the memory."""
    if (info := current_backend().device_memory()) is not None:
        for key in ("max_recommended_working_set_size", "free_memory", "total_memory", "memory_size"):
            if isinstance(info.get(key), int):
                # What is free has no part in use already.
                used = 0 if key == "free_memory" else mx.get_active_memory()
                return max(int(info[key]) - used, 1)
    if platform.system() == "Linux":
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_budget(limit: int | float | str | None = None) -> int:
    """The bytes that a decode may use: the limit, or 70 % of what is available."""
    return int(BUDGET_SHARE * available_bytes()) if limit is None else parse_bytes(limit)


class PeakMeter:
    """Measures the most that MLX holds, by MLX's own peak, which it resets, and a backend beside it.

    Args:
        others: Bytes that are held for other purposes, and do not count.
        backend: Whose memory outside MLX counts too.

    Attributes:
        highest: The most at any reading.
    """

    def __init__(self, others: int = 0, backend: Backend | None = None):
        self.others, self.backend, self.highest = others, backend, 0
        mx.reset_peak_memory()

    def read(self) -> int:
        """The most that was held since the last `restart`."""
        peak = max(mx.get_peak_memory(), mx.get_active_memory()) - self.others
        if self.backend:
            peak += self.backend.held_workspace_bytes
        self.highest = max(self.highest, peak)
        return peak

    def restart(self) -> None:
        """Frees what can be freed, and measures anew."""
        mx.clear_cache()
        mx.reset_peak_memory()


def footprint_bytes() -> int:
    """The most physical memory that this process held, as the operating system counts it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


@contextlib.contextmanager
def memory_limits(
    memory: int | float | str | None = None,
    *,
    cache: int | float | str | None = None,
    wired: int | float | str | None = None,
) -> Iterator[int]:
    """Sets MLX's memory limits and restores them at the end, whatever happens.

    Args:
        memory: The memory limit, bytes or a string; by default `memory_budget()`.
        cache: The limit of the cache of freed buffers, 0 for none; by default an eighth of `memory`.
        wired: The wired limit, on Metal only; by default unchanged. Metal refuses more than its
            recommended working set.

    Yields:
        The memory limit in bytes.

    Example:
        >>> with memory_limits("8GB") as limit:
        ...     print(limit)
        8000000000
    """
    limit = memory_budget(memory)
    wanted = {mx.set_memory_limit: limit}
    wanted[mx.set_cache_limit] = limit // 8 if cache is None else parse_bytes(cache, least=0)
    wired_limit = None if wired is None else parse_bytes(wired)
    if wired_limit is not None and current_backend().wires_memory:
        wanted[mx.set_wired_limit] = wired_limit
    scope = _Scope()
    try:
        for set_limit, value in wanted.items():
            scope.enter(set_limit, value)
        yield limit
    finally:
        scope.leave()


Setter = Callable[[int], int]

_lock = threading.Lock()
_scopes: dict[Setter, list[tuple[object, int]]] = {}
"""Of each limit of the process, who has set it to what, the oldest first; the first entry is the original."""


class _Scope:
    """One use of `memory_limits`. Scopes may end in any order: the youngest that is left prevails."""

    def enter(self, set_limit: Setter, value: int) -> None:
        with _lock:
            before = set_limit(value)
            _scopes.setdefault(set_limit, [(None, before)]).append((self, value))

    def leave(self) -> None:
        with _lock:
            for set_limit in list(_scopes):
                left = _scopes[set_limit] = [entry for entry in _scopes[set_limit] if entry[0] is not self]
                set_limit(left[-1][1])
                if len(left) == 1:
                    del _scopes[set_limit]
