"""The published forms of a decoder's config, each read into the fields of `DecoderConfig`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_vae_tiling.arguments import require
from mlx_vae_tiling.vae.blocks import STRIDES, Block, PaddingMode, ResBlockNarrowing, ResBlocks, Upsample

Fields = dict[str, Any]


def read_original(config: Mapping[str, Any]) -> Fields:
    """The JSON of an original checkpoint; see `DecoderConfig.from_original`."""
    require("config", config, "the object in the JSON", Mapping)
    vae = config.get("vae", config)
    require("config['vae']", vae, "the object in the JSON", Mapping)
    check_class(vae.get("_class_name", "CausalVideoAutoencoder"))
    published = vae.get("decoder_blocks", vae.get("blocks"))
    if not published:
        raise ValueError(f"a VAE config needs 'decoder_blocks' or 'blocks', got the keys {sorted(vae)}")
    conditioned = bool(vae.get("timestep_conditioning", False))
    default_padding = "zeros" if conditioned or "decoder_blocks" not in vae else "reflect"
    padding = vae.get("decoder_spatial_padding_mode", vae.get("spatial_padding_mode"))
    return {
        "decoder_blocks": tuple(_parse_block(name, options) for name, options in reversed(published)),
        "latent_channels": vae.get("latent_channels", 128),
        "out_channels": vae.get("out_channels", 3),
        "base_channels": vae.get("decoder_base_channels", vae.get("base_channels", 128)),
        "patch_size": vae.get("patch_size", 4),
        "causal": bool(vae.get("causal_decoder", False)),
        "timestep_conditioning": conditioned,
        "spatial_padding_mode": padding or default_padding,
        "norm_layer": vae.get("norm_layer", "pixel_norm"),
    }


def read_diffusers(config: Mapping[str, Any]) -> Fields:
    """A diffusers `vae/config.json`; see `DecoderConfig.from_diffusers`."""
    require("config", config, "the object in the JSON", Mapping)
    name = config.get("_class_name", "AutoencoderKLLTXVideo")
    if name not in _DIFFUSERS_DEFAULTS:
        check_class(name)
        raise ValueError(f"a diffusers VAE must be one of {sorted(_DIFFUSERS_DEFAULTS)}, got {name}")
    values = {**_DIFFUSERS_DEFAULTS[name], **config}
    blocks, base_channels = _parse_diffusers_blocks(values)
    return {
        "decoder_blocks": blocks,
        "latent_channels": values["latent_channels"],
        "out_channels": values["out_channels"],
        "base_channels": base_channels,
        "patch_size": values["patch_size"],
        "causal": bool(values["decoder_causal"]),
        "timestep_conditioning": bool(values["timestep_conditioning"]),
        "spatial_padding_mode": values["decoder_spatial_padding_mode"],
    }


def read_shapes(
    name_to_shape: Mapping[str, Sequence[int]], padding: PaddingMode | None, residual: bool | None
) -> Fields:
    """Tensor shapes under original names; see `DecoderConfig.from_shapes`."""
    require("name_to_shape", name_to_shape, "shapes by their names", Mapping)
    shapes = {name.removeprefix("vae.").removeprefix("decoder."): s for name, s in name_to_shape.items()}
    patch_channels, base_channels = _channels(shapes, "conv_out.conv.weight")
    blocks = _infer_blocks(shapes, base_channels)
    conditioned = "last_scale_shift_table" in shapes
    is_ltx_video = conditioned or any(isinstance(block, ResBlockNarrowing) for block in blocks)
    if padding is None and not is_ltx_video:
        raise ValueError(
            "shapes cannot tell the spatial padding; pass spatial_padding_mode='reflect' for LTX-2 "
            "or 'zeros' for LTX-2.3 and LTX-2.5"
        )
    upsamples = [block for block in blocks if isinstance(block, Upsample)]
    all_alike = all(block.stride == (2, 2, 2) and block.multiplier == 2 for block in upsamples)
    if residual is None and all_alike and not conditioned:
        raise ValueError("shapes cannot tell whether upsampling is residual; pass residual=True for LTX-2")
    residual = all_alike if residual is None else residual
    return {
        "decoder_blocks": tuple(
            Upsample(b.stride, b.multiplier, residual) if isinstance(b, Upsample) else b for b in blocks
        ),
        "latent_channels": _channels(shapes, "conv_in.conv.weight")[1],
        "base_channels": base_channels,
        "patch_size": math.isqrt(patch_channels // 3),
        "timestep_conditioning": conditioned,
        "spatial_padding_mode": padding or "zeros",
    }


def check_class(name: str) -> None:
    if name != "CausalVideoAutoencoder":
        raise ValueError(f"the VAE must be a CausalVideoAutoencoder, got {name}: not an LTX video VAE")


def _parse_block(name: str, options: int | Mapping[str, Any]) -> Block:
    # A bare integer means num_layers, whatever the block: "compress_all", 1 has multiplier 1.
    given: Mapping[str, Any] = {"num_layers": options} if isinstance(options, int) else options
    if name == "res_x":
        return ResBlocks(int(given["num_layers"]), bool(given.get("inject_noise", False)))
    if name == "res_x_y":
        if "in_channels" in given and "out_channels" in given:
            return ResBlockNarrowing.between(int(given["in_channels"]), int(given["out_channels"]))
        return ResBlockNarrowing(int(given.get("multiplier", 2)))
    if name in STRIDES:
        return Upsample(STRIDES[name], int(given.get("multiplier", 1)), bool(given.get("residual", False)))
    raise ValueError(
        f"decoder block {name!r} is not supported; supported are res_x, res_x_y, {', '.join(STRIDES)}"
    )


_DIFFUSERS_LTX: dict[str, Any] = {
    "latent_channels": 128,
    "out_channels": 3,
    "patch_size": 4,
    "decoder_block_out_channels": (128, 256, 512, 512),
    "decoder_layers_per_block": (4, 3, 3, 3, 4),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "decoder_inject_noise": (False,) * 5,
    "upsample_residual": (False,) * 4,
    "upsample_factor": (1, 1, 1, 1),
    "upsample_type": None,
    "timestep_conditioning": False,
    "decoder_causal": False,
    "decoder_spatial_padding_mode": "zeros",
}
_DIFFUSERS_DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKLLTXVideo": _DIFFUSERS_LTX,
    "AutoencoderKLLTX2Video": {
        **_DIFFUSERS_LTX,
        "decoder_block_out_channels": (256, 512, 1024),
        "decoder_layers_per_block": (5, 5, 5, 5),
        "decoder_spatio_temporal_scaling": (True,) * 3,
        "decoder_inject_noise": (False,) * 4,
        "upsample_residual": (True,) * 3,
        "upsample_factor": (2, 2, 2),
        "decoder_causal": True,
        "decoder_spatial_padding_mode": "reflect",
    },
}
_DIFFUSERS_STRIDES = {
    "spatiotemporal": STRIDES["compress_all"],
    "temporal": STRIDES["compress_time"],
    "spatial": STRIDES["compress_space"],
}


def _parse_diffusers_blocks(values: Mapping[str, Any]) -> tuple[tuple[Block, ...], int]:
    """Blocks and base channels. Every tuple is written pixels first, except `upsample_type`."""
    widths = values["decoder_block_out_channels"][::-1]
    kinds = values["upsample_type"] or ("spatiotemporal",) * len(widths)
    columns = {
        "decoder_layers_per_block": values["decoder_layers_per_block"][::-1],
        "decoder_inject_noise": values["decoder_inject_noise"][::-1],
        "decoder_spatio_temporal_scaling": values["decoder_spatio_temporal_scaling"][::-1],
        "upsample_residual": values["upsample_residual"][::-1],
        "upsample_factor": values["upsample_factor"][::-1],
        "upsample_type": kinds,
    }
    for name, column in columns.items():
        expected = len(widths) + (name in ("decoder_layers_per_block", "decoder_inject_noise"))
        if len(column) != expected:
            raise ValueError(
                f"{name} must have {expected} entries beside {len(widths)} decoder_block_out_channels, "
                f"got {len(column)}"
            )
    layers, noise, scaling, residual, factors, kinds = columns.values()
    blocks: list[Block] = [ResBlocks(layers[0], bool(noise[0]))]
    width = widths[0]
    for index, published_width in enumerate(widths):
        if width != published_width:
            blocks.append(ResBlockNarrowing.between(width, published_width))
        width = published_width // factors[index]
        if scaling[index]:
            stride = _DIFFUSERS_STRIDES[kinds[index]]
            blocks.append(Upsample(stride, factors[index], bool(residual[index])))
        blocks.append(ResBlocks(layers[index + 1], bool(noise[index + 1])))
    return tuple(blocks), width


def _channels(shapes: Mapping[str, Sequence[int]], name: str) -> tuple[int, int]:
    """Output and input channels of a kernel in torch or MLX order."""
    if name not in shapes or len(shapes[name]) != 5:
        raise ValueError(f"an LTX decoder needs a kernel of rank 5 named {name!r}, got {shapes.get(name)}")
    out, second, *_, last = shapes[name]
    return out, (second if last in (1, 3) and second != last else last)


def _infer_blocks(shapes: Mapping[str, Sequence[int]], base_channels: int) -> list[Block]:
    """Blocks in decode order, found from the last one back, since each knows only its input's width."""
    indices = {int(m[1]) for name in shapes if (m := re.match(r"up_blocks\.(\d+)\.", name))}
    blocks: list[Block] = []
    width = base_channels
    for index in sorted(indices, reverse=True):
        prefix = f"up_blocks.{index}."
        inner = (re.match(rf"up_blocks\.{index}\.res_blocks\.(\d+)\.", name) for name in shapes)
        members = {match[1] for match in inner if match}
        if members:
            blocks.append(ResBlocks(len(members), f"{prefix}res_blocks.0.per_channel_scale1" in shapes))
            continue
        narrows = f"{prefix}conv1.conv.weight" in shapes
        out, received = _channels(shapes, f"{prefix}{'conv1' if narrows else 'conv'}.conv.weight")
        strides = {math.prod(stride): stride for stride in STRIDES.values()}
        if narrows:
            blocks.append(ResBlockNarrowing.between(received, out))
        elif out % width or received % width or out // width not in strides:
            raise ValueError(
                f"{prefix}conv maps {received} to {out} channels before a width of {width}: no LTX upsampler"
            )
        else:
            blocks.append(Upsample(strides[out // width], received // width))
        width = received
    return blocks[::-1]
