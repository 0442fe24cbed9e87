"""Arrays in .npy and .npz files, read piece by piece after their headers were held against their sizes."""

from __future__ import annotations

import ast
import math
import os
import warnings
import zipfile
from collections.abc import Iterator
from functools import partial
from typing import IO, Any, NamedTuple

import numpy as np

from .stored import BFLOAT16, Array, StoredTensor, TensorFile, read_pieces

_LONGEST_TEXT_BYTES = 1 << 16
_LONGEST_HEADER_BYTES = 10_000
_MOST_MEMBERS = 10_000
# Deflate shrinks by at most 1032.
_SMALLEST_SHARE = 1100


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def values(self) -> int:
        return math.prod(self.shape)


def read_npy(path: str) -> TensorFile:
    """Look into one array."""
    with open(path, "rb") as file:
        header = _read_header(file)
        _check_size(header, os.fstat(file.fileno()).st_size - file.tell())
    stored = StoredTensor(header.shape, _name(header.dtype), partial(_npy_pieces, path), header.fortran)
    return TensorFile({"": stored}, {})


def read_npz(path: str) -> TensorFile:
    """Look into an archive of arrays; arrays of text are taken for metadata."""
    tensors, metadata = {}, {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MOST_MEMBERS:
            raise ValueError(f"{len(members)} arrays")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in tensors or name in metadata:
                raise ValueError(f"two arrays are named {name!r}")
            with archive.open(member) as file:
                header = _read_header(file)
                if not header.dtype.hasobject:  # they cannot be read, and need not be
                    _check_size(header, member.file_size - file.tell())
                    if member.file_size > _SMALLEST_SHARE * (member.compress_size + 1000):
                        raise ValueError(f"{member.file_size} bytes cannot be in {member.compress_size}")
                if header.dtype.kind == "U" and not header.shape:
                    if header.dtype.itemsize <= _LONGEST_TEXT_BYTES:
                        metadata[name] = str(next(read_pieces(file, header.dtype, 1))[0])
                    continue
            pieces = partial(_npz_pieces, path, member.filename)
            tensors[name] = StoredTensor(header.shape, _name(header.dtype), pieces, header.fortran)
    return TensorFile(tensors, metadata)


def _npy_pieces(path: str) -> Iterator[Array]:
    with open(path, "rb") as file:
        header = _read_header(file)
        yield from read_pieces(file, header.dtype, header.values)


def _npz_pieces(path: str, member: str) -> Iterator[Array]:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        header = _read_header(file)
        yield from read_pieces(file, header.dtype, header.values)
        if file.read(1):  # also checks the sum of what was read
            raise ValueError("more bytes than the header counts")


def _read_header(file: IO[bytes]) -> _Header:
    """Read a header of version 1, 2 or 3: a table of Python's as text.

    NumPy's own reader raises what its tokenizer and parser do, of which there is no list.
    """
    major = np.lib.format.read_magic(file)[0]
    if major not in (1, 2, 3):
        raise ValueError(f"version {major} of the format is not known")
    length = int.from_bytes(file.read(2 if major == 1 else 4), "little")
    if length > _LONGEST_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes, more than {_LONGEST_HEADER_BYTES}")
    text = file.read(length).decode("utf-8" if major == 3 else "latin1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd spellings of numbers and types
            table = ast.literal_eval(text.strip(" \n"))
            dtype = np.dtype(table["descr"])
            shape, fortran = table["shape"], table["fortran_order"]
    except (SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__})") from error
    counted = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not counted or not isinstance(fortran, bool):
        raise ValueError("its header has no shape or order that can be read")
    return _Header(shape, fortran, dtype)


def _check_size(header: _Header, present: int) -> None:
    if header.dtype.hasobject:
        raise ValueError("Object arrays hold Python objects, which are never run")
    needed = header.values * header.dtype.itemsize
    if needed > present:
        raise ValueError(f"{present} bytes of {needed} for {header.shape} {header.dtype.name}")


def _name(dtype: np.dtype[Any]) -> str:
    return "bfloat16" if dtype == BFLOAT16 else dtype.name
