"""Tensors in .safetensors and .latent files, after the safetensors library has judged the header."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from safetensors import safe_open

from .stored import BFLOAT16, Array, StoredTensor, TensorFile, read_pieces

_DTYPES = {
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool"},
    **{
        f"{kind}{bits}": f"{name}{bits}"
        for kind, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
}
_LARGEST_HEADER_BYTES = 1 << 24  # a workflow of ComfyUI, which the metadata may hold, has some hundred KB


def read_safetensors(path: str) -> TensorFile:
    """Look into a file.

    The library refuses byte ranges that overlap, are shared, leave gaps or do not fit the shapes. The offsets
    it does not tell are then taken from the same header.
    """
    header, start = _read_header(path)
    with safe_open(path, framework="numpy") as file:
        names, metadata = set(file.keys()), dict(file.metadata() or {})
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if set(entries) != names:
        raise ValueError("its header names other tensors than the safetensors library finds")
    tensors = {}
    for name, entry in entries.items():
        dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
        begin, end = entry["data_offsets"]
        pieces = partial(_pieces, path, start + begin, end - begin, dtype)
        tensors[name] = StoredTensor(tuple(entry["shape"]), dtype, pieces)
    return TensorFile(tensors, metadata)


def _read_header(path: str) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        present = os.fstat(file.fileno()).st_size - 8
        if not 2 <= length <= present:
            raise ValueError(f"its header of {length} bytes is longer than the file")
        if length > _LARGEST_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, more than {_LARGEST_HEADER_BYTES}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise ValueError("its header has too many nested brackets") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header, 8 + length


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("its header names something twice")
    return table


def _pieces(path: str, begin: int, length: int, name: str) -> Iterator[Array]:
    kind = np.dtype(np.uint8)
    if name in _DTYPES.values():
        kind = BFLOAT16 if name == "bfloat16" else np.dtype(name).newbyteorder("<")
    with open(path, "rb") as file:
        file.seek(begin)
        yield from read_pieces(file, kind, length // kind.itemsize)
