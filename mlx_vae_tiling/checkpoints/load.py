"""`load_decoder`: header, then names and config, then a strict load of the decoder's tensors alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.arguments import require
from mlx_vae_tiling.checkpoints.configs import Config
from mlx_vae_tiling.checkpoints.describe import find_decoder
from mlx_vae_tiling.checkpoints.identify import StoredTensor
from mlx_vae_tiling.checkpoints.locate import Source
from mlx_vae_tiling.checkpoints.parameters import parameter_shapes
from mlx_vae_tiling.checkpoints.tensor_names import Axes
from mlx_vae_tiling.dtypes import STORED, FloatType, parse_dtype
from mlx_vae_tiling.forks import using_mlx
from mlx_vae_tiling.media.safetensors_header import TensorEntry
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.build import build_decoder
from mlx_vae_tiling.vae.published import AnyConfig

PART = 2**20
"""Values that are looked at together, so that looking takes no more memory than this."""

_EXPONENTS = {
    "F32": np.uint32(0x7F800000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}


def load_decoder(
    source: Source, *, dtype: mx.Dtype | str | None = None, config: Config | None = None
) -> StreamingDecoder:
    """Loads a video decoder from any published file layout.

    Only the decoder's tensors are read, one by one, also from a checkpoint of a whole model.

    Args:
        source: A file; a directory with one, itself or in `vae`, `decoder` or `vae/decoder`; "demo"
            for the bundled demonstration; or, where `fetch_vae` gets it from the Hugging Face Hub, the
            name of a published version such as "ltx-2.3", "owner/name" or
            "owner/name/file.safetensors". What is on this machine under such a name goes first.
        dtype: mx.float32, mx.float16, mx.bfloat16 or their names; None for that of the stored
            kernels. The per-channel statistics stay as they are stored.
        config: Overrides what the file says: a `DecoderConfig`, the VAE's JSON in original or
            diffusers form, the path of a .json file of that, or the name of a published version such
            as "ltx-2". `{"spatial_padding_mode": "reflect"}` or "zeros" alone overrides only that.

    Returns:
        The decoder, with its weights in memory.

    Raises:
        FileNotFoundError: If there is no such file or directory.
        OSError: If a file cannot be read, or not be fetched.
        ValueError: If the source holds no LTX video decoder of a supported kind, its tensors are not
            exactly those of its config, or some of their values are not finite.

    Warns:
        CheckpointWarning: If nothing but the shapes of its tensors tells the version.

    Example:
        >>> load_decoder("demo").config.parameters
        1809072
    """
    kinds = (str, os.PathLike, Mapping, AnyConfig, None)
    require("config", config, "a config, the name of a version, its JSON or a path", *kinds)
    require("dtype", dtype, "a dtype, its name or None", str, mx.Dtype, None)
    wanted = None if dtype is None else parse_dtype(dtype)
    stored = find_decoder(source, config)
    decoder = build_decoder(stored.info.config)
    wanted = wanted or parse_dtype(stored.info.dtype)
    weights = []
    for name, shape in parameter_shapes(decoder).items():
        target = None if name.startswith("per_channel_statistics.") else wanted
        weights.append((name, _read(stored.tensors[name], shape, target)))
    decoder.load_weights(weights)
    return decoder


def _read(tensor: StoredTensor, shape: tuple[int, ...], dtype: mx.Dtype | None) -> mx.array:
    """One parameter, evaluated, so that nothing but the result is alive when the next is read."""
    parts = [_read_entry(part, tensor.axes) for part in tensor.parts]
    value = (parts[0] if len(parts) == 1 else mx.concatenate(parts)).reshape(shape)
    if tensor.gate is not None:
        gate = _read_entry(tensor.gate, None).astype(mx.float32).reshape(-1, *[1] * (value.ndim - 1))
        value = (gate * value.astype(mx.float32)).astype(value.dtype)
    stored = value.dtype
    value = value.astype(dtype or stored)
    using_mlx()
    mx.eval(value)
    if value.dtype != stored and not _fits(value):
        first = tensor.parts[0]
        raise ValueError(
            f"{first.file}: {first.name} has values that {dtype} cannot hold; "
            f"load it as {STORED[first.dtype].name}"
        )
    return value


def _read_entry(entry: TensorEntry, axes: Axes | None) -> mx.array:
    """One stored tensor, in the axes of ours."""
    kind = STORED[entry.dtype]
    count = math.prod(entry.shape)
    values = np.fromfile(entry.file, kind.numpy, count, offset=entry.start)
    if values.size != count:
        raise ValueError(
            f"{entry.file} became shorter while {entry.name} was read; copy or download it again"
        )
    _check_finite(entry, kind, values)
    values = values.reshape(entry.shape)
    return mx.array(values.transpose(axes) if axes else values).view(kind.mlx)


def _check_finite(entry: TensorEntry, kind: FloatType, values: Any) -> None:
    """Looks at the bits, a part at a time: infinities and NaN are those whose exponent is all ones."""
    exponent = _EXPONENTS[kind.stored_name]
    bits = values.view(exponent.dtype)
    for start in range(0, bits.size, PART):
        part = bits[start : start + PART] & exponent
        if (part == exponent).any():
            raise ValueError(
                f"{entry.file}: {entry.name} has NaN or infinite values; copy or download the file again, "
                "or load another one"
            )


def _fits(tensor: mx.array) -> bool:
    """Whether a tensor that was finite still is."""
    return bool(mx.isfinite(mx.max(tensor)) & mx.isfinite(mx.min(tensor)))
