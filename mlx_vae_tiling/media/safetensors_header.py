"""The header of a safetensors file: which tensors lie where, read without reading any of them.

A file is the header's length N (8 bytes, little-endian), N bytes of JSON, and the tensors' bytes. The JSON
maps names to `dtype`, `shape` and `data_offsets`, counted from its own end, and `__metadata__` to strings.
The tensors cover the bytes behind the header exactly: in some order, one begins where another ends.
"""

from __future__ import annotations

import json
import math
import stat
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

# A checkpoint of 46 GB has a header of less than a megabyte. What is damaged should not take much to say so.
LARGEST_HEADER_BYTES = 8 * 2**20
MOST_TENSORS = 100_000
MOST_AXES = 16
LARGEST_SHOWN = 80


class TensorEntry(NamedTuple):
    """The tensor `name` is the bytes `start` to `stop` - 1 of a file."""

    file: str
    name: str
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
        ValueError: If it is not a safetensors file, cut off, or larger than any that is published; or if
            its tensors do not cover it, each byte once.
    """
    beginning = read(0, min(9, file_bytes))
    length = int.from_bytes(beginning[:8], "little")
    if length < 2 or beginning[8:] != b"{":
        raise ValueError(
            f"{file} ({file_bytes} bytes) is not a safetensors file: it does not start with a header"
        )
    if 8 + length > file_bytes:
        raise _truncated(file, 8 + length, file_bytes)
    if length > LARGEST_HEADER_BYTES:
        raise ValueError(
            f"{file}: a header may have {LARGEST_HEADER_BYTES} bytes, this one claims to have {length}"
        )
    try:
        metadata, tensors = _parse(file, 8 + length, read(8, length))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = shortened(str(error) if isinstance(error, ValueError) else repr(error))
        raise ValueError(f"{file} is not a safetensors file: its header cannot be read ({reason})") from error
    end = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if end > file_bytes:
        raise _truncated(file, end, file_bytes)
    _check_coverage(file, tensors, 8 + length, file_bytes)
    return Header(tensors, metadata)


def read_local_header(path: Path) -> Header:
    """Reads the header of a file of this machine.

    Raises:
        OSError: If it cannot be read.
        ValueError: As `read_header` does, or if it is no ordinary file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise ValueError(f"{path} must be an ordinary file, it is {kind}")

    def read(offset: int, size: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    return read_header(str(path), status.st_size, read)


def shortened(text: str, longest: int = LARGEST_SHOWN) -> str:
    """A text of one line of printable characters, at most `longest`, without its middle where it has more."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    kept = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:kept]}...{text[-kept:]}"


def _truncated(file: str, needed: int, file_bytes: int) -> ValueError:
    return ValueError(
        f"{file} is truncated: its header describes at least {needed} bytes, it has {file_bytes}; "
        "copy or download it again"
    )


def _parse(file: str, origin: int, text: bytes) -> tuple[Mapping[str, str], dict[str, TensorEntry]]:
    fields = json.loads(text, object_pairs_hook=_distinct)
    metadata = fields.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if len(fields) > MOST_TENSORS:
        raise ValueError(f"it may list {MOST_TENSORS} tensors, it lists {len(fields)}")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map to strings")
    return metadata, {name: _entry(file, name, origin, field) for name, field in fields.items()}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name stands twice in it")
    return fields


def _entry(file: str, name: str, origin: int, field: Mapping[str, Any]) -> TensorEntry:
    dtype, shape, (start, stop) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
    if len(shape) > MOST_AXES:
        raise ValueError(f"a tensor may have {MOST_AXES} axes, {shortened(name)} has {len(shape)}")
    if not isinstance(dtype, str) or not all(map(_is_size, (*shape, start, stop))):
        raise ValueError(f"{dtype!r} {shape} at {start!r} to {stop!r} describes no tensor")
    expected = ITEM_BYTES.get(dtype, 0) * math.prod(shape)
    if start > stop or (dtype in ITEM_BYTES and stop - start != expected):
        raise ValueError(f"{dtype} {shape} cannot lie at {start} to {stop}")
    return TensorEntry(file, name, dtype, shape, origin + start, origin + stop)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_coverage(file: str, tensors: Mapping[str, TensorEntry], origin: int, file_bytes: int) -> None:
    """Where tensors share bytes, or bytes are nobody's, the header is not the one that these bytes had."""
    position, previous = origin, "the header"
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        name = shortened(tensor.name)
        if tensor.start != position:
            overlap = tensor.start < position
            what = f"{name} overlaps {previous}" if overlap else f"a hole lies before {name}"
            raise _damaged(file, what)
        position, previous = tensor.stop, name
    if position != file_bytes:
        raise _damaged(file, f"{file_bytes - position} bytes behind the last tensor belong to none")


def _damaged(file: str, what: str) -> ValueError:
    return ValueError(
        f"{file} is damaged, its tensors must cover its bytes once: {what}; copy or download it again"
    )
