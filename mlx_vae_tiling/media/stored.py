"""What a file of tensors holds, and how one of them becomes an MLX array without a second copy of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BFLOAT16 = np.dtype("V2")  # what mx.save writes for bfloat16, which NumPy does not have
PIECE_BYTES = 1 << 20
_MLX_DTYPES = {
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "float32": mx.float32,
    "float64": mx.float32,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        shape: Its sizes.
        dtype: "float16", "bfloat16", "float32", "float64", or another name.
        pieces: Reads it: flat arrays one after the other, of bfloat16 as `BFLOAT16`.
        fortran: Whether the pieces run through the first axis fastest.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: Callable[[], Iterator[Array]]
    fortran: bool = False

    def load(self, dtype: mx.Dtype | None = None, scale: float = 1.0) -> mx.array:
        """Read a floating tensor into an MLX array; besides the array only a piece is in memory.

        Args:
            dtype: That of the result; by default its own, and float32 for float64.
            scale: What it is multiplied by.

        Raises:
            EOFError: The file ends before.
        """
        target = dtype or _MLX_DTYPES[self.dtype]
        bits = mx.uint16 if target == mx.bfloat16 else target
        array = mx.zeros((math.prod(self.shape),), bits, stream=mx.cpu)
        mx.eval(array)
        view: Array = np.array(array, copy=False)
        filled = 0
        for piece in self.pieces():
            view[filled : filled + len(piece)] = _converted(piece, target, scale)
            filled += len(piece)
        assert filled == len(view)  # readers have checked that the file has what the shape says
        del view
        array = array.view(mx.bfloat16) if target == mx.bfloat16 else array
        shape = self.shape[::-1] if self.fortran else self.shape
        return array.reshape(shape).transpose() if self.fortran else array.reshape(shape)


def _converted(piece: Array, dtype: mx.Dtype, scale: float) -> Array:
    if piece.dtype == BFLOAT16 and dtype == mx.bfloat16 and scale == 1:
        return piece.view(np.uint16)
    if piece.dtype != BFLOAT16 and dtype != mx.bfloat16 and scale == 1:
        return piece
    if piece.dtype == BFLOAT16:
        values = mx.array(piece.view(np.uint16)).view(mx.bfloat16)
    else:
        values = mx.array(piece.astype(piece.dtype.newbyteorder("=")).astype(np.float32))
    scaled = (values.astype(mx.float32) * scale).astype(dtype)
    return np.array(scaled.view(mx.uint16) if dtype == mx.bfloat16 else scaled)


@dataclass(frozen=True)
class TensorFile:
    """What a file holds; nested names are joined with dots, and a lone tensor is named ""."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    def number(self, name: str) -> float | None:
        """A positive number from the metadata or a one-element tensor; None where the file has none."""
        text = self.metadata.get(name, "")
        stored = self.tensors.get(name)
        if stored is not None and math.prod(stored.shape) == 1 and stored.dtype != "bfloat16":
            values = next(stored.pieces())
            text = str(values.item()) if len(values) == 1 else ""
        usable = re.fullmatch(r"\d{1,12}(\.\d{1,30}|/0*[1-9]\d{0,11})?", text)
        return (float(Fraction(text)) if usable else 0.0) or None


def read_pieces(file: IO[bytes], dtype: np.dtype[Any], count: int) -> Iterator[Array]:
    """The next `count` values of an open file.

    Raises:
        EOFError: It ends before.
    """
    while count:
        now = min(count, max(1, PIECE_BYTES // dtype.itemsize))
        data = file.read(now * dtype.itemsize)
        if len(data) != now * dtype.itemsize:
            raise EOFError(f"the file ends {(count - now) * dtype.itemsize + len(data)} bytes early")
        yield np.frombuffer(data, dtype)
        count -= now
