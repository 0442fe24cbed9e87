"""`load_decoder`: header, then names and config, then a strict load of the decoder's tensors alone."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_vae_tiling.checkpoints.configs import Config
from mlx_vae_tiling.checkpoints.describe import Source, StoredTensor, find_decoder, parameter_shapes
from mlx_vae_tiling.checkpoints.tensor_names import Axes
from mlx_vae_tiling.dtypes import STORED, parse_dtype
from mlx_vae_tiling.media.safetensors_header import TensorEntry
from mlx_vae_tiling.vae.base import StreamingDecoder
from mlx_vae_tiling.vae.build import build_decoder


def load_decoder(
    source: Source, *, dtype: mx.Dtype | str | None = None, config: Config | None = None
) -> StreamingDecoder:
    """Loads a video decoder from any published file layout.

    Only the decoder's tensors are read, one by one, also from a checkpoint of a whole model.

    Args:
        source: A file; a directory with one, itself or in `vae`, `decoder` or `vae/decoder`; "demo"
            for the bundled demonstration; or "owner/name" or "owner/name/file.safetensors" on the
            Hugging Face Hub, where `fetch_vae` gets it.
        dtype: mx.float32, mx.float16, mx.bfloat16 or their names; None for that of the stored
            kernels. The per-channel statistics stay as they are stored.
        config: Overrides what the file says: a `DecoderConfig`, the VAE's JSON in original or
            diffusers form, or the name of a published version such as "ltx-2".

    Returns:
        The decoder, with its weights in memory.

    Raises:
        FileNotFoundError: If there is no such file or directory.
        ValueError: If the source holds no LTX video decoder of a supported kind, or its tensors are
            not exactly those of its config.

    Example:
        >>> load_decoder("demo").config.parameters
        1809072
    """
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
    value = value.astype(dtype or value.dtype)
    mx.eval(value)
    return value


def _read_entry(entry: TensorEntry, axes: Axes | None) -> mx.array:
    kind = STORED[entry.dtype]
    values = np.fromfile(entry.file, kind.numpy, math.prod(entry.shape), offset=entry.start)
    values = values.reshape(entry.shape)
    return mx.array(values.transpose(axes) if axes else values).view(kind.mlx)
