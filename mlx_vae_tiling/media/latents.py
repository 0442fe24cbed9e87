"""Saved video latents of every known producer, as one array.

What is read, and where the layout comes from:

- `.safetensors`, and ComfyUI's `.latent`, which is the same with the key `latent_tensor`.
- `.npy` and `.npz`, as NumPy or MLX write them, bfloat16 included.
- `.pt` and `.pth` when torch is installed: tensors only, never arbitrary pickles.
- (B, C, F, H, W), (B, F, C, H, W) or (B, F, H, W, C), with or without the batch; the axis of size C tells.
- Packed tokens (B, F*H*W, C) or (F*H*W, C), frame-major, which need F, H and W.

Whether latents are normalised is in none of these files; `looks_denormalized` compares them with a VAE.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import mlx.core as mx

from mlx_vae_tiling.arguments import require, told
from mlx_vae_tiling.dtypes import FLOAT_TYPES, STORED
from mlx_vae_tiling.forks import using_mlx

from .stored import StoredTensor, TensorFile
from .tensor_files import damage_reported, read_tensor_file

DEMO = Path(__file__).parent.parent / "demo" / "latents.safetensors"
_FLOATS = tuple(kind.name for kind in STORED.values())
_COMFYUI_KEY, _COMFYUI_MARKER = "latent_tensor", "latent_format_version_0"
_COMFYUI_UNMARKED_SCALE = 1 / 0.18215
_PREFERRED_KEY = "final_video_latent"
_NARROWED = {kind.name: kind.mlx for kind in FLOAT_TYPES if kind.item_bytes == 2}


@dataclass(frozen=True, eq=False)
class SavedLatents:
    """Latents (B, C, F, H, W), their key in the file ("" if none), and the file's fps (None if none)."""

    latents: mx.array
    key: str
    fps: float | None


def load_latents(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    latent_size: tuple[int, int, int] | None = None,
    channels: int = 128,
) -> mx.array:
    """Load saved video latents as (B, C, F, H, W), in the floating dtype they were stored in.

    A file with one video latent needs no options. Of several, `final_video_latent` is taken, in a `.latent`
    file `latent_tensor`, else `key` must choose. Tensors named audio, and packed tensors beside an unpacked
    one, are passed over. float64 becomes float32. As ComfyUI does, a `.latent` file without the marker
    `latent_format_version_0` is multiplied by 1 / 0.18215. The file is read piece by piece into the array,
    so that nothing else of its size is in memory.

    Args:
        path: A `.safetensors`, `.latent`, `.npy`, `.npz`, `.pt` or `.pth` file; "demo" for those bundled.
        key: Which tensor to take. Nested ones are named with dots, as `samples.0`.
        latent_size: (F, H, W) in latents, which packed tokens (B, F*H*W, C) need unless the file has them.
        channels: C, 128 for LTX.

    Returns:
        The latents, normalised or not as they were saved.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: A `.pt` file, and torch is not installed.
        PermissionError: The file may not be read.
        ValueError: The file is damaged, a pipe or a device, or holds no video latents or several.

    Example:
        >>> load_latents("shot.latent").shape
        (1, 128, 16, 17, 30)
    """
    return read_latents(path, key=key, latent_size=latent_size, channels=channels).latents


def read_latents(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    latent_size: tuple[int, int, int] | None = None,
    channels: int = 128,
) -> SavedLatents:
    """Load saved video latents as `load_latents` does, with what the file says beside them."""
    require("path", path, "text or a path", str, os.PathLike)
    require("key", key, "text or None", str, None)
    require("latent_size", latent_size, "(F, H, W) or None", tuple, list, None)
    for size in (channels, *(latent_size or ())):
        require("channels and latent_size", size, "whole numbers", Integral)
    path = str(DEMO) if path == "demo" else os.fspath(path)
    if latent_size is not None and (len(latent_size) != 3 or min(latent_size) < 1):
        raise ValueError(f"latent_size must be three positive numbers (F, H, W), got {latent_size}")
    file = read_tensor_file(path)
    name = _choose(path, file.tensors, key, channels)
    comfyui = path.lower().endswith(".latent") and name == _COMFYUI_KEY
    unmarked = comfyui and _COMFYUI_MARKER not in file.tensors
    stored_as = file.metadata.get(f"{name}_mlx_dtype", "").rpartition(".")[2]
    using_mlx()
    with damage_reported(path):
        scale = _COMFYUI_UNMARKED_SCALE if unmarked else 1.0
        latents = file.tensors[name].load(_NARROWED.get(stored_as), scale)
        fps = file.number("fps")
    return SavedLatents(_arrange(path, latents, latent_size, _size_in_file(file), channels), name, fps)


def looks_denormalized(latents: mx.array, mean: mx.array, std: mx.array) -> bool:
    """Whether latents have a VAE's per-channel statistics rather than mean 0 and deviation 1.

    Args:
        latents: (B, C, F, H, W).
        mean: (C,), the VAE's mean-of-means.
        std: (C,), the VAE's std-of-means.

    Returns:
        True if the VAE's statistics are the nearer ones: likely, not certain.
    """
    values = latents.astype(mx.float32)
    axes = (0, 2, 3, 4)
    shift, scale = mx.mean(values, axis=axes), mx.maximum(mx.std(values, axis=axes), 1e-6)
    from_normalized = mx.mean(shift**2 + mx.log(scale) ** 2)
    from_denormalized = mx.mean(((shift - mean) / std) ** 2 + mx.log(scale / std) ** 2)
    return bool((from_denormalized < from_normalized).item())


def _choose(path: str, tensors: dict[str, StoredTensor], key: str | None, channels: int) -> str:
    listing = _listing(tensors)
    if key is not None and key not in tensors:
        raise ValueError(f"key (--key) must name a tensor of {path}, got {told(key)}; it holds {listing}")
    wanted = [key] if key is not None else [name for name in tensors if "audio" not in name.lower()]
    candidates = [name for name in wanted if _is_video(tensors[name], channels)]
    if key is None and path.lower().endswith(".latent") and _COMFYUI_KEY in candidates:
        return _COMFYUI_KEY
    for ranks in ((4, 5), (3,), (2,)):
        names = [name for name in candidates if len(tensors[name].shape) in ranks]
        if _PREFERRED_KEY in names:
            return _PREFERRED_KEY
        if len(names) == 1:
            return names[0]
        if names:
            several = _listing({name: tensors[name] for name in names})
            raise ValueError(f"{path} holds several video latents, choose one with key (--key): {several}")
    raise ValueError(
        f"latents must be floating point, not empty, and (B, {channels}, F, H, W), (B, F, {channels}, H, W), "
        f"(B, F, H, W, {channels}) or packed (B, F*H*W, {channels}), batch optional; "
        f"{path} holds {listing if key is None else _listing({key: tensors[key]})}"
    )


def _listing(tensors: dict[str, StoredTensor], longest: int = 12) -> str:
    shown = [f"{name or 'one array'} {s.dtype} {s.shape}" for name, s in list(tensors.items())[:longest]]
    more = [f"and {len(tensors) - longest} more"] if len(tensors) > longest else []
    return "; ".join(shown + more) or "no tensors"


def _is_video(stored: StoredTensor, channels: int) -> bool:
    shape = stored.shape
    if stored.dtype not in _FLOATS or 0 in shape or not 2 <= len(shape) <= 5:
        return False
    if len(shape) <= 3:
        return shape[-1] == channels
    return _channel_axis(shape if len(shape) == 5 else (1, *shape), channels) is not None


def _channel_axis(shape: tuple[int, ...], channels: int) -> int | None:
    axes = [axis for axis, size in enumerate(shape) if size == channels]
    if 1 in axes:
        return 1
    return axes[0] if axes in ([2], [4]) else None


def _size_in_file(file: TensorFile) -> tuple[int, int, int] | None:
    frames, height, width = (file.number(name) for name in ("num_frames", "height", "width"))
    return None if not (frames and height and width) else (int(frames), int(height), int(width))


def _arrange(
    path: str,
    latents: mx.array,
    given_size: tuple[int, int, int] | None,
    size_in_file: tuple[int, int, int] | None,
    channels: int,
) -> mx.array:
    if latents.ndim <= 3:
        tokens = latents.shape[-2]
        size = given_size or size_in_file
        if size is None or math.prod(size) != tokens:
            raise ValueError(
                f"packed latents need latent_size=(F, H, W) (--latent-size FxHxW) with F*H*W = {tokens}, "
                f"got {size} for {latents.shape} in {path}"
            )
        return latents.reshape(-1, *size, channels).transpose(0, 4, 1, 2, 3)
    batched = latents if latents.ndim == 5 else latents[None]
    axis = _channel_axis(batched.shape, channels)
    arranged = batched if axis in (1, None) else mx.moveaxis(batched, axis, 1)
    if given_size is not None and arranged.shape[2:] != tuple(given_size):
        raise ValueError(f"latent_size must be {arranged.shape[2:]} for {path}, got {given_size}")
    return arranged
