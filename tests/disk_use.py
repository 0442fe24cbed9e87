"""Bytes that files take in a folder, looked at whenever one may have grown, got another name or gone."""

import contextlib
import os

from mlx_vae_tiling.media import movie
from mlx_vae_tiling.media.writer import VideoWriter

CHANGES = [
    (os, "replace"),
    (os, "remove"),
    (os, "truncate"),
    (os, "close"),
    (VideoWriter, "write"),
    (movie, "flush_to_disk"),
]
"""A file of the muxer is complete when `os.close` ends what it was opened with beside it."""


def bytes_in(folder):
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def watched(folder, monkeypatch):
    """A list that gets the bytes in a folder before and after every change of a video."""
    taken = []

    def around(function):
        def changing(*given, **options):
            taken.append(bytes_in(folder))
            try:
                return function(*given, **options)
            finally:
                taken.append(bytes_in(folder))

        return changing

    def muxed(*given):
        for count in mux(*given):
            taken.append(bytes_in(folder))
            yield count
        taken.append(bytes_in(folder))

    mux = movie._mux
    monkeypatch.setattr(movie, "_mux", muxed)
    for owner, name in CHANGES:
        monkeypatch.setattr(owner, name, around(getattr(owner, name)))
    return taken
