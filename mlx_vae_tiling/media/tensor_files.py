"""Named tensors of .safetensors, .latent, .npy, .npz, .pt and .pth files, each loaded only when asked for."""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from mlx_vae_tiling.dtypes import STORED

from .safetensors_header import read_local_header

Array = npt.NDArray[Any]
BFLOAT16 = np.dtype("V2")  # what mx.save writes for bfloat16, which NumPy does not have

_DAMAGED = (ValueError, RuntimeError, EOFError, SafetensorError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; `load` reads it, bfloat16 as the two-byte dtype `BFLOAT16`."""

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Array]


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
            text = str(stored.load().item())
        value = float(Fraction(text)) if re.fullmatch(r"\d+(\.\d+|/0*[1-9]\d*)?", text) else 0.0
        return value or None


def read_tensor_file(path: str) -> TensorFile:
    """Read names, shapes and metadata of a file, by the suffix of its name.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: A `.pt` file, and torch is not installed.
        ValueError: It is a directory, has an unknown suffix, or cannot be read.
    """
    reader = _READERS.get(os.path.splitext(path)[1].lower())
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file of latents: {path}")
    if os.path.isdir(path):
        raise ValueError(f"latents must be a file, got the directory {path}; name the file in it")
    if reader is None:
        raise ValueError(f"a file of latents must end in {', '.join(_READERS)}, got {path}")
    with damage_reported(path):
        return reader(path)


@contextmanager
def damage_reported(path: str) -> Iterator[None]:
    """Turn what libraries raise on an unreadable file into one ValueError that names it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds Python objects, which are never run; "
            "save the tensor alone: torch.save(latents, path)"
        ) from error
    except _DAMAGED as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is truncated, damaged or not what its name ends in; save it again: {reason}"
        ) from error


def _read_safetensors(path: str) -> TensorFile:
    tensors = {}
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            view = file.get_slice(name)
            load = _load_bfloat16 if view.get_dtype() == "BF16" else _load_safetensors
            stored = STORED.get(view.get_dtype())
            dtype = stored.name if stored else view.get_dtype()
            tensors[name] = StoredTensor(tuple(view.get_shape()), dtype, partial(load, path, name))
        return TensorFile(tensors, dict(file.metadata() or {}))


def _load_safetensors(path: str, name: str) -> Array:
    with safe_open(path, framework="numpy") as file:
        return np.asarray(file.get_tensor(name))


def _load_bfloat16(path: str, name: str) -> Array:
    entry = read_local_header(Path(path)).tensors[name]
    values: Array = np.fromfile(path, BFLOAT16, math.prod(entry.shape), offset=entry.start)
    return values.reshape(entry.shape)


def _read_npy(path: str) -> TensorFile:
    with open(path, "rb") as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return TensorFile({"": StoredTensor(array.shape, _numpy_name(array.dtype), lambda: array)}, {})


def _read_npz(path: str) -> TensorFile:
    tensors, metadata = {}, {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            with archive.open(member) as file:
                old = np.lib.format.read_magic(file) == (1, 0)
                read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            if dtype.kind == "U":
                metadata[name] = str(_load_npz(path, name))
            else:
                tensors[name] = StoredTensor(shape, _numpy_name(dtype), partial(_load_npz, path, name))
    return TensorFile(tensors, metadata)


def _load_npz(path: str, name: str) -> Array:
    with np.load(path, allow_pickle=False) as archive:
        return np.asarray(archive[name])


def _numpy_name(dtype: np.dtype[Any]) -> str:
    return "bfloat16" if dtype == BFLOAT16 else dtype.name


def _read_torch(path: str) -> TensorFile:
    try:
        torch = import_module("torch")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading {path} needs torch: pip install torch, or save the latents as .safetensors"
        ) from error
    tensors, metadata = {}, {}
    for name, value in _leaves("", torch.load(path, map_location="cpu", weights_only=True)):
        if isinstance(value, torch.Tensor):
            load = partial(_load_torch, value.detach(), torch.int16)
            tensors[name] = StoredTensor(tuple(value.shape), str(value.dtype).removeprefix("torch."), load)
        else:
            metadata[name] = str(value)
    return TensorFile(tensors, metadata)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}.{key}" if name else str(key), item)
    else:
        yield name, value


def _load_torch(tensor: Any, int16: Any) -> Array:
    array: Array
    if str(tensor.dtype) == "torch.bfloat16":
        array = tensor.contiguous().view(int16).numpy().view(BFLOAT16)
    else:
        array = tensor.numpy()
    return array


_READERS: dict[str, Callable[[str], TensorFile]] = {
    ".safetensors": _read_safetensors,
    ".latent": _read_safetensors,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
