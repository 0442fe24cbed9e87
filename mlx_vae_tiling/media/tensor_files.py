"""Named tensors of .safetensors, .latent, .npy, .npz, .pt and .pth files, each loaded only when asked for."""

from __future__ import annotations

import errno
import lzma
import os
import pickle
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from safetensors import SafetensorError

from .numpy_files import read_npy, read_npz
from .safetensors_files import read_safetensors
from .stored import BFLOAT16, Array, StoredTensor, TensorFile

_DAMAGED = (
    ValueError,
    RuntimeError,
    EOFError,
    OverflowError,
    SafetensorError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
_LONGEST_REASON = 300


def read_tensor_file(path: str) -> TensorFile:
    """Read names, shapes and metadata of a file, by the suffix of its name.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: A `.pt` file, and torch is not installed.
        PermissionError: It may not be read.
        ValueError: It is a directory or a device, has an unknown suffix, or cannot be read.
    """
    reader = _READERS.get(os.path.splitext(path)[1].lower())
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, "no such file of latents", path) from error
    if stat.S_ISDIR(mode):
        raise ValueError(f"latents must be a file, got the directory {path}; name the file in it")
    if reader is None:
        raise ValueError(f"a file of latents must end in {', '.join(_READERS)}, got {path}")
    if not stat.S_ISREG(mode):
        raise ValueError(f"latents must be a file, got {path}, a pipe or device; copy it to a file first")
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, "this file of latents may not be read", path)
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
        raise _damaged(path, error) from error
    except OSError as error:
        if (
            error.errno is None or error.errno == errno.EINVAL
        ):  # of a decompressor, of a place before the start
            raise _damaged(path, error) from error
        raise


def _damaged(path: str, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0].replace(path, "it")
    reason = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."
    return ValueError(f"{path} is truncated, damaged or not what its name ends in; save it again: {reason}")


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
            pieces = partial(_torch_pieces, value.detach(), torch.int16)
            tensors[name] = StoredTensor(tuple(value.shape), str(value.dtype).removeprefix("torch."), pieces)
        else:
            metadata[name] = str(value)
    return TensorFile(tensors, metadata)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}.{key}" if name else str(key), item)
    else:
        yield name, value


def _torch_pieces(tensor: Any, int16: Any) -> Iterator[Array]:
    if str(tensor.dtype) == "torch.bfloat16":
        yield tensor.contiguous().view(int16).numpy().reshape(-1).view(BFLOAT16)
    else:
        yield tensor.numpy().reshape(-1)


_READERS: dict[str, Callable[[str], TensorFile]] = {
    ".safetensors": read_safetensors,
    ".latent": read_safetensors,
    ".npy": read_npy,
    ".npz": read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
