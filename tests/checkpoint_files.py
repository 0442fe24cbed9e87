"""Files in every published layout, written from a decoder by tables of their own."""

import json
import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from vae_cases import reference_config, reference_file

from mlx_vae_tiling.vae.decoder import VideoDecoder

DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}

UP_BLOCKS_090 = ["mid_block", "up_blocks.0", "up_blocks.1.upsamplers.0", "up_blocks.1", "up_blocks.2.conv_in"]
UP_BLOCKS_090 += ["up_blocks.2.upsamplers.0", "up_blocks.2", "up_blocks.3.conv_in"]
UP_BLOCKS_090 += ["up_blocks.3.upsamplers.0", "up_blocks.3"]
UP_BLOCKS = [
    "mid_block",
    "up_blocks.0.upsamplers.0",
    "up_blocks.0",
    "up_blocks.1.upsamplers.0",
    "up_blocks.1",
]
UP_BLOCKS += ["up_blocks.2.upsamplers.0", "up_blocks.2", "up_blocks.3.upsamplers.0", "up_blocks.3"]


UP_BLOCKS_PRUNA = ["mid_block", "up_blocks.0.upsamplers.0", "up_blocks.0", "up_blocks.1.conv_in"]
UP_BLOCKS_PRUNA += [
    "up_blocks.1.upsamplers.0",
    "up_blocks.1",
    "up_blocks.2.conv_in",
    "up_blocks.2.upsamplers.0",
]
UP_BLOCKS_PRUNA += ["up_blocks.2", "up_blocks.3.upsamplers.0", "up_blocks.3"]


def decoder_of(version, dtype=mx.float32, **changes):
    decoder = VideoDecoder(replace(reference_config(version), **changes)).init_random(seed=3)
    decoder.per_channel_statistics.std = mx.arange(1, decoder.config.latent_channels + 1) / 4
    decoder.set_dtype(dtype)
    return decoder


def original_json(version):
    return json.loads(reference_file(version)[1]["config"])["vae"]


def diffusers_json(version):
    return json.loads(reference_file(version)[1]["diffusers_config"])


def parameters(decoder):
    return dict(tree_flatten(decoder.parameters()))


def original(decoder, kernel_axes=(0, 4, 1, 2, 3)):
    """Original names without prefix; kernels in torch's order unless told."""
    tensors = {}
    for name, value in parameters(decoder).items():
        if name.endswith("conv_shortcut.weight"):
            value = value[:, None, None, None]
        if value.ndim == 5:
            value = value.transpose(kernel_axes)
        if "per_channel_scale" in name:
            value = value[:, None, None]
        tensors[re.sub(r"^(per_channel_statistics.*)", r"\1-of-means", name)] = value
    return tensors


def with_decoder_prefix(tensors):
    return {n if n.startswith("per_channel_statistics") else f"decoder.{n}": v for n, v in tensors.items()}


def split(decoder):
    """The VAE alone: ComfyUI extracts, LTX-2.5, FastVideo."""
    zeros = mx.zeros((decoder.config.latent_channels,))
    encoder = {
        "encoder.conv_in.conv.weight": mx.zeros((8, 48, 3, 3, 3)),
        "encoder.conv_in.conv.bias": mx.zeros((8,)),
    }
    encoder["encoder.down_blocks.0.res_blocks.0.conv1.conv.weight"] = mx.zeros((8, 8, 3, 3, 3))
    unused = ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
    statistics = {f"per_channel_statistics.{name}": zeros for name in unused}
    return encoder | statistics | with_decoder_prefix(original(decoder))


def combined(decoder):
    tensors = {f"vae.{name}": value for name, value in split(decoder).items()}
    tensors["audio_vae.decoder.conv_in.conv.weight"] = mx.zeros((8, 8, 3, 3))
    tensors["model.diffusion_model.patchify_proj.weight"] = ("F8_E4M3", (64, 64), bytes(4096))
    return tensors


def diffusers(decoder):
    blocks = {10: UP_BLOCKS_090, 11: UP_BLOCKS_PRUNA}.get(len(decoder.up_blocks), UP_BLOCKS)
    tensors = {}
    for name, value in split(decoder).items():
        if statistic := re.fullmatch(r"per_channel_statistics\.(mean|std)-of-means", name):
            tensors[f"latents_{statistic[1]}"] = value
        elif name.startswith("decoder."):
            if block := re.match(r"decoder\.up_blocks\.(\d+)", name):
                name = f"decoder.{blocks[int(block[1])]}{name[block.end() :]}"
            name = name.replace("decoder.last_", "decoder.").replace("res_blocks", "resnets")
            name = name.replace("conv_shortcut.", "conv_shortcut.conv.").replace("norm3.norm.", "norm3.")
            tensors[name] = value
    return tensors


def mlx_statistics(tensors):
    return {re.sub(r"(mean|std)-of-means$", r"\1", name): value for name, value in tensors.items()}


def mlx_video(decoder):
    tensors = mlx_statistics(original(decoder, kernel_axes=(0, 1, 2, 3, 4)))
    return {re.sub(r"(?<!\.conv)\.conv\.(weight|bias)$", r".conv.conv.\1", n): v for n, v in tensors.items()}


def bare(decoder):
    return mlx_statistics(original(decoder, kernel_axes=(0, 1, 2, 3, 4)))


def mlx_forge(decoder, kernel_axes=(0, 1, 2, 3, 4)):
    tensors = mlx_statistics(original(decoder, kernel_axes))
    return {f"vae_decoder.{name}": value for name, value in tensors.items()}


def malformed(decoder):
    """Some kernels are (O, T, H, I, W); not those of 3 input channels, which could be anything."""
    tensors = mlx_forge(decoder)
    for index, (name, value) in enumerate(tensors.items()):
        if value.ndim == 5 and value.shape[4] != 3 and index % 3 == 0:
            tensors[name] = value.transpose(0, 1, 2, 4, 3)
    return tensors


def stored(value):
    """(dtype, shape, bytes) of an array, or of what is given in that form."""
    if isinstance(value, tuple):
        return value
    unsigned = mx.contiguous(value).view(mx.uint32 if value.dtype == mx.float32 else mx.uint16)
    return DTYPES[value.dtype], value.shape, np.array(unsigned).tobytes()


def write(path, tensors, config=None, metadata=None):
    """Writes a safetensors file, with the original JSON as metadata where `config` is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = dict(metadata or {"format": "pt"})
    if config is not None:
        metadata["config"] = json.dumps(
            {"transformer": {"_class_name": "AVTransformer3DModel"}, "vae": config}
        )
    header, data = {"__metadata__": metadata}, b""
    for name in sorted(tensors):
        dtype, shape, values = stored(tensors[name])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
