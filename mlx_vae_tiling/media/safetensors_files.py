"""Tensors in .safetensors and .latent files, after the safetensors library has judged the header."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import safe_open

from mlx_vae_tiling.dtypes import STORED

from .safetensors_header import TensorEntry, read_local_header
from .stored import BFLOAT16, Array, StoredTensor, TensorFile, read_pieces

_DTYPES = {stored_name: kind.name for stored_name, kind in STORED.items()}
_DTYPES |= {
    f"{kind}{bits}": f"{name}{bits}"
    for kind, name in (("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
}


def read_safetensors(path: str) -> TensorFile:
    """Look into a file.

    Byte ranges that overlap, are shared, leave gaps or do not fit the shapes are refused twice: by the reader
    of headers, which tells where the tensors lie, and by the library.
    """
    header = read_local_header(Path(path))
    with safe_open(path, framework="numpy") as file:
        if set(file.keys()) != set(header.tensors):
            raise ValueError("its header names other tensors than the safetensors library finds")
        metadata = dict(file.metadata() or {})
    tensors = {}
    for name, entry in header.tensors.items():
        dtype = _DTYPES.get(entry.dtype, entry.dtype)
        tensors[name] = StoredTensor(entry.shape, dtype, partial(_pieces, path, entry))
    return TensorFile(tensors, metadata)


def _pieces(path: str, entry: TensorEntry) -> Iterator[Array]:
    name = _DTYPES.get(entry.dtype, "uint8")
    kind = BFLOAT16 if name == "bfloat16" else np.dtype(name).newbyteorder("<")
    with open(path, "rb") as file:
        file.seek(entry.start)
        yield from read_pieces(file, kind, entry.size_in_bytes // kind.itemsize)
