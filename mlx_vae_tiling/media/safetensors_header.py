"""The header of a safetensors file: which tensors lie where, read without reading any of them.

A file is the header's length N (8 bytes, little-endian), N bytes of JSON, and the tensors' bytes. The JSON
maps names to `dtype`, `shape` and `data_offsets`, counted from its own end, and `__metadata__` to strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_vae_tiling.dtypes import STORED

Read = Callable[[int, int], bytes]
"""Returns `size` bytes of a file from `offset` on."""

ITEM_BYTES = {kind.stored_name: kind.item_bytes for kind in STORED.values()}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_BYTES |= {f"{kind}{8 * size}": size for kind in "IU" for size in (2, 4, 8)}
LARGEST_HEADER_BYTES = 100_000_000


class TensorEntry(NamedTuple):
    """A tensor's bytes `start` to `stop` - 1 of a file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size_in_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """Tensors by name, and the metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(file: str, file_bytes: int, read: Read) -> Header:
    """Reads the header of a safetensors file, wherever the file is.

    Args:
        file: Its name, for messages and for each `TensorEntry`.
        file_bytes: Its size.
        read: Reads some of its bytes; called twice.

    Raises:
        ValueError: If it is not a safetensors file, or cut off.
    """
    beginning = read(0, min(9, file_bytes))
    length = int.from_bytes(beginning[:8], "little")
    if not 2 <= length <= LARGEST_HEADER_BYTES or beginning[8:] != b"{":
        raise ValueError(
            f"{file} ({file_bytes} bytes) is not a safetensors file: it does not start with a header"
        )
    if 8 + length > file_bytes:
        raise _truncated(file, 8 + length, file_bytes)
    try:
        fields = json.loads(read(8, length))
        metadata = fields.pop("__metadata__", None) or {}
        tensors = {name: _entry(file, 8 + length, field) for name, field in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a safetensors file: its header cannot be read ({error!r})"
        ) from error
    end = max((tensor.stop for tensor in tensors.values()), default=0)
    if end > file_bytes:
        raise _truncated(file, end, file_bytes)
    return Header(tensors, metadata)


def read_local_header(path: Path) -> Header:
    """Reads the header of a file of this machine."""

    def read(offset: int, size: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    return read_header(str(path), path.stat().st_size, read)


def _truncated(file: str, needed: int, file_bytes: int) -> ValueError:
    return ValueError(
        f"{file} is truncated: its header describes at least {needed} bytes, it has {file_bytes}; "
        "copy or download it again"
    )


def _entry(file: str, origin: int, field: Mapping[str, Any]) -> TensorEntry:
    dtype, shape, (start, stop) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
    expected = ITEM_BYTES.get(dtype, 0) * math.prod(shape)
    if not 0 <= start <= stop or (dtype in ITEM_BYTES and stop - start != expected):
        raise ValueError(f"{dtype} {shape} cannot lie at {start} to {stop}")
    return TensorEntry(file, dtype, shape, origin + start, origin + stop)
