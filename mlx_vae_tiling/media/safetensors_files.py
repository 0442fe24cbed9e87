"""Tensors in .safetensors and .latent files, once the header has been found to be sound."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import safe_open

from mlx_vae_tiling.dtypes import STORED

from .safetensors_header import TensorEntry, read_local_header
from .stored import BFLOAT16, Array, StoredTensor, TensorFile, read_pieces

_INTEGERS = {
    f"{kind}{bits}": f"{name}{bits}"
    for kind, name in (("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
}
_NAMES = {stored: kind.name for stored, kind in STORED.items()} | _INTEGERS | {"BOOL": "bool"}


def read_safetensors(path: str) -> TensorFile:
    """Look into a file.

    Raises:
        SafetensorError: The library's own reader refuses it.
        ValueError: Byte ranges overlap, are shared, leave gaps or do not fit the shapes.
    """
    header = read_local_header(Path(path))
    with safe_open(path, framework="numpy"):
        pass
    tensors = {}
    for name, entry in header.tensors.items():
        dtype = _NAMES.get(entry.dtype, entry.dtype)
        tensors[name] = StoredTensor(entry.shape, dtype, partial(_pieces, entry, dtype))
    return TensorFile(tensors, dict(header.metadata))


def _pieces(entry: TensorEntry, name: str) -> Iterator[Array]:
    kind = np.dtype(np.uint8)
    if name in _NAMES.values():
        kind = BFLOAT16 if name == "bfloat16" else np.dtype(name).newbyteorder("<")
    with open(entry.file, "rb") as file:
        file.seek(entry.start)
        yield from read_pieces(file, kind, entry.size_in_bytes // kind.itemsize)
