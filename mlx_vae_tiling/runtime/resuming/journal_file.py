"""The file of a journal: replaced whole, and read only where it is what was written."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from mlx_vae_tiling.media.places import replace_durably

NAME, FRESH_NAME = "journal.json", "journal.json.new"

_MOST_BYTES = 2**22
"""Of a journal; one of 64 windows takes a hundredth of it."""


def write_told(folder: Path, told: dict[str, Any]) -> None:
    """Replaces the journal of a folder by what is told, in types that JSON has, once it is on the disk."""
    fresh = folder / FRESH_NAME
    fresh.write_text(json.dumps({**told, "sum": _sum(told)}, indent=1))
    replace_durably(os.fspath(fresh), os.fspath(folder / NAME))


def read_told(folder: Path) -> dict[str, Any]:
    """What the journal of a folder tells.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not as it was written.
    """
    place = folder / NAME
    found = place.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
        raise ValueError("it is no file of a journal's size")
    try:
        told = json.loads(place.read_text())
    except RecursionError:
        raise ValueError("its brackets are nested without end") from None
    if not isinstance(told, dict) or told.pop("sum", None) != _sum(told):
        raise ValueError("it is not as it was written")
    return told


def _sum(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
